"""bitsandbytes: random modules decoded by slow, obvious numpy; the library itself where it is installed; every error."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_dirs import relative_error

import jq
from jq.algorithms import codebook4, int8
from jq.errors import FormatError, UnsupportedError
from jq.formats import bitsandbytes as bnb
from jq.formats.base import Context

NAME = "model.layers.0.mlp.up_proj"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORAGES = {**DTYPES, "uint8": np.uint8, "int8": np.int8, "float64": np.float64}


def as_json(state):
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


@st.composite
def modules(draw):
    """(parts, weights) of a random 4-bit module; weights by the formula of the format, one number at a time."""
    kind = draw(st.sampled_from(("nf4", "fp4")))
    size = draw(st.sampled_from((32, 64, 128)))
    n, k = draw(st.integers(1, 12)), draw(st.one_of(st.integers(1, 200), st.sampled_from((64, 128, 256))))
    storage = draw(st.sampled_from([s for s, d in STORAGES.items() if -(-n * k // 2) % np.dtype(d).itemsize == 0]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, n * k + n * k % 2)
    table = rng.normal(size=16).astype(np.float32) if draw(st.booleans()) else codebook4.TABLES[kind]
    blocks = -(-n * k // size)
    absmax = rng.random(blocks).astype(np.float32)
    state = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": [n, k]}
    parts = {
        "weight": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8).view(STORAGES[storage]).reshape(-1, 1),
        "weight.quant_map": table,
        "weight.absmax": absmax,
    }
    if draw(st.booleans()):
        quantized = rng.integers(0, 256, blocks).astype(np.uint8)
        nested, offset = rng.random(-(-blocks // 256)).astype(np.float32), np.float32(rng.random())
        values = rng.normal(size=256).astype(np.float32)
        absmax = np.array(
            [np.float32(values[q] * nested[i // 256]) + offset for i, q in enumerate(quantized)], np.float32
        )
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        parts |= {"weight.absmax": quantized, "weight.nested_absmax": nested, "weight.nested_quant_map": values}
    if draw(st.booleans()):  # another writer's JSON
        state = dict(reversed(state.items())) | {"comment": "kept"}
    parts[bnb.STATE + kind] = as_json(state)
    weights = np.array([np.float32(table[c] * absmax[e // size]) for e, c in enumerate(codes[: n * k])], np.float32)
    return parts, weights.reshape(n, k).astype(DTYPES[dtype])


@settings(max_examples=80, deadline=None)
@given(modules(), TURNS)
def test_load_and_dump_invert_slow_decoding(module, turn):
    parts, weights = module
    q = bnb.load(NAME, parts, bnb.Options(), Context())
    got = dense(q, turn)
    assert got.dtype == weights.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), weights.view(f"u{weights.itemsize}"))
    for tensor in (q, q.to_jax()):
        again = bnb.dump(tensor)
        assert again.keys() == parts.keys()
        for suffix, array in parts.items():
            assert again[suffix].dtype == array.dtype and again[suffix].shape == array.shape, suffix
            assert again[suffix].tobytes() == array.tobytes(), suffix


def test_dequantize_under_jit_is_the_same():
    w = np.random.default_rng(0).normal(size=(32, 192)).astype(np.float32)
    for method in (jq.NF4(double_quant=True), jq.FP4(block_size=128, double_quant=True), jq.Int8()):
        q = method.quantize(w).to_jax()
        np.testing.assert_array_equal(jax.jit(lambda t: t.dequantize())(q), q.to_numpy()._dense())


def test_layers_share_static_fields():
    rng = np.random.default_rng(0)
    for method in (jq.NF4(double_quant=True), jq.FP4(block_size=128), jq.Int8()):
        a, b = (method.quantize(rng.normal(size=(16, 192)).astype(np.float32)) for _ in range(2))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        twin = bnb.load(NAME, bnb.dump(a), bnb.Options(), Context())
        assert jax.tree.structure(a) == jax.tree.structure(twin)


@pytest.mark.parametrize("storage", sorted(STORAGES))
def test_bytes_that_are_no_numbers_survive(storage):
    """Every pair of codes occurs: as a 16- or 32-bit float many of them are NaN with a payload."""
    n, k = 8, 4096
    stored = np.random.default_rng(1).permutation(np.arange(n * k // 2) % 256).astype(np.uint8)
    w = np.zeros((n, k), np.float32)
    parts = bnb.dump(jq.NF4(quant_storage=storage).quantize(w))
    parts["weight"] = stored.view(STORAGES[storage]).reshape(-1, 1)
    again = bnb.dump(bnb.load(NAME, parts, bnb.Options(), Context()).to_jax())
    assert again["weight"].tobytes() == stored.tobytes()


def module(double=True):
    w = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)
    return bnb.dump(jq.NF4(double_quant=double).quantize(w))


def change_json(**fields):
    def change(parts):
        state = json.loads(parts[bnb.STATE + "nf4"].tobytes()) | fields
        parts[bnb.STATE + "nf4"] = as_json(state)

    return change


def not_finite(suffix):
    def change(parts):
        parts[suffix] = np.where(np.arange(parts[suffix].size) == 2, np.nan, parts[suffix]).astype(np.float32)

    return change


STATE = r"up_proj\.weight\.quant_state\.bitsandbytes__nf4"
BROKEN = {
    "no state": (lambda p: p.pop(bnb.STATE + "nf4"), STATE + ": missing"),
    "no absmax": (lambda p: p.pop("weight.absmax"), r"up_proj\.weight\.absmax: missing"),
    "no map": (lambda p: p.pop("weight.quant_map"), r"up_proj\.weight\.quant_map: missing"),
    "no nested map": (lambda p: p.pop("weight.nested_quant_map"), r"nested_quant_map: missing.*absmax is quantized"),
    "no nested": (lambda p: p.pop("weight.nested_absmax"), r"nested_absmax: missing"),
    "no weight": (lambda p: p.pop("weight"), r"up_proj\.weight: missing"),
    "cut": (
        lambda p: p.update(weight=p["weight"][:1000]),
        r"up_proj\.weight: found uint8\[1000, 1\] = 1000 bytes, expected 1024 \(shape 16 x 128",
    ),
    "blocks": (change_json(blocksize=128), r"up_proj\.weight\.absmax: found shape \(32,\), expected \(16,\)"),
    "shape": (change_json(shape=[16, 120]), r"= 1024 bytes, expected 960 \(shape 16 x 120"),
    "axes": (change_json(shape=[2, 8, 128]), STATE + r": shape is \[2, 8, 128\], expected \[out_features, in_features\]"),
    "negative": (change_json(shape=[-16, -128]), STATE + ": shape is"),
    "size": (change_json(blocksize=0), STATE + ": blocksize is 0"),
    "dtype": (change_json(dtype="int8"), STATE + ": dtype is 'int8', expected float16"),
    "offset": (change_json(nested_offset="x"), STATE + ": nested_offset and nested_blocksize must be numbers"),
    "json": (lambda p: p.update({bnb.STATE + "nf4": np.frombuffer(b"{oops", np.uint8)}), STATE + ": is not JSON"),
    "list": (lambda p: p.update({bnb.STATE + "nf4": np.frombuffer(b"[1]", np.uint8)}), STATE + ": holds a JSON list"),
    "map nan": (not_finite("weight.quant_map"), r"quant_map: 1 of 16 values are not finite"),
    "nested nan": (not_finite("weight.nested_quant_map"), r"nested_quant_map: 1 of 256 values are not finite"),
    "absmax dtype": (
        lambda p: p.update({"weight.absmax": p["weight.absmax"].astype(np.float32)}),
        r"up_proj\.weight\.absmax: found dtype float32, expected uint8",
    ),
    "nested count": (
        lambda p: p.update({"weight.nested_absmax": np.ones(2, np.float32)}),
        r"nested_absmax: found shape \(2,\), expected \(1,\)",
    ),
    "map count": (
        lambda p: p.update({"weight.quant_map": np.ones(15, np.float32)}),
        r"quant_map: found shape \(15,\), expected \(16,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_4bit_modules_are_refused(case):
    change, text = BROKEN[case]
    parts = module()
    change(parts)
    with pytest.raises(FormatError, match=text):
        bnb.load(NAME, parts, bnb.Options(), Context())


def test_absmax_that_is_not_finite():
    parts = module(double=False)
    parts["weight.absmax"] = np.where(np.arange(32) == 3, np.inf, parts["weight.absmax"]).astype(np.float32)
    with pytest.raises(FormatError, match=r"up_proj\.weight\.absmax: 1 of 32 values are not finite"):
        bnb.load(NAME, parts, bnb.Options(), Context())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1), TURNS)
def test_int8_modules(n, k, marked, seed, turn):
    rng = np.random.default_rng(seed)
    parts = {
        "weight": rng.integers(-128, 128, (n, k)).astype(np.int8),
        "SCB": rng.random(n).astype(np.float32),
    }
    if marked:
        parts["weight_format"] = np.zeros((), np.uint8)
    q = bnb.load(NAME, parts, bnb.Options(threshold=3.5), Context()).to_jax()
    want = (parts["weight"].astype(np.float32) * parts["SCB"][:, None]) * np.float32(7.874015718698502e-3)
    np.testing.assert_array_equal(dense(q, turn), want)
    assert q.activation.get("threshold") == 3.5
    again = bnb.dump(q)
    assert again.keys() == parts.keys()
    for suffix, array in parts.items():
        assert again[suffix].tobytes() == array.tobytes() and again[suffix].shape == array.shape


def test_int8_errors():
    good = {"weight": np.zeros((4, 8), np.int8), "SCB": np.ones(4, np.float32)}
    for change, error, text in [
        ({"SCB": np.ones(5, np.float32)}, FormatError, r"up_proj\.SCB: found shape \(5,\), expected \(4,\)"),
        ({"SCB": np.full(4, np.nan, np.float32)}, FormatError, r"up_proj\.SCB: 4 of 4 values are not finite"),
        ({"weight": np.zeros((4, 8), np.float16)}, FormatError, r"up_proj\.weight: found dtype float16, expected int8"),
        ({"weight": np.zeros(32, np.int8)}, FormatError, r"up_proj\.weight: found shape \(32,\)"),
        ({"weight_format": np.array(2, np.uint8)}, UnsupportedError, r"weight_format: 2 \(col_turing\)"),
    ]:
        with pytest.raises(error, match=text):
            bnb.load(NAME, good | change, bnb.Options(), Context())


def test_int8_weight_without_scales():
    """It has the shape of a dense matrix, so nothing else would notice."""
    name = "model.layers.0.mlp.up_proj.weight"
    context = Context(shapes={name: (4, 8)}, dtypes={name: np.dtype(np.int8)}, label="dir")
    with pytest.raises(FormatError, match=r"dir: model\.layers\.0\.mlp\.up_proj\.SCB: missing.*is int8 \[4, 8\]"):
        bnb.group([name], bnb.Options(), context)


def test_config():
    assert bnb.parse({"load_in_8bit": True, "llm_int8_threshold": 4}, Context()).threshold == 4.0
    with pytest.raises(FormatError, match="llm_int8_threshold is 'much', expected a number"):
        bnb.parse({"llm_int8_threshold": "much"}, Context())


def reference_int8_linear(x, w, threshold):
    """LLM.int8's CPU arithmetic, row by row."""
    codes, scb = np.asarray(w.unpack()), np.asarray(w.scales)[:, 0]
    half = x.astype(np.float16).astype(np.float32)
    outlier = np.abs(half) >= threshold if threshold else np.zeros(half.shape, bool)
    columns = outlier.any(axis=0)
    rest = np.where(outlier, 0, half)
    top = np.abs(rest).max(axis=1)
    factor = np.float32(127) * (np.float32(1) / np.where(top == 0, np.float32(1), top))
    q = np.rint(rest * factor[:, None]).astype(np.int32)
    q[:, columns] = 0
    y = ((q @ codes.T).astype(np.float32) * (top[:, None] * scb[None])) * np.float32(6.200124e-05)
    y = y.astype(x.dtype)
    dense = np.asarray(w.dequantize()).astype(x.dtype).astype(np.float64)
    return (y.astype(np.float64) + x.astype(np.float64)[:, columns] @ dense[:, columns].T).astype(x.dtype), q


@settings(max_examples=9, deadline=None)
@given(
    st.sampled_from((1, 6)),  # few shapes: each is compiled
    st.sampled_from((1, 65, 1030)),
    st.sampled_from((1, 9)),
    st.sampled_from((0.0, 2.0, 6.0)),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_int8_matmul(m, k, n, threshold, dtype, seed):
    rng = np.random.default_rng(seed)
    w = jq.Int8(threshold).quantize(rng.normal(size=(n, k)).astype(np.float32)).to_jax()
    x = (rng.normal(size=(m, k)) * rng.choice([1e-3, 1.0, 4.0], size=(m, 1))).astype(DTYPES[dtype])
    x[rng.random(m) < 0.2] = 0
    want, codes = reference_int8_linear(x, w, threshold)
    from jq.activation_schemes.bitsandbytes import quantize

    np.testing.assert_array_equal(quantize(jnp.asarray(x), threshold)[0], codes)
    got = jq.matmul(jnp.asarray(x), w)
    assert got.dtype == x.dtype
    limit = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    assert relative_error(got, want) < limit
    plain = jq.matmul(jnp.asarray(x), w, quantize_activations=False)
    wide, dense = x.astype(np.float32), np.asarray(w.dequantize())
    # Weights are rounded to x's dtype, and the sum; terms of both signs may leave a sum far smaller than they are.
    unit = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    error = np.abs(np.asarray(plain, np.float32) - wide @ dense.T)
    assert (error <= unit * (np.abs(wide) @ np.abs(dense).T) + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("nf4", "fp4")),
    st.sampled_from(codebook4.BLOCK_SIZES[:5]),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**32 - 1),
)
def test_codes_are_nearest(kind, size, n, k, dtype, seed):
    """Each weight gets the table's value that is nearest, whatever the table's order."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, k)).astype(DTYPES[dtype])
    codes, absmax = codebook4.quantize(w, kind=kind, block_size=size)
    flat, table = w.reshape(-1).astype(np.float64), codebook4.TABLES[kind].astype(np.float64)
    blocks = np.arange(flat.size) // size
    np.testing.assert_array_equal(
        absmax, [np.abs(flat[blocks == b]).max().astype(np.float32) for b in range(absmax.size)]
    )
    scale = np.repeat(absmax, size)[: flat.size].astype(np.float64)
    error = np.abs(table[codes.reshape(-1)] * scale - flat)
    best = np.abs(table[None] * scale[:, None] - flat[:, None]).min(axis=1)
    assert (error <= best + 1e-6 * scale).all()


def test_zero_blocks_and_odd_counts():
    q = jq.NF4().quantize(np.zeros((3, 5), np.float32))
    assert (np.asarray(q.unpack()) == 7).all()
    assert bnb.dump(q)["weight"][-1, 0] == 0x77
    assert (np.asarray(jq.FP4().quantize(np.zeros((3, 5), np.float32)).unpack()) == 0).all()
    codes, scb = int8.quantize_rows(np.zeros((2, 4), np.float32))
    assert not codes.any() and not scb.any()


def test_methods_refuse():
    with pytest.raises(ValueError, match=r"NF4: block_size must be one of 32, 64, .* got 48"):
        jq.NF4(block_size=48)
    with pytest.raises(ValueError, match="FP4: quant_storage must be one of uint8"):
        jq.FP4(quant_storage="int4")
    with pytest.raises(UnsupportedError, match="m: 3 x 6 4-bit codes are 9 bytes, which do not fill float16 elements"):
        jq.NF4(quant_storage="float16").quantize(np.zeros((3, 6), np.float32), "m")
    for method in (jq.NF4(), jq.FP4(), jq.Int8()):
        with pytest.raises(ValueError, match="m: holds values that are not finite"):
            method.quantize(np.array([[1.0, np.nan]], np.float32), "m")
        with pytest.raises(ValueError, match=r"m: found .*expected float32, float16, bfloat16"):
            method.quantize(np.zeros((2, 2, 2), np.float32), "m")
    with pytest.raises(ValueError, match="m: weights beyond float16's 65504"):
        jq.Int8().quantize(np.full((1, 4), 1e5, np.float32), "m")


def torch_of(w):
    import torch

    if w.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(w.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(w.copy())


@pytest.mark.peers
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(("nf4", "fp4")),
    st.sampled_from(codebook4.BLOCK_SIZES),
    st.integers(1, 40),
    st.integers(1, 400),
    st.sampled_from(sorted(DTYPES)),
    st.integers(-6, 4),
    st.integers(0, 2**32 - 1),
)
def test_4bit_equals_the_library(kind, size, n, k, dtype, exponent, seed):
    import bitsandbytes.functional as f
    import torch

    torch.set_num_threads(1)  # the mean of the maxima is summed in another order on several
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, k)) * 10.0**exponent if seed % 3 else rng.integers(-7, 8, (n, k)) / 7
    w[rng.random(n) < 0.1] = 0
    w = w.astype(DTYPES[dtype])
    for double in (False, True):
        stored, state = f.quantize_4bit(torch_of(w), blocksize=size, quant_type=kind, compress_statistics=double)
        ours = bnb.dump(getattr(jq, kind.upper())(block_size=size, double_quant=double).quantize(w))
        for suffix, tensor in {"": stored, **{"." + s: t for s, t in state.as_dict(packed=True).items()}}.items():
            np.testing.assert_array_equal(ours["weight" + suffix], tensor.numpy(), err_msg=suffix)


@pytest.mark.peers
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 400), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**32 - 1))
def test_int8_equals_the_library(n, k, dtype, seed):
    import bitsandbytes.functional as f
    import torch

    w = np.random.default_rng(seed).normal(size=(n, k)).astype(DTYPES[dtype])
    codes, scb, _ = f.int8_vectorwise_quant(torch_of(w).to(torch.float16))
    ours = bnb.dump(jq.Int8().quantize(w))
    np.testing.assert_array_equal(ours["weight"], codes.numpy())
    np.testing.assert_array_equal(ours["SCB"], scb.numpy())


@pytest.mark.peers
def test_nested_map_equals_the_library():
    import bitsandbytes.functional as f

    np.testing.assert_array_equal(codebook4.dynamic_map(), f.create_dynamic_map().numpy())
