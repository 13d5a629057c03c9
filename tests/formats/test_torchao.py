"""torchao: each tensor class packed by slow, obvious numpy; metadata; stacked experts; activations; every error."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, assert_same, context_of, dense, held_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import activations
from jq.errors import FormatError, UnsupportedError
from jq.formats import torchao
from jq.formats.torchao_mx import swizzle

BF, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FLOATS = (np.float16, BF, np.float32)
NAME = "model.layers.0.mlp.up_proj.weight"
CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "AnyConfig", "_version": 2, "_data": {}}}}


def dtype_of(dtype):
    return {"_type": "torch.dtype", "_data": np.dtype(dtype).name}


def stored(kind, parts, attributes, name=NAME):
    """Tensors and metadata as torchao flattens one parameter."""
    module, last = name.rsplit(".", 1)
    entry = {"_type": kind, "_data": attributes, "_tensor_data_names": list(parts)}
    metadata = {"tensor_names": json.dumps([name, "norm.weight"]), name: json.dumps(entry), "format": "pt"}
    metadata["norm.weight"] = json.dumps({"_type": "Tensor"})
    return {f"{module}._{last}_{k}": v for k, v in parts.items()}, metadata


def read(tensors, metadata, config=CONFIG):
    """{parameter: QTensor}; dump must give every tensor back byte for byte."""
    context = dataclasses.replace(context_of(tensors), metadata=metadata)
    options = torchao.parse(config, context)
    found = {}
    for name, names in torchao.group(list(tensors), options, context).items():
        q = found[name] = torchao.load(name, {s: tensors[n] for s, n in names.items()}, options, context)
        prefix = name.removesuffix(".weight")
        back = {torchao.join(prefix, s): a for s, a in torchao.dump(q).items()}
        assert set(back) == set(names.values())
        for n, array in back.items():
            assert_same(array, tensors[n], n)
    return found


def one(kind, parts, attributes, name=NAME):
    q = read(*stored(kind, parts, attributes, name))[name]
    assert held_bytes(q) <= 1.02 * sum(p.nbytes for p in parts.values()) + 64
    return q


def spread(params, shape):
    """One parameter a block as one an element."""
    return np.repeat(np.repeat(params, shape[0] // params.shape[0], 0), shape[1] // params.shape[1], 1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_integers(data):
    bits = data.draw(st.integers(1, 8))
    is_int8 = data.draw(st.booleans()) and bits == 8
    r, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    n, k = r * data.draw(st.integers(1, 4)), c * data.draw(st.integers(1, 4))
    dtype, scale_dtype = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (n, k)).astype(np.int8)
    scale = rng.normal(size=(n // r, k // c)).astype(scale_dtype)
    zero = rng.integers(-128, 128, scale.shape).astype(np.int8)
    attributes = {"block_size": [r, c], "dtype": dtype_of(dtype)}
    parts = {"qdata": codes, "scale": scale, "zero_point": zero}
    if is_int8:
        attributes |= {"act_quant_kwargs": None, "reduce_range": False}
        parts = dict(reversed(parts.items()))  # the order of the metadata is the library's own
        if data.draw(st.booleans()):
            parts.pop("zero_point")
            zero = np.zeros_like(zero)
    else:
        attributes |= {"target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}, "activation_quantization": None}
    q = one("Int8Tensor" if is_int8 else "IntxUnpackedToInt8Tensor", parts, attributes)
    difference = codes.astype(np.int32) - spread(zero, (n, k)).astype(np.int32)
    wide = scale_dtype if scale_dtype is dtype else np.float32
    want = (difference.astype(dtype).astype(wide) * spread(scale, (n, k)).astype(wide)).astype(dtype)
    assert_same(dense(q, data.draw(TURNS)), want)
    np.testing.assert_array_equal(np.asarray(q.unpack()), codes)


def test_small_integers_are_held_small():
    codes = np.zeros((16, 64), np.int8)
    parts = {"qdata": codes, "scale": np.ones((16, 1), BF), "zero_point": np.zeros((16, 1), np.int8)}
    attributes = {
        "target_dtype": {"_type": "torch.dtype", "_data": "int3"},
        "block_size": [1, 64],
        "dtype": dtype_of(BF),
    }
    assert one("IntxUnpackedToInt8Tensor", parts, {**attributes, "activation_quantization": None}).codes.nbytes == 384


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_floats(data):
    kind = data.draw(st.sampled_from((E4M3, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz)))
    r, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    n, k = r * data.draw(st.integers(1, 3)), c * data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes, scale = rng.normal(size=(n, k)).astype(kind), rng.normal(size=(n // r, k // c)).astype(np.float32)
    attributes = {"block_size": [r, c], "mm_config": None, "act_quant_kwargs": None, "dtype": dtype_of(dtype)}
    q = one("Float8Tensor", {"qdata": codes, "scale": scale}, attributes)
    want = (codes.astype(np.float32) * spread(scale, (n, k))).astype(dtype)
    assert_same(dense(q, data.draw(TURNS)), want)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_plain_int4(data):
    group, n = data.draw(st.sampled_from((8, 16, 32))), data.draw(st.integers(1, 9))
    k = group * data.draw(st.integers(1, 3))
    words = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from((np.float16, BF)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 16, (n, k))
    packed = np.zeros((n, k // 2), np.uint8)
    for j in range(k // 2):
        packed[:, j] = codes[:, 2 * j] | codes[:, 2 * j + 1] << 4
    scale = rng.normal(size=(k // group, n)).astype(dtype)
    attributes = {"block_size": [1, group], "shape": [n, k]}
    wide = spread(scale.T, (n, k))
    if words:
        zero = rng.integers(0, 16, scale.shape).astype(np.int8)
        parts = {"qdata": packed.view(np.int32), "scale": scale, "zero_point": zero}
        q = one("Int4PlainInt32Tensor", parts, attributes)
        want = ((codes - spread(zero.T, (n, k))).astype(dtype) * wide).astype(dtype)
    else:
        zero = rng.normal(size=scale.shape).astype(dtype)
        parts = {"qdata": packed.view(np.int8), "scale": scale, "zero_point": zero}
        q = one("Int4Tensor", parts, {**attributes, "activation_dtype": dtype_of(BF)})
        signed = np.where(codes > 7, codes - 16, codes)
        want = (signed * wide.astype(np.float32) + spread(zero.T, (n, k)).astype(np.float32)).astype(dtype)
    assert_same(q.to_numpy().dequantize(), want)


def tile_slowly(codes):
    """Codes [N, K] in tinygemm's tiles, nibble by nibble."""
    n, k = codes.shape
    words = np.zeros((n // 8, k // 128, 32, 4), np.uint64)
    for row in range(n):
        for column in range(k):
            i, inside = column % 128 // 32, column % 32
            p, t, h = inside // 8, 4 * (row % 8) + inside % 8 // 2, inside % 2
            words[row // 8, column // 128, t, i] |= np.uint64(int(codes[row, column]) << (4 * (4 * h + p)))
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("n, k, group", ((16, 1024, 64), (13, 200, 32), (8, 1000, 128), (1, 64, 256), (5, 1030, 32)))
def test_tile_packed_int4(n, k, group):
    rng = np.random.default_rng(n)
    padded = -(-n // 8) * 8, -(-k // 1024) * 1024
    codes = rng.integers(0, 16, padded)
    both = rng.normal(size=(padded[1] // group, padded[0], 2)).astype(BF)
    parts = {"qdata": tile_slowly(codes), "scale_and_zero": both}
    q = one("Int4TilePackedTo4dTensor", parts, {"block_size": [1, group], "shape": [n, k]})
    assert q.shape == (n, k)
    scale, zero = (spread(both[..., i].T, padded).astype(np.float32) for i in (0, 1))
    product = ((codes - 8) * scale).astype(BF)  # two roundings
    assert_same(q.to_numpy().dequantize(), (product.astype(np.float32) + zero).astype(BF)[:n, :k])


def blocked_slowly(scale):
    height, width = scale.shape
    out = np.zeros((-(-height // 128), -(-width // 4), 512), np.uint8)
    for r in range(height):
        for c in range(width):
            out[r // 128, c // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scale[r, c]
    return out


@pytest.mark.parametrize("swizzled", (False, True))
@pytest.mark.parametrize("kind", ("float8_e4m3fn", "fp6_e2m3", "float4_e2m1fn_x2", "nvfp4"))
def test_microscaling(kind, swizzled):
    rng = np.random.default_rng(2)
    n, k, size = 130, 96, 16 if kind == "nvfp4" else 32
    four = kind in ("float4_e2m1fn_x2", "nvfp4")
    codes = rng.integers(0, {"float8_e4m3fn": 0x7F, "fp6_e2m3": 64}.get(kind, 16), (n, k)).astype(np.uint8)
    grid = {"fp6_e2m3": ml_dtypes.float6_e2m3fn, "float8_e4m3fn": E4M3}.get(kind, ml_dtypes.float4_e2m1fn)
    values = codes.view(grid).astype(np.float32)
    qdata = codes[:, 0::2] | codes[:, 1::2] << 4 if four else codes
    qdata = qdata.view(E4M3) if kind == "float8_e4m3fn" else qdata
    raw = rng.integers(100, 120, (n, k // size)).astype(np.uint8)
    scale = blocked_slowly(raw).reshape(-1, 16) if swizzled else raw
    if swizzled:
        assert_same(swizzle(raw).reshape(-1, 16), scale)
    attributes = {
        "block_size": size,
        "orig_dtype": dtype_of(BF),
        "act_quant_kwargs": None,
        "is_swizzled_scales": swizzled,
    }
    if kind == "nvfp4":
        whole = np.float32(0.37)
        parts = {"qdata": qdata, "scale": scale.view(E4M3), "per_tensor_scale": np.asarray(whole)}
        q = one("NVFP4Tensor", parts, attributes)
        want = values * spread(whole * raw.view(E4M3).astype(np.float32), (n, k))
    else:
        parts = {"qdata": qdata, "scale": scale.view(ml_dtypes.float8_e8m0fnu)}
        attributes["elem_dtype"] = {"_type": "torch.dtype", "_data": kind} if "float" in kind else kind
        q = one("MXTensor", parts, attributes)
        want = values * spread(np.exp2(raw.astype(np.float32) - 127), (n, k))
    assert_same(q.to_numpy().dequantize(), want.astype(BF))


@pytest.mark.parametrize("shared", (False, True))
def test_experts_are_one_stacked_tensor(shared):
    rng = np.random.default_rng(3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes = rng.normal(size=(3, 8, 16)).astype(E4M3)
    scale = rng.normal(size=(1, 1, 1) if shared else (3, 8, 1)).astype(np.float32)
    block = [3, 8, 16] if shared else [1, 1, 16]
    attributes = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "dtype": dtype_of(BF)}
    q = one("Float8Tensor", {"qdata": codes, "scale": scale}, attributes, name)
    assert q.shape == (3, 8, 16)
    assert_same(q.to_jax().dequantize(), (codes.astype(np.float32) * scale).astype(BF))


def kwargs(kind, **fields):
    return {"_type": kind, "_data": fields}


ROW, TENSOR = kwargs("PerRow", dim=-1), kwargs("PerTensor")


@pytest.mark.parametrize("asymmetric", (False, True))
@pytest.mark.parametrize("granularity", (ROW, TENSOR))
def test_int8_inputs(granularity, asymmetric):
    rng = np.random.default_rng(4)
    how = {"granularity": granularity, "reduce_range": False}
    how["mapping_type"] = {"_type": "MappingType", "_data": "ASYMMETRIC" if asymmetric else "SYMMETRIC"}
    parts = {"qdata": rng.integers(-128, 128, (8, 32)).astype(np.int8)}
    parts["scale"] = rng.uniform(0.01, 0.1, (8, 1)).astype(np.float32)
    attributes = {"block_size": [1, 32], "dtype": dtype_of(np.float32), "reduce_range": False}
    w = one("Int8Tensor", parts, {**attributes, "act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", **how)})
    x, bias = rng.normal(size=(5, 32)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    axis = None if granularity is TENSOR else 1
    low, high = np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0)
    if asymmetric:
        step = (high - low) / np.float32(255)
        zero = np.clip(-128 - np.rint(low / step), -128, 127)
    else:
        step, zero = np.maximum(-low, high) / np.float32(127.5), 0
    codes = np.clip(np.rint(x * (1 / step)) + zero, -128, 127)
    want = ((codes - zero) * step) @ (parts["qdata"] * parts["scale"]).T + bias
    np.testing.assert_allclose(activations.matmul(jnp.asarray(x), w, jnp.asarray(bias)), want, rtol=1e-4, atol=1e-4)


def test_static_scales_and_input_scales_are_arrays():
    rng = np.random.default_rng(5)
    parts = {"qdata": rng.integers(-128, 128, (8, 32)).astype(np.int8), "scale": np.full((8, 1), 0.02, np.float32)}
    parts |= {"act_quant_scale": np.full((1, 1), 0.05, np.float32), "act_pre_scale": np.linspace(0.5, 2, 32).astype(BF)}
    how = kwargs("QuantizeTensorToInt8Kwargs", granularity=TENSOR, mapping_type="SYMMETRIC", reduce_range=False)
    w = one("Int8Tensor", parts, {"block_size": [1, 32], "dtype": dtype_of(BF), "act_quant_kwargs": how})
    x = rng.normal(size=(4, 32)).astype(np.float32)
    scaled = x * parts["act_pre_scale"].astype(np.float32)
    codes = np.clip(np.rint(scaled / np.float32(0.05)), -128, 127)
    want = (codes * 0.05) @ (parts["qdata"] * parts["scale"]).T
    np.testing.assert_allclose(jq.matmul(jnp.asarray(x), w), want, rtol=1e-4, atol=1e-3)
    plain = jq.matmul(jnp.asarray(x), w, quantize_activations=False)  # the input's scale stays
    np.testing.assert_allclose(plain, scaled @ np.asarray(w.dequantize("float32")).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("granularity", (ROW, TENSOR, kwargs("PerBlock", block_size=[1, 16])))
def test_float8_inputs(granularity):
    rng = np.random.default_rng(6)
    blocks = "block_size" in granularity["_data"]
    codes = rng.normal(size=(16, 32)).astype(E4M3)
    scale = rng.uniform(0.5, 2, (1, 2) if blocks else (16, 1)).astype(np.float32)
    how = {"float8_dtype": dtype_of(E4M3), "granularity": granularity, "hp_value_lb": None, "hp_value_ub": 1.5}
    attributes = {"block_size": [16, 16] if blocks else [1, 32], "dtype": dtype_of(BF)}
    attributes["act_quant_kwargs"] = kwargs("QuantizeTensorToFloat8Kwargs", **how)
    w = one("Float8Tensor", {"qdata": codes, "scale": scale}, attributes)
    x = rng.normal(size=(4, 32)).astype(np.float32)
    x[2] = 0  # NaN in torchao
    parts = x.reshape(4, -1, 16) if blocks else x
    peak = np.abs(parts).max(None if granularity is TENSOR else -1, keepdims=True)
    step = np.minimum(peak, np.float32(1.5)) / np.float32(448)
    quantized = np.clip(np.divide(parts, step, out=np.zeros_like(parts), where=step > 0), -448, 448).astype(E4M3)
    inputs = (quantized.astype(np.float32) * step).reshape(x.shape)
    want = inputs @ (codes.astype(np.float32) * spread(scale, codes.shape)).T
    np.testing.assert_allclose(jq.matmul(jnp.asarray(x), w), want, rtol=1e-4, atol=1e-4)


def test_fake_quantized_inputs_of_the_intx_class():
    rng = np.random.default_rng(7)
    w = jq.TorchAO("int8_dynamic_activation_intx_weight", group_size=16).quantize(
        rng.normal(size=(8, 32)).astype(np.float32)
    )
    x = rng.normal(size=(4, 32)).astype(np.float32)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high - low) / np.float32(255)
    zero = np.clip(-128 - np.rint(low / step), -128, 127)
    inputs = (np.clip(np.rint(x * (1 / step)) + zero, -128, 127) - zero) * step
    np.testing.assert_allclose(
        jq.matmul(jnp.asarray(x), w), inputs @ np.asarray(w.dequantize()).T, rtol=1e-4, atol=1e-4
    )


METHODS = (
    jq.TorchAO("int8_weight_only"), jq.TorchAO("int8_dynamic_activation_int8_weight", asymmetric=True),
    jq.TorchAO("intx_weight_only", bits=3, group_size=32, asymmetric=True), jq.TorchAO("float8_weight_only"),
    jq.TorchAO("int8_dynamic_activation_intx_weight", group_size=32), jq.TorchAO("int4_weight_only", group_size=32),
    jq.TorchAO("int4_weight_only", group_size=32, packing="tile_packed_to_4d"),
    jq.TorchAO("float8_dynamic_activation_float8_weight", granularity="tensor"),
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.scheme}-{m.packing}")
def test_quantizes_near_the_weight(method):
    w = np.random.default_rng(8).normal(size=(12, 96)).astype(BF)
    made = method.quantize(w, NAME)
    error = np.linalg.norm(np.asarray(made.dequantize(), np.float32) - w.astype(np.float32)) / np.linalg.norm(
        w.astype(np.float32)
    )
    assert error < {3: 0.25, 4: 0.12}.get(made.bits, 0.04)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (extra `peers`)")
@pytest.mark.parametrize("bits", range(1, 9))
def test_intx_codes_are_those_of_torchao(bits):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("torchao.quantization")
    for dtype, name in ((torch.bfloat16, BF), (torch.float32, np.float32), (torch.float16, np.float16)):
        for mapping in ("SYMMETRIC", "ASYMMETRIC"):
            torch.manual_seed(9)
            model = torch.nn.Sequential(torch.nn.Linear(96, 16, bias=False, dtype=dtype))
            w = model[0].weight.detach().float().numpy().astype(name)
            config = peer.IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=peer.PerGroup(32),
                mapping_type=getattr(peer.MappingType, mapping),
            )  # fmt: skip
            peer.quantize_(model, config)
            method = jq.TorchAO("intx_weight_only", bits=bits, group_size=32, asymmetric=mapping == "ASYMMETRIC")
            made = torchao.dump(method.quantize(w))
            for part in ("qdata", "scale", "zero_point"):
                raw = getattr(model[0].weight, part).contiguous().view(torch.uint8).numpy().tobytes()
                assert made[part].tobytes() == raw, (dtype, mapping, part)


@pytest.mark.parametrize("quant_type", ("int4_weight_only", {"default": {"_type": "Int4WeightOnlyConfig"}}))
def test_files_without_metadata_are_refused(quant_type):
    with pytest.raises(UnsupportedError, match=r"need the safetensors metadata .* re-saved without metadata, are not"):
        read({"a._weight_qdata": np.zeros((4, 4), np.int8)}, {}, {"quant_method": "torchao", "quant_type": quant_type})


INT8 = {"block_size": [1, 8], "dtype": dtype_of(BF), "act_quant_kwargs": None, "reduce_range": False}
PARTS = {"qdata": np.zeros((4, 8), np.int8), "scale": np.ones((4, 1), np.float32)}


@pytest.mark.parametrize(
    "parts, attributes, message",
    (
        ({"qdata": np.zeros((4, 8), np.int16)}, {}, r"up_proj.weight: qdata: found dtype int16, expected int8"),
        ({"qdata": np.zeros(8, np.int8)}, {}, r"up_proj.weight: qdata: found shape \(8,\), expected a matrix"),
        ({"scale": np.ones((3, 1), np.float32)}, {}, r"up_proj.weight: scale: found shape \(3, 1\), expected \(4, 1\)"),
        ({}, {"block_size": [1, 3]}, r"block_size \[1, 3\] does not divide a weight of \(4, 8\)"),
        ({}, {"block_size": ["a", 3]}, r"block_size \['a', 3\], expected two positive numbers"),
        ({}, {"dtype": dtype_of(np.int8)}, r"dtype 'int8' is none of float16"),
        ({"scale": np.full((4, 1), np.nan, np.float32)}, {}, r"scales: 4 of 4 values are not finite"),
        ({"colour": np.ones(1, np.float32)}, {}, r"colour: Int8Tensor has no such array"),
    ),
)
def test_errors_name_the_parameter(parts, attributes, message):
    with pytest.raises(FormatError, match=message):
        read(*stored("Int8Tensor", PARTS | parts, INT8 | attributes))


def test_errors_of_the_metadata():
    tensors, metadata = stored("Int8Tensor", PARTS, INT8)
    with pytest.raises(FormatError, match=r"up_proj._weight_scale: missing; the metadata lists it"):
        read({k: v for k, v in tensors.items() if "scale" not in k}, metadata)
    with pytest.raises(FormatError, match=r"metadata 'tensor_names' is not valid JSON"):
        read(tensors, metadata | {"tensor_names": "["})
    with pytest.raises(FormatError, match=r"metadata 'norm.weight': expected a dict, found null"):
        read(tensors, {k: v for k, v in metadata.items() if k != "norm.weight"})
    with pytest.raises(UnsupportedError, match=r"up_proj.weight: torchao class 'CutlassTensor' is not read here"):
        read(*stored("CutlassTensor", PARTS, INT8))
    out_of_range = {**PARTS, "qdata": np.full((4, 8), 9, np.int8), "zero_point": np.zeros((4, 1), np.int8)}
    four = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "activation_quantization": None}
    with pytest.raises(FormatError, match=r"qdata: values 9..9 do not fit target_dtype int4"):
        read(*stored("IntxUnpackedToInt8Tensor", out_of_range, INT8 | four))
    with pytest.raises(FormatError, match=r"w: groups of 24 do not divide in_features 64; .* Name it in `skip`"):
        jq.TorchAO("int4_weight_only", group_size=24).quantize(np.ones((4, 64), BF), "w")
