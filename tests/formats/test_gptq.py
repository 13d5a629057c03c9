"""GPTQ: random modules packed by slow, obvious numpy; load, dump and dequantize against it; every error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats import gptq
from jq.formats.base import Context

NAME = "model.layers.0.self_attn.q_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


def stream(codes, bits, width=32):
    """Codes [C, K] as one little-endian bit stream per row in words of `width` bits: [C, ceil(K*bits/width)]."""
    rows = []
    for row in codes:
        total = sum(int(code) << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // width)
        rows.append([(total >> (width * i)) & ((1 << width) - 1) for i in range(count)])
    return np.array(rows, f"u{width // 8}").view(f"i{width // 8}")


def planar(codes, bits):
    """Codes [C, K], K a multiple of 32: per 32 codes the low plane, then the higher ones."""
    planes = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    rows = []
    for row in codes:
        words = []
        for start in range(0, len(row), 32):
            offset = 0
            for width in planes:
                for word in range(width):
                    per = 32 // width
                    part = [int(c) >> offset & ((1 << width) - 1) for c in row[start + word * per :][:per]]
                    words.append(sum(p << (width * i) for i, p in enumerate(part)))
                offset += width
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def stored_zeros(zeros, bits, rule, width=32):
    """qzeros [groups, words] of zeros [groups, N]."""
    if rule == "v1-field" or (rule == "v1-word" and bits == 3):
        return stream((zeros - 1) % (1 << bits), bits, width)
    words = stream(zeros, bits, width)
    if rule == "v1-word":
        one = sum(1 << i for i in range(0, width, bits))
        words = ((words.view(f"u{width // 8}").astype(object) - one) % (1 << width)).astype(f"u{width // 8}")
        words = words.view(f"i{width // 8}")
    return words


@st.composite
def modules(draw):
    """(parts, options, codes, zeros, scales, g_idx) of a random module."""
    is_planar = draw(st.booleans())
    bits = draw(st.sampled_from((2, 3, 4, 5, 6, 7, 8) if is_planar else (2, 3, 4, 8)))
    word = "int32" if is_planar or bits == 3 else draw(st.sampled_from(("int32",) * 5 + ("int8", "int16", "int64")))
    width = 8 * np.dtype(word).itemsize
    packed_planes = is_planar and bits in (3, 5, 6, 7)
    k = 32 * draw(st.integers(1, 4)) if packed_planes or width == 64 or bits == 3 else draw(st.integers(1, 80))
    n = 32 * draw(st.integers(1, 2)) if packed_planes else draw(st.integers(1, 40))
    size = draw(st.sampled_from((-1, 16, 24, 32, 128)))
    group = k if size == -1 else size
    groups = -(-k // group)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 1 << bits, (n, k))
    sym = draw(st.booleans())
    zeros = np.full((groups, n), 1 << (bits - 1)) if sym else rng.integers(0, 1 << bits, (groups, n))
    scales = rng.normal(size=(groups, n)).astype(draw(st.sampled_from(FLOATS)))
    order = draw(st.sampled_from(("none", "trivial", "random", "int64")))
    plain = np.arange(k) // group
    index = {"none": None, "trivial": plain, "random": rng.permutation(plain), "int64": plain}[order]
    rule = "v2" if is_planar else draw(st.sampled_from(("v2", "v1-word", "v1-field")))
    if order == "none" and k * bits % width:
        order, index = "trivial", plain  # without g_idx in_features is what fills the words
    parts = {"scales": scales}
    if packed_planes:
        parts["qweight"], parts["qzeros"] = planar(codes, bits).T, planar(zeros, bits)
    else:
        parts["qweight"] = stream(codes, bits, width).T
        parts["qzeros"] = stored_zeros(zeros, bits, rule, width)
    parts["qweight"] = np.ascontiguousarray(parts["qweight"])
    if index is not None:
        parts["g_idx"] = index.astype(np.int64 if order == "int64" else np.int32)
    options = gptq.Options(bits, size, sym, planar=is_planar, zeros=rule, word=word)
    return parts, options, codes, zeros, scales, plain if index is None else index


@settings(max_examples=40, deadline=None)
@given(modules(), TURNS)
def test_load_and_dump_invert_slow_packing(module, turn):
    parts, options, codes, zeros, scales, index = module
    q = gptq.load(NAME, parts, options, Context())
    assert q.shape == codes.shape
    np.testing.assert_array_equal(q.unpack(), codes)
    if q.zeros is not None:
        np.testing.assert_array_equal(np.transpose(q.group_zeros()), zeros)
    weights = (scales[index] * (codes.T - zeros[index]).astype(scales.dtype)).T
    got = dense(q, turn)
    assert got.dtype == scales.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), np.ascontiguousarray(weights).view(f"u{got.itemsize}"))
    again = gptq.dump(q)
    assert again.keys() == parts.keys()
    for suffix, array in parts.items():
        assert again[suffix].dtype == array.dtype, suffix
        np.testing.assert_array_equal(np.asarray(again[suffix]), array, err_msg=suffix)


@settings(max_examples=60, deadline=None)
@given(modules(), st.integers(0, 2**32 - 1))
def test_any_bits_come_back(module, seed):
    """Words of random bits, padding included, and signed zeros in scales: nothing is normalised on the way."""
    parts, options, *_ = module
    rng = np.random.default_rng(seed)
    noisy = dict(parts)
    noisy["qzeros"] = rng.integers(-(2**31), 2**31, parts["qzeros"].shape).astype(parts["qzeros"].dtype)
    noisy["qweight"] = rng.integers(-(2**31), 2**31, parts["qweight"].shape).astype(parts["qweight"].dtype)
    noisy["scales"] = np.where(rng.random(parts["scales"].shape) < 0.2, -0.0, parts["scales"]).astype(
        parts["scales"].dtype
    )
    if options.planes and "g_idx" in noisy and len(noisy["g_idx"]) % 32:
        return
    again = gptq.dump(gptq.load(NAME, noisy, options, Context()))
    for suffix, array in noisy.items():
        assert again[suffix].tobytes() == array.tobytes(), suffix


def test_tensor_holds_no_second_copy():
    parts = module(bits=4, k=2048, n=256, group=128)
    q = gptq.load(NAME, parts, gptq.Options(4, 128, False), Context())
    assert q.nbytes <= 1.02 * sum(a.nbytes for a in parts.values())


def test_layers_share_static_fields():
    """Two layers of one model, different numbers: one compilation."""
    import jax

    rng = np.random.default_rng(1)
    qs = [
        gptq.load(f"model.layers.{i}.mlp.up_proj", module(rng=rng), gptq.Options(4, 32, False), Context())
        for i in (0, 1)
    ]
    assert jax.tree.structure(qs[0]) == jax.tree.structure(qs[1])


def module(bits=4, k=64, n=32, group=32, rng=None):
    rng = rng or np.random.default_rng(0)
    groups = -(-k // group)
    return {
        "qweight": np.ascontiguousarray(stream(rng.integers(0, 1 << bits, (n, k)), bits).T),
        "qzeros": stream(rng.integers(0, 1 << bits, (groups, n)), bits),
        "scales": rng.normal(size=(groups, n)).astype(np.float16),
        "g_idx": (np.arange(k) // group).astype(np.int32),
    }


def nan_scales(parts):
    parts["scales"][1, 3] = np.nan


def index_out_of_range(parts):
    parts["g_idx"][5] = 2


BROKEN = {
    "no qzeros": (lambda p: p.pop("qzeros"), r"q_proj\.qzeros: missing; the module has only g_idx, qweight, scales"),
    "no scales": (lambda p: p.pop("scales"), r"q_proj\.scales: missing"),
    "half of qweight": (
        lambda p: p.update(qweight=p["qweight"][:4]),
        r"q_proj\.qweight: found shape \(4, 32\), expected \(8, 32\).*in_features 64.*bits 4",
    ),
    "qweight columns": (
        lambda p: p.update(qweight=p["qweight"][:, :24]),
        r"q_proj\.scales: found shape \(2, 32\), expected \(groups, 24\)",
    ),
    "groups": (
        lambda p: p.update(scales=p["scales"][:1], qzeros=p["qzeros"][:1]),
        r"q_proj\.scales: found shape \(1, 32\), expected \(2, 32\).*group_size \(32\)",
    ),
    "qzeros": (
        lambda p: p.update(qzeros=p["qzeros"][:, :3]),
        r"q_proj\.qzeros: found shape \(2, 3\), expected \(2, 4\)",
    ),
    "g_idx range": (index_out_of_range, r"q_proj\.g_idx: values 0\.\.2 are outside 0\.\.1"),
    "g_idx zeros": (
        lambda p: p.update(g_idx=np.zeros_like(p["g_idx"])),
        r"q_proj\.g_idx: found 0 for all 64 inputs, expected each of 2 groups of 32 in use",
    ),
    "g_idx length": (lambda p: p.update(g_idx=p["g_idx"][:32]), r"q_proj\.qweight: found shape \(8, 32\), expected \(4, 32\)"),
    "g_idx float": (lambda p: p.update(g_idx=p["g_idx"].astype(np.float32)), r"q_proj\.g_idx: found float32\[64\]"),
    "nan": (nan_scales, r"q_proj\.scales: 1 of 64 values are not finite \(first at \(1, 3\)\)"),
    "dtype": (lambda p: p.update(qweight=p["qweight"].astype(np.int64)), r"q_proj\.qweight: found dtype int64, expected int32"),
    "scales dtype": (lambda p: p.update(scales=p["scales"].astype(np.int8)), r"q_proj\.scales: found dtype int8"),
    "one axis": (lambda p: p.update(scales=p["scales"].reshape(-1)), r"q_proj\.scales: found shape \(64,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_modules_are_refused(case):
    change, text = BROKEN[case]
    parts = module()
    change(parts)
    with pytest.raises(FormatError, match=text):
        gptq.load(NAME, parts, gptq.Options(4, 32, True), Context(label="dir"))


def test_group_size_that_does_not_fit_without_g_idx():
    parts = module()
    del parts["g_idx"]
    with pytest.raises(FormatError, match=r"q_proj\.scales: found shape \(2, 32\), expected \(4, 32\)"):
        gptq.load(NAME, parts, gptq.Options(2, 32, True), Context())


def parse(**config):
    return gptq.parse({"bits": 4, "group_size": 32, **config}, Context(label="here"))


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"desc_act": True}, True),
        ({"desc_act": True, "group_size": 64}, False),  # one group
        ({"desc_act": True, "group_size": -1}, False),
        ({"desc_act": True, "static_groups": True}, False),
        ({"desc_act": True, "meta": {"static_groups": True}}, False),
        ({"desc_act": True, "dynamic": {"+:m": {"desc_act": False}}}, False),
        ({"dynamic": {"+:m": {"desc_act": True}}}, True),
        ({"dynamic": {"+:other": {"desc_act": True}}}, False),
        ({}, False),
    ],
)
def test_activation_order_needs_its_index(config, needed):
    options = parse(**config)
    size = config.get("group_size", 32)
    parts = module(group=64 if size == -1 else size)
    del parts["g_idx"]
    if needed:
        with pytest.raises(FormatError, match=r"m[.]g_idx: missing; by quantization_config[.]desc_act"):
            gptq.load("m", parts, options, Context())
    else:
        assert gptq.load("m", parts, options, Context()).g_idx is None


def test_config_spellings():
    assert parse().zeros == "v1-field"
    assert parse(meta={"quantizer": ["gptqmodel:7.7.0"]}).zeros == "v1-word"
    assert parse(meta={"quantizer": "gptqmodel:1.0"}).zeros == "v1-word"
    assert parse(checkpoint_format="gptq_v2").zeros == "v2"
    assert parse(format="gptq_v2").zeros == "v2"
    assert parse(format="gptq", checkpoint_format="gptq_v2").zeros == "v2"
    assert parse(checkpoint_format="gptq_p", bits=5).planar
    assert gptq.parse({"wbits": "4", "q_group_size": -1}, Context()).group_size == -1
    assert parse(pack_dtype="torch.int16").word == "int16"


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"bits": None}, FormatError, "neither config.json .* nor quantize_config.json says how many bits"),
        ({"bits": 5}, UnsupportedError, "here: GPTQ with 5 bits; checkpoint_format 'gptq' has 2, 3, 4, 8"),
        ({"bits": "four"}, FormatError, "bits is 'four', expected an integer"),
        ({"group_size": 0}, FormatError, "group_size is 0, expected -1 or a positive"),
        ({"checkpoint_format": "bitblas"}, UnsupportedError, "'bitblas' is a kernel's own order"),
        ({"is_marlin_format": True, "bits": 8}, UnsupportedError, "GPTQ with 8 bits; checkpoint_format 'marlin' has 4"),
        ({"checkpoint_format": "bitblas"}, UnsupportedError, "'bitblas'"),
        ({"rotation": "hadamard"}, UnsupportedError, "rotation = 'hadamard': the inputs of each layer are rotated"),
        ({"pack_dtype": "float32"}, UnsupportedError, "pack_dtype 'float32'"),
        ({"dynamic": ["a"]}, FormatError, "dynamic is list"),
        ({"dynamic": {"+:(": {}}}, FormatError, r"dynamic pattern '\+:\(' is no regular expression"),
        ({"dynamic": {"a": {"bits": 9}}}, UnsupportedError, "dynamic 'a': GPTQ with 9 bits"),
        ({"dynamic": {"a": {"method": "exl3"}}}, UnsupportedError, "method 'exl3'"),
    ],
)
def test_config_errors(config, error, text):
    with pytest.raises(error, match=text):
        parse(**config)


def test_dynamic_rules():
    o = parse(
        dynamic={
            "+:.*\\.down_proj": {"bits": 8, "group_size": 64},
            "model\\.layers\\.1\\..*": {"sym": False},
            "-:.*\\.k_proj": {},
            "lm_head": {"group_size": -1},
        }
    )
    assert (o.of("model.layers.1.mlp.down_proj").bits, o.of("model.layers.1.mlp.down_proj").group_size) == (8, 64)
    assert o.of("model.layers.1.mlp.up_proj").sym is False
    assert o.of("lm_head").group_size == -1
    assert o.of("model.layers.0.mlp.up_proj") == o
    assert o.rules[0] == (".*\\.k_proj", None)  # skips come first


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    sym=st.booleans(),
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    size=st.sampled_from((-1, 5, 16, 32, 128)),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32 - 1),
    turn=TURNS,
)
def test_rtn_is_within_half_a_step(bits, sym, n, k, size, scale_dtype, dtype, seed, turn):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(n, k)) * 10.0 ** rng.integers(-2, 2)).astype(dtype)
    w[rng.random(n) < 0.2] = 0
    if rng.random() < 0.2:
        w = np.abs(w)  # GPTQ's own rule would halve the scale of groups without a negative weight
    q = jq.RTN(bits, size, sym, scale_dtype).quantize(w)
    group = k if size == -1 else min(size, k)
    step = np.repeat(np.asarray(q.scales, np.float32), group, axis=1)[:, :k]
    error = np.abs(dense(q, turn).astype(np.float32) - w.astype(np.float32))
    # Half a step, and what the rounding of the scale, the zero point and the product adds.
    slack = 2.0 ** {"float16": -10, "bfloat16": -7, "float32": -20}[scale_dtype]
    assert (error <= step * (0.5 + (0.5 if not sym else 0) + 2 ** (bits + 1) * slack) + 1e-6).all()
    parts = gptq.dump(q)
    assert all(np.array_equal(a, b) for a, b in zip(parts.values(), gptq.dump(q.to_jax()).values()))


def test_rtn_refuses():
    with pytest.raises(UnsupportedError, match="RTN: GPTQ storage has 2, 3, 4 or 8 bits, got 5"):
        jq.RTN(bits=5)
    with pytest.raises(ValueError, match="group_size must be -1 or positive, got 0"):
        jq.RTN(group_size=0)
    with pytest.raises(ValueError, match=r"a\.b: holds values that are not finite"):
        jq.RTN().quantize(np.array([[1.0, np.inf]], np.float32), "a.b")
    with pytest.raises(ValueError, match="overflow float16; use scale_dtype='bfloat16'"):
        jq.RTN(2).quantize(np.array([[1e6, -1e6]], np.float32))
