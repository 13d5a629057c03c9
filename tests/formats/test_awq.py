"""AWQ: random modules packed by slow, obvious numpy; load, dump and dequantize against it; every error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st

from jq.errors import FormatError, UnsupportedError
from jq.formats import awq
from jq.formats.base import Context

NAME = "model.layers.0.mlp.up_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16)


def gemm_words(codes):
    """int32[R, C / 8]: nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    rows = []
    for row in codes:
        words = []
        for start in range(0, len(row), 8):
            eight = list(row[start : start + 8]) + [0] * 7
            words.append(sum(int(eight[c]) << (4 * i) for i, c in enumerate([0, 2, 4, 6, 1, 3, 5, 7])))
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def stream(codes, bits):
    """int32[R, ceil(C * bits / 32)]: one little-endian bit stream per row."""
    rows = []
    for row in codes:
        total = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append([(total >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return np.array(rows, np.uint32).view(np.int32)


def fast_words(codes):
    """int16[N / 4, K]: the interleave of AutoAWQ's `pack_intweight`, element by element."""
    n, k = codes.shape
    order = np.arange(32).reshape(4, 4, 2).swapaxes(0, 1).reshape(32)
    order = order.reshape(4, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(32)
    moved = np.concatenate([codes[:, s : s + 32][:, order] for s in range(0, k, 32)], axis=1)
    words = np.zeros((n // 4, k), np.uint16)
    for i in range(n // 4):
        flat = np.concatenate([moved[4 * i : 4 * i + 4, s : s + 64].reshape(-1) for s in range(0, k, 64)])
        for j, four in enumerate(flat.reshape(-1, 4)):
            words[i, j] = sum(int(c) << (4 * b) for b, c in enumerate(four))
    return words.view(np.int16)


@st.composite
def modules(draw):
    """(parts, options, codes, zeros, scales, group) of a random module of any storage."""
    version = draw(st.sampled_from(("gemm", "gemv", "gemv_fast", "llm-awq")))
    fast = version in ("gemv_fast", "llm-awq")
    bits = draw(st.sampled_from((2, 3, 4, 4, 4, 5, 6, 7, 8))) if version == "gemm" else 4
    size = draw(st.sampled_from((-1, 8, 16, 32, 64, 128) if version == "gemm" else (-1, 32, 64, 128)))
    unit = 64 if fast else 8
    k = (unit if size == -1 else max(size, unit)) * draw(st.integers(1, 3))
    group = k if size == -1 else size
    n = 4 * draw(st.integers(1, 5)) if fast else draw(st.integers(1, 40))
    groups = k // group
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 1 << bits, (n, k))
    sym = version == "gemm" and draw(st.booleans())
    zeros = np.full((n, groups), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (n, groups))
    scales = (rng.normal(size=(n, groups)) * 0.01).astype(draw(st.sampled_from(FLOATS)))
    pad = 8 * awq.padded_words(groups, group) - groups
    if version == "gemm":
        pack = gemm_words if bits == 4 else lambda c: stream(c, bits)
        parts = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    elif version == "gemv":
        parts = {
            "qweight": stream(codes, 4),
            "qzeros": stream(np.pad(zeros, ((0, 0), (0, pad))), 4),
            "scales": np.pad(scales, ((0, 0), (0, pad))),
        }
    else:
        scaled = -(scales * zeros.astype(scales.dtype))
        parts = {
            "qweight": fast_words(codes),
            "scales": np.ascontiguousarray(np.pad(scales, ((0, 0), (0, pad))).T),
            awq.zeros_name(version): np.ascontiguousarray(np.pad(scaled, ((0, 0), (0, pad))).T),
        }
    return parts, awq.Options(bits, size, version, sym), codes, zeros, scales, group


@settings(max_examples=40, deadline=None)
@given(modules(), TURNS)
def test_load_and_dump_invert_slow_packing(module, turn):
    parts, options, codes, zeros, scales, group = module
    q = awq.load(NAME, parts, options, Context())
    np.testing.assert_array_equal(q.unpack(), codes)
    index = np.arange(codes.shape[1]) // group
    if options.version in ("gemm", "gemv"):
        want = scales[:, index] * (codes - zeros[:, index]).astype(scales.dtype)
    else:  # one rounding: the sum is exact in float64
        scaled = (-(scales * zeros.astype(scales.dtype))).astype(np.float64)
        want = (codes * scales.astype(np.float64)[:, index] + scaled[:, index]).astype(scales.dtype)
    got = dense(q, turn)
    assert got.dtype == scales.dtype
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    again = awq.dump(q.to_jax())
    assert again.keys() == parts.keys()
    for suffix, array in parts.items():
        assert np.asarray(again[suffix]).tobytes() == array.tobytes() and again[suffix].shape == array.shape, suffix
        assert again[suffix].dtype == array.dtype


@settings(max_examples=60, deadline=None)
@given(modules(), st.integers(0, 2**32 - 1))
def test_any_bits_come_back(module, seed):
    """Words of random bits, padding of rows and groups included."""
    parts, options, *_ = module
    rng = np.random.default_rng(seed)
    noisy = {}
    for suffix, array in parts.items():
        noise = rng.integers(0, 256, array.nbytes, np.uint8).view(array.dtype).reshape(array.shape)
        noisy[suffix] = noise if array.dtype.kind == "i" else np.where(rng.random(array.shape) < 0.3, -0.0, array)
        noisy[suffix] = noisy[suffix].astype(array.dtype)
    again = awq.dump(awq.load(NAME, noisy, options, Context()))
    for suffix, array in noisy.items():
        assert again[suffix].tobytes() == array.tobytes(), suffix


def module(version="gemm", k=128, n=32, group=64):
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // group))
    scales = rng.normal(size=zeros.shape).astype(np.float16)
    pad = ((0, 0), (0, 8 * awq.padded_words(k // group, group) - k // group))
    if version == "gemm":
        return {"qweight": gemm_words(codes.T), "qzeros": gemm_words(zeros.T), "scales": np.ascontiguousarray(scales.T)}
    if version == "gemv":
        return {"qweight": stream(codes, 4), "qzeros": stream(np.pad(zeros, pad), 4), "scales": np.pad(scales, pad)}
    wide = np.ascontiguousarray(np.pad(scales, pad).T)
    return {"qweight": fast_words(codes), "scales": wide, "qzeros": -wide}


def infinite(parts):
    parts["scales"][0, 0] = np.inf


BROKEN = {
    "no qzeros": ("gemm", lambda p: p.pop("qzeros"), r"up_proj\.qzeros: missing"),
    "no scales": ("gemm", lambda p: p.pop("scales"), r"up_proj\.scales: missing"),
    "no qweight": ("gemm", lambda p: p.pop("qweight"), r"up_proj\.qweight: missing"),
    "rows": (
        "gemm",
        lambda p: p.update(qweight=p["qweight"][:64]),
        r"up_proj\.scales: found shape \(2, 32\), expected \(1, 32\).*in_features 64 in groups of 64",
    ),
    "bits": (
        "gemm",
        lambda p: p.update(qweight=p["qweight"][:, :3]),
        r"up_proj\.qweight: found shape \(128, 3\), expected \(128, 4\)",
    ),
    "zeros": ("gemm", lambda p: p.update(qzeros=p["qzeros"][:1]), r"up_proj\.qzeros: found shape \(1, 4\), expected \(2, 4\)"),
    "infinite": ("gemm", infinite, r"up_proj\.scales: 1 of 64 values are not finite"),
    "dtype": ("gemm", lambda p: p.update(qweight=p["qweight"].astype(np.int64)), r"up_proj\.qweight: found dtype int64"),
    "gemv scales": ("gemv", lambda p: p.update(scales=p["scales"][:, :8]), r"up_proj\.qzeros: found shape \(32, 2\), expected \(32, 1\)"),
    "gemv rows": ("gemv", lambda p: p.update(scales=p["scales"][:16]), r"up_proj\.scales: found shape \(16, 16\), expected \(32, 16\)"),
    "fast zeros": ("gemv_fast", lambda p: p.update(qzeros=p["qzeros"][:8]), r"up_proj\.qzeros: found shape \(8, 32\), expected \(16, 32\)"),
    "fast zeros missing": ("gemv_fast", lambda p: p.pop("qzeros"), r"up_proj\.qzeros: missing.*-\(scale \* zero\)"),
    "fast int32": ("gemv_fast", lambda p: p.update(qweight=p["qweight"].astype(np.int32)), r"up_proj\.qweight: found int32"),
    "fast width": ("gemv_fast", lambda p: p.update(qweight=p["qweight"][:, :100]), r"expected in_features in multiples of 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_modules_are_refused(case):
    version, change, text = BROKEN[case]
    parts = module(version)
    change(parts)
    with pytest.raises(FormatError, match=text):
        awq.load(NAME, parts, awq.Options(4, 64, version), Context(label="dir"))


def test_group_that_does_not_divide():
    with pytest.raises(FormatError, match=r"in_features 128 is not a multiple of quantization_config\.group_size 48"):
        awq.load(NAME, module(), awq.Options(4, 48), Context())


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_held_bytes(version):
    parts = module(version, k=1024, n=64)
    q = awq.load(NAME, parts, awq.Options(4, 64, version), Context())
    assert q.nbytes <= 1.02 * sum(a.nbytes for a in parts.values())


def parse(**config):
    return awq.parse(config, Context(label="here"))


def test_config_spellings():
    assert parse() == awq.Options(4, 128, "gemm", False)
    assert parse(w_bit=4, q_group_size=64, version="GEMV").version == "gemv"
    assert parse(w_bit=4, q_group_size=64).group_size == 64
    assert parse(version="gemv", backend="llm-awq").version == "llm-awq"
    assert parse(format="gemv_fast").version == "gemv_fast"
    assert parse(zero_point=False).sym
    assert parse(version="exllama").version == "gemm"


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"version": "qqq"}, UnsupportedError, "here: AWQ version 'qqq' is a kernel's own order"),
        ({"version": "gemv", "bits": 3}, UnsupportedError, "here: AWQ gemv with 3 bits"),
        ({"bits": 9}, UnsupportedError, "AWQ gemm with 9 bits"),
        ({"group_size": 0}, FormatError, "group_size is 0"),
        ({"group_size": "many"}, FormatError, "group_size is 'many', expected an integer"),
    ],
)
def test_config_errors(config, error, text):
    with pytest.raises(error, match=text):
        parse(**config)


def test_scaled_activations_stay_arrays():
    names = ["m.0.mlp.act.scales", "m.0.mlp.c_fc.qweight", "m.0.mlp.c_fc.qzeros", "m.0.mlp.c_fc.scales", "m.0.x.scales"]
    found = awq.group(names, awq.Options(), Context())
    assert sorted(found) == ["m.0.mlp.c_fc", "m.0.x"]  # a lone `scales` of no activation is a damaged module
