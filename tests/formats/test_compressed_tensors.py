"""compressed-tensors: random modules packed by slow, obvious numpy; load, dump and dequantize against it; every error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, assert_same, dense, held_bytes, named, read
from format_reading import compressed_tensors_config as config
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context
from jq.formats.compressed_tensors import FORMAT
from jq.formats.compressed_tensors_config import parse

NAME = "model.layers.0.self_attn.q_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
E4M3 = ml_dtypes.float8_e4m3fn
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dense_words(codes, bits):
    """Each row as one little-endian bit stream in int32 words."""
    rows = []
    for row in codes:
        total = sum(int(c) << (bits * i) for i, c in enumerate(row))
        rows.append([(total >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return np.array(rows, np.uint32).view(np.int32)


def padded_words(codes, bits):
    """32 // bits whole codes in each int32 word, as before version 0.13."""
    per = 32 // bits
    rows = []
    for row in codes:
        rows.append(
            [sum(int(c) << (bits * i) for i, c in enumerate(row[s : s + per])) for s in range(0, len(row), per)]
        )
    return np.array(rows, np.uint32).view(np.int32)


@st.composite
def integer_modules(draw):
    """(parts, args, version, expected weight, codes) of a pack-quantized module."""
    bits = draw(st.integers(1, 8))
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    n = draw(st.integers(1, 9))
    size = draw(st.sampled_from([1, 3, 4, 8]))
    k = size * draw(st.integers(1, 9)) if strategy == "group" else draw(st.integers(1, 70))
    symmetric = draw(st.booleans())
    old = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(FLOATS))
    half, groups = 1 << (bits - 1), {"tensor": 1, "channel": 1, "group": k // size}[strategy]
    codes = rng.integers(0, 2 * half, (n, k))
    rows = 1 if strategy == "tensor" else n
    scales = (rng.standard_normal((rows, groups)) * 0.01).astype(dtype)
    zeros = np.full((rows, groups), half) if symmetric else rng.integers(0, 2 * half, (rows, groups))
    index = np.arange(k) // size if strategy == "group" else np.zeros(k, int)
    if strategy == "group" and groups > 1 and draw(st.booleans()):
        index = rng.permutation(index)
    pack = padded_words if old else dense_words
    parts = {"weight_packed": pack(codes, bits), "weight_shape": np.array([n, k], np.int64)}
    parts["weight_scale"] = scales.reshape(1) if strategy == "tensor" else scales
    if not np.array_equal(index, np.arange(k) // size) and strategy == "group":
        parts["weight_g_idx"] = index.astype(np.int32)
    if not symmetric:
        stored = (
            pack(zeros.T, bits).T if rows == n and strategy != "tensor" else (zeros - half).astype(np.int8).reshape(1)
        )
        parts["weight_zero_point"] = np.ascontiguousarray(stored)
    elif old and draw(st.booleans()):  # older writers keep the zeros of symmetric schemes
        parts["weight_zero_point"] = np.zeros(parts["weight_scale"].shape, np.int8)
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        args["group_size"] = size
    difference = (codes - np.broadcast_to(zeros, (n, groups))[:, index]).astype(dtype)
    weight = difference * np.broadcast_to(scales, (n, groups))[:, index]
    return parts, args, "0.10.2" if old else "0.20.0", weight, codes


@settings(max_examples=60, deadline=None)
@given(integer_modules(), TURNS)
def test_packed_integers(module, turn):
    parts, args, version, weight, codes = module
    q = read(FORMAT, named(parts), config(args, version=version))[NAME]
    assert q.shape == weight.shape and q.bits == args["num_bits"]
    np.testing.assert_array_equal(np.asarray(q.unpack()), codes)
    assert_same(dense(q, turn), weight)
    stored = sum(v.nbytes for v in parts.values())
    rows = weight.shape[0]  # zero points start a byte in each row here, and share words over the rows in the file
    assert held_bytes(q) <= 1.02 * stored + 64 + rows


def test_zero_points_of_old_files_whose_rows_are_one_word():
    """Both packings have one word a row of codes and two for the zero points: the version decides."""
    codes, zeros = np.arange(7)[:, None], np.array([[3], [4], [9], [20], [31], [0], [1]])
    parts = {"weight_packed": padded_words(codes, 5), "weight_scale": np.ones((7, 1), np.float16)}
    parts["weight_shape"] = np.array([7, 1])
    parts["weight_zero_point"] = np.ascontiguousarray(padded_words(zeros.T, 5).T)
    args = {"num_bits": 5, "type": "int", "symmetric": False, "strategy": "channel"}
    q = read(FORMAT, named(parts), config(args, version="0.10.2"))[NAME]
    assert_same(q.dequantize(), (codes - zeros).astype(np.float16))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_int8_rows(data):
    """int-quantized: int8 also for narrower codes, which are held in their own width."""
    bits = data.draw(st.integers(2, 8))
    n, groups, size = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 4, 6]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    k, half = groups * size, 1 << (bits - 1)
    codes = rng.integers(-half, half, (n, k)).astype(np.int8)
    scales = rng.standard_normal((n, groups)).astype(ml_dtypes.bfloat16)
    args = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": False}
    zeros = rng.integers(-half, half, (n, groups)).astype(np.int8)
    parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
    q = read(FORMAT, named(parts), config(args, form="int-quantized"))[NAME]
    assert q.bits == bits
    np.testing.assert_array_equal(np.asarray(q.unpack()), codes)
    difference = codes.astype(int) - np.repeat(zeros, size, 1)
    assert_same(dense(q, data.draw(TURNS)), difference.astype(scales.dtype) * np.repeat(scales, size, 1))


def test_int8_codes_beyond_their_width_are_kept():
    parts = {"weight": np.array([[-128, 127, 7, -8]], np.int8), "weight_scale": np.ones((1, 1), np.float32)}
    q = read(FORMAT, named(parts), config({"num_bits": 4, "strategy": "channel"}, form="int-quantized"))[NAME]
    np.testing.assert_array_equal(np.asarray(q.unpack()), parts["weight"])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_float8(data):
    """Tensor, channel, group and ragged block scales; every code but NaN, -0 among them."""
    strategy = data.draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    n, k = data.draw(st.integers(1, 13)), 4 * data.draw(st.integers(1, 8))
    if strategy == "block":
        k = data.draw(st.integers(1, 40))
    rows, cols = {"tensor": (n, k), "channel": (1, k), "group": (1, 4), "block": (4, 16)}[strategy]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[(codes & 127) == 127] = 0x80
    grid = (-(-n // rows), -(-k // cols))
    scales = rng.standard_normal(grid).astype(data.draw(st.sampled_from(FLOATS)))
    args = {"num_bits": 8, "type": "float", "strategy": strategy}
    args |= {"group_size": 4} if strategy == "group" else {"block_structure": [4, 16]} if strategy == "block" else {}
    stored = scales.reshape(data.draw(st.sampled_from([(), (1,)]))) if strategy == "tensor" else scales
    parts = {"weight": codes.view(E4M3), "weight_scale": stored}
    q = read(FORMAT, named(parts), config(args, form="float-quantized"))[NAME]
    full = np.repeat(np.repeat(scales, rows, 0), cols, 1)[:n, :k]
    assert_same(dense(q, data.draw(TURNS)), codes.view(E4M3).astype(scales.dtype) * full)


def test_block_structure_as_a_string():
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}
    assert parse(config(args), Context()).groups[0].weights.block_structure == (128, 64)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32), TURNS)
def test_nvfp4(n, groups, seed, turn):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, 16 * groups)).astype(np.uint8)
    scales = np.abs(rng.standard_normal((n, groups)) * 20).astype(E4M3)
    whole = np.array([rng.uniform(0.1, 3000)], np.float32)
    parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales, "weight_global_scale": whole}
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    q = read(FORMAT, named(parts), config(args, form="nvfp4-pack-quantized"), "float16")[NAME]
    step = np.repeat(scales.astype(np.float32) / whole, 16, 1)
    assert_same(dense(q, turn), (FP4[codes] * step).astype(ml_dtypes.bfloat16))
    assert held_bytes(q) == sum(v.nbytes for v in parts.values())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mx_every_scale_byte(bits):
    """E8M0 scales from 2**-127 (subnormal results kept, which XLA would flush) to 2**128 = infinity."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (256, 32)).astype(np.uint8)
    scales = np.arange(256, dtype=np.uint8)[:, None]
    if bits == 8:
        codes[(codes & 127) == 127] = 0
        parts = {"weight": codes.view(E4M3), "weight_scale": scales}
        values = codes.view(E4M3).astype(np.float64)
    elif bits == 4:
        parts = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales}
        values = FP4[codes].astype(np.float64)
    else:
        words = sum(codes[:, i::4].astype(np.uint32) << (6 * i) for i in range(4))
        packed = np.stack([words & 255, words >> 8 & 255, words >> 16], -1).reshape(256, -1).astype(np.uint8)
        parts = {"weight_packed": packed, "weight_scale": scales}
        low = codes & 31
        e, m = low >> 3, low & 7
        values = np.where(codes & 32, -1.0, 1.0) * np.where(e == 0, m / 8, (1 + m / 8) * 2.0 ** (e.astype(int) - 1))
    args = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    q = read(FORMAT, named(parts), config(args, form="mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"))[
        NAME
    ]
    factor = 2.0 ** (scales.astype(np.float64) - 127)
    factor[255] = np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        want = (values * factor).astype(np.float32).astype(ml_dtypes.bfloat16)
    got = np.asarray(q.dequantize())
    nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


def test_frozen_weights_stay_floats():
    """quantization_status frozen: float weights with scales beside them are no compressed module."""
    tensors = named({"weight": np.ones((4, 8), np.float16), "weight_scale": np.ones((4, 1), np.float16)})
    cfg = config({"num_bits": 4, "strategy": "channel"}, form="dense", quantization_status="frozen")
    assert read(FORMAT, tensors, cfg) == {}


def w4(**changes):
    parts = {
        "weight_packed": np.zeros((4, 2), np.int32),
        "weight_scale": np.ones((4, 2), np.float16),
        "weight_shape": np.array([4, 16], np.int64),
    }
    return {k: v for k, v in {**parts, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (w4(weight_packed=np.zeros((4, 3), np.int32)), r"weight_packed: found shape \(4, 3\), expected \(4, 2\)"),
        (w4(weight_packed=np.zeros((4, 2), np.int64)), "weight_packed: found dtype int64"),
        (w4(weight_scale=np.ones((4, 3), np.float16)), r"weight_scale: found shape \(4, 3\), expected \(4, 2\)"),
        (w4(weight_scale=np.full((4, 2), np.nan, np.float16)), "scales: 8 of 8 values are not finite"),
        (w4(weight_shape=np.array([5, 16])), r"weight_shape: says \(5, 16\), but weight_packed has 4 rows"),
        (w4(weight_g_idx=np.full(16, 2, np.int32)), r"weight_g_idx: values 2..2 are outside 0..1"),
        (w4(weight_g_idx=np.arange(16)), "weight_g_idx: found dtype int64, expected int32"),
        (w4(weight_zero_point=np.ones((4, 2), np.int8)), "zero points other than 0, but config_groups says symmetric"),
    ],
)
def test_damaged_packed_module(parts, message):
    with pytest.raises(FormatError, match=rf"q_proj.*{message}"):
        read(FORMAT, named(parts), config({"num_bits": 4, "strategy": "group", "group_size": 8}))


def test_missing_tensors():
    cfg = config({"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False})
    with pytest.raises(FormatError, match=r"q_proj.weight_zero_point: missing"):
        read(FORMAT, named(w4()), cfg)
    with pytest.raises(FormatError, match=r"q_proj.weight_scale: missing"):
        read(FORMAT, named(w4(weight_scale=None)), cfg)
    with pytest.raises(FormatError, match=r"weight_scale: no weight"):
        read(FORMAT, named({"weight_scale": np.ones((4, 2), np.float16)}), cfg)
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    parts = {"weight": np.ones((2, 4), E4M3), "weight_scale": np.ones(1, np.float32)}
    with pytest.raises(FormatError, match=r"q_proj.input_scale: missing"):
        read(FORMAT, named(parts), config(static, static, form="float-quantized"))
    for wrong in (np.ones(2, np.float32), np.ones(0, np.float32)):
        with pytest.raises(FormatError, match=r"q_proj.input_scale: found shape .* expected one value"):
            read(FORMAT, named({**parts, "input_scale": wrong}), config(static, static, form="float-quantized"))


def test_layout_that_is_not_the_schemes():
    parts = {"weight": np.ones((2, 4), E4M3), "weight_scale": np.ones((2, 1), np.float32)}
    with pytest.raises(FormatError, match="the float layout, but config_groups says int8"):
        read(FORMAT, named(parts), config({"num_bits": 8, "strategy": "channel"}))


def test_no_scheme_matches():
    groups = {
        "a": {"targets": ["re:nothing"], "weights": {"num_bits": 4, "strategy": "channel"}},
        "b": {"targets": ["re:neither"], "weights": {"num_bits": 8, "strategy": "channel"}},
    }
    with pytest.raises(FormatError, match="no target of config_groups matches it"):
        read(FORMAT, named(w4()), {"config_groups": groups})


def test_set_padding_bits_survive():
    """Bits that no code uses: in dense words they stay in place, in whole-code words the words are carried."""
    words = np.array([[-1], [-1]], np.int32)
    parts = {"weight_packed": words, "weight_scale": np.ones((2, 1), np.float32), "weight_shape": np.array([2, 5])}
    q = read(FORMAT, named(parts), config({"num_bits": 3, "strategy": "channel"}))[NAME]
    np.testing.assert_array_equal(np.asarray(q.unpack()), np.full((2, 5), 7))


def test_input_of_the_kernel_is_what_is_stored():
    """The packed words of the dense layout are taken over without a copy."""
    words = np.arange(8, dtype=np.int32).reshape(4, 2)
    options = parse(config({"num_bits": 4, "strategy": "group", "group_size": 8}), Context())
    q = FORMAT.load(NAME, w4(weight_packed=words), options, Context())
    assert np.shares_memory(q.codes, words)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(
        [
            "W4A16",
            "W3A16",
            "W8A16",
            "W8A8",
            "W4A16_ASYM",
            "FP8_DYNAMIC",
            "FP8_BLOCK",
            "MXFP4A16",
            "MXFP6A16",
            "MXFP8A16",
            "NVFP4A16",
            "W4AFP8",
        ]
    ),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32),
)
def test_quantize_is_a_fixed_point(preset, dtype, seed):
    """Quantizing writes what reading reads; the error is that of the code's step; the config parses to the same scheme."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((5, 256)) * 0.02).astype(dtype)
    method = jq.CompressedTensors(preset)
    q = method.quantize(w, NAME)
    again = read(FORMAT, named(FORMAT.dump(q)), method.config(["lm_head"]))[NAME]
    assert_same(again.dequantize(), q.dequantize())
    step = {"W3": 0.3, "W4": 0.15, "W8": 0.02, "FP": 0.04, "NV": 0.15, "MX": 0.17}[preset[:2]]
    error = np.asarray(q.dequantize(np.float32)) - w.astype(np.float32)
    assert np.linalg.norm(error) < step * np.linalg.norm(w.astype(np.float32))
    assert parse(method.config(), Context()).groups[0].weights == method.scheme().weights


def test_quantize_refuses():
    w = np.ones((4, 100), np.float32)
    with pytest.raises(FormatError, match="in_features 100 is no multiple of group_size 128"):
        jq.CompressedTensors("W4A16").quantize(w, NAME)
    with pytest.raises(UnsupportedError, match="calibration"):
        jq.CompressedTensors("FP8").quantize(w, NAME)
    with pytest.raises(FormatError, match="integer weights only"):
        jq.CompressedTensors("FP8_DYNAMIC", group_size=32).quantize(w, NAME)
    assert jq.W4A16().preset == "W4A16" and jq.CompressedTensors("w4a16", group_size=-1).quantize(w).shape == (4, 100)


@pytest.mark.parametrize(
    ("inputs", "stored"),
    [
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, {}),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}, {"input_scale": np.full(1, 0.02, np.float32)}),
    ],
    ids=["dynamic", "static"],
)  # fmt: skip
def test_inputs_alone_are_quantized(tmp_path, inputs, stored):
    """A scheme without weights: the dense layer is a module for its inputs' sake, and saves as it was."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((8, 64)).astype(np.float32), rng.standard_normal((5, 64)).astype(np.float32)
    tensors = {f"{NAME}.weight": w, "model.norm.weight": np.ones(64, np.float32)}
    tensors |= {f"{NAME}.{key}": value for key, value in stored.items()}
    group = {"targets": ["Linear"], "weights": None, "input_activations": inputs}
    said = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}}
    state = jq.State(tensors, {"model_type": "llama", "quantization_config": said})
    jq.save(state, tmp_path)
    state = jq.load_state(tmp_path)
    q = state[f"{NAME}.weight"]
    # the library's symmetric int8: the range is 255 steps wide, codes from -128 to 127
    scale = stored.get("input_scale", np.abs(x).max(1, keepdims=True) / np.float32(127.5))
    codes = np.clip(np.rint(x / scale), -128, 127)
    np.testing.assert_allclose(jq.matmul(x, q), (codes * scale) @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jq.matmul(x, q, quantize_activations=False), x @ w.T, rtol=1e-5, atol=1e-5)
    saved = dict(state.stored())
    assert saved.keys() == tensors.keys() and all(np.array_equal(saved[n], tensors[n]) for n in tensors)
