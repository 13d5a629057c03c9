"""Quark against a slow, obvious numpy version of its packing and arithmetic."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats import quark
from jq.formats.base import Context
from jq.qtensor.rotated import hadamard

BF16 = np.dtype(ml_dtypes.bfloat16)
CONTEXT = Context(config={"dtype": "bfloat16"}, label="test")
N, K, G = 24, 64, 32
ORDER = {True: [0, 2, 4, 6, 1, 3, 5, 7], False: list(range(8))}  # code in nibble i of a word
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def config(reorder: bool = True, **weight: Any) -> dict[str, Any]:
    spec = {"ch_axis": 1, "group_size": None, "symmetric": True, "is_dynamic": False, **weight}
    layer = {"weight": spec, "input_tensors": None, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark",
        "global_quant_config": layer,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"pack_method": "reorder" if reorder else "order"},
    }


def pack(codes: np.ndarray, bits: int, reorder: bool, dtype: Any) -> np.ndarray:
    if bits == 8:
        return codes.astype(np.int64).astype(dtype)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, code in enumerate(ORDER[reorder]):
        words |= (codes[:, code::8] & 15).astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(dtype: str, scheme: str, reorder: bool, symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    bits, signed = quark.INTEGERS[dtype]
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    shape: tuple[int, ...] = {"per_tensor": (), "per_channel": (N,), "per_group": (N, K // G)}[scheme]
    codes, scale = rng.integers(low, high, (N, K)), np.asarray(rng.random(shape) * 0.1 + 0.01).astype(BF16)
    zero = np.asarray(rng.integers(0, 1 << bits - 1, shape) if not symmetric else np.zeros(shape, np.int64))
    wide = [np.asarray(a, np.float32) for a in (scale, zero)]
    wide = [np.repeat(a, G, axis=1) if a.ndim == 2 else a[:, None] if a.ndim else a for a in wide]
    want = ((codes - wide[1]) * wide[0]).astype(np.float32).astype(BF16)
    stored_dtype = np.int8 if dtype == "int8" else np.uint8
    grouped = scheme == "per_group"
    zeros = pack(np.atleast_2d(zero.T if grouped else zero), bits, reorder, stored_dtype)
    parts = {
        "weight": pack(codes.T if grouped else codes, bits, reorder, stored_dtype),
        "weight_scale": np.ascontiguousarray(scale.T) if grouped else scale,
        "weight_zero_point": zeros if grouped else zeros.reshape(-1) if shape else zero.astype(np.int32),
    }
    o = quark.parse(config(reorder, dtype=dtype, qscheme=scheme, group_size=G if grouped else None), CONTEXT)
    q = quark.load("m", parts, o, CONTEXT)
    assert q is not None
    np.testing.assert_array_equal(np.asarray(q.dequantize()).view(np.uint16), want.view(np.uint16))
    back = quark.dump(q.to_jax())
    assert back.keys() == parts.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (parts[name].dtype, parts[name].shape), name
        assert array.tobytes() == np.ascontiguousarray(parts[name]).tobytes(), name


@pytest.mark.parametrize("exponents", [True, False])
def test_fp4(exponents: bool) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (N, K))
    scale = rng.integers(115, 130, (N, 2)).astype(np.uint8) if exponents else rng.random((N, 2)).astype(BF16)
    real = np.exp2(scale.astype(np.float32) - 127) if exponents else scale.astype(np.float32)
    want = (E2M1[codes] * np.repeat(real, G, axis=1)).astype(BF16)
    parts = {"weight": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), "weight_scale": scale}
    spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": G, "scale_format": "e8m0" if exponents else "float32"}
    q = quark.load("m", parts, quark.parse(config(**spec), CONTEXT), CONTEXT)
    assert q is not None
    np.testing.assert_array_equal(np.asarray(q.dequantize()).view(np.uint16), want.view(np.uint16))
    assert all(a.tobytes() == parts[k].tobytes() for k, a in quark.dump(q).items())


def float8_module() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    w = np.random.default_rng(3).standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn)
    parts = {"weight": w, "weight_scale": np.asarray(0.05, np.float32), "input_scale": np.asarray(0.01, np.float32)}
    conf = config(dtype="fp8_e4m3", qscheme="per_tensor")
    conf["global_quant_config"]["input_tensors"] = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    return parts, conf


def test_float8_with_static_inputs() -> None:
    parts, conf = float8_module()
    q = quark.load("m", parts, quark.parse(conf, CONTEXT), CONTEXT)
    assert q is not None
    x = np.random.default_rng(4).standard_normal((5, K)).astype(BF16)
    rounded = (x.astype(np.float32) / np.float32(0.01)).astype(BF16).astype(np.float32).clip(-448, 448)
    inputs = (rounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.01)).astype(BF16)
    weight = (parts["weight"].astype(np.float32) * np.float32(0.05)).astype(BF16)
    want = inputs.astype(np.float32) @ weight.astype(np.float32).T
    np.testing.assert_allclose(np.asarray(jq.matmul(jnp.asarray(x), q)).astype(np.float32), want, rtol=1e-2, atol=1e-2)
    conf["global_quant_config"]["input_tensors"] |= {"is_dynamic": True, "qscheme": "per_group"}
    dynamic = quark.load("m", parts, quark.parse(conf, CONTEXT), CONTEXT)
    with pytest.raises(UnsupportedError, match="quantize_activations=False"):
        jq.matmul(jnp.asarray(x), dynamic)


def test_settings_by_layer_and_errors() -> None:
    parts, conf = float8_module()
    conf["layer_quant_config"] = {"*.down_proj": {"weight": [{"dtype": d} for d in ("fp4", "fp8_e4m3", "fp4")]}}
    options = quark.parse(conf, CONTEXT)
    assert options.of("a.up_proj").weight is not None
    with pytest.raises(UnsupportedError, match="has 3 stages"):
        quark.load("a.down_proj", parts, options, CONTEXT)
    with pytest.raises(FormatError, match="global_quant_config: missing"):
        quark.parse({"quant_method": "quark"}, CONTEXT)
    stages = [{"dtype": "fp4", "qscheme": "per_group", "group_size": G}, {"dtype": "fp8_e5m3", "is_scale_quant": True}]
    conf["layer_quant_config"] = {"*.down_proj": {"weight": stages}}
    fp4 = {"weight": np.zeros((N, K // 2), np.uint8), "weight_scale": np.ones((N, K // G), np.uint8)}
    with pytest.raises(UnsupportedError, match="scales of fp8_e5m3 per_tensor are not read"):
        quark.load("a.down_proj", fp4, quark.parse(conf, CONTEXT), CONTEXT)
    container = {"weight": np.zeros((N, 34), np.uint8)}
    mx = quark.parse(config(dtype="mx", mx_element_dtype="int8"), CONTEXT)
    with pytest.raises(UnsupportedError, match="mx_element_dtype 'int8' is not read"):
        quark.load("m", container, mx, CONTEXT)
    mx = quark.parse(config(dtype="mx", mx_element_dtype="fp6_e2m3"), CONTEXT)
    with pytest.raises(FormatError, match="containers of fp6_e2m3 have 25 bytes for 32 inputs"):
        quark.load("m", container, mx, CONTEXT)
    for dtype in ("mx6", "mx9", "bfp16"):
        with pytest.raises(UnsupportedError, match=f"Quark dtype '{dtype}' is not read"):
            quark.load("m", container, quark.parse(config(dtype=dtype), CONTEXT), CONTEXT)
    with pytest.raises(UnsupportedError, match="'int16' is not read"):
        quark.load("m", parts, quark.parse(config(dtype="int16"), CONTEXT), CONTEXT)
    with pytest.raises(FormatError, match=r"m\.weight: found dtype float8_e4m3fn, expected int32"):
        zero = {"weight_zero_point": np.zeros((), np.int32)}
        quark.load("m", {**parts, **zero}, quark.parse(config(dtype="int4"), CONTEXT), CONTEXT)
    with pytest.raises(FormatError, match="expected a scalar"):
        parts["weight_scale"] = np.ones(3, np.float32)
        quark.load("m", parts, quark.parse(float8_module()[1], CONTEXT), CONTEXT)


def rotated(size: int = 32, online: Any = ("m",), **parts: np.ndarray) -> Any:
    """One float8 layer with parts of a rotation beside it."""
    settings = config(dtype="fp8_e4m3", qscheme="per_channel")
    online = list(online) if isinstance(online, tuple) else online
    settings["algo_config"] = [
        {"name": "rotation", "rotation_size": size, "online_config": {"online_rotation_layers": online}}
    ]
    stored = {
        "m.weight": np.zeros((N, K), ml_dtypes.float8_e4m3fn),
        "m.weight_scale": np.ones(N, BF16),
        **{name.replace("__", "."): array for name, array in parts.items()},
    }
    context = Context(
        config={"dtype": "bfloat16"},
        shapes={k: v.shape for k, v in stored.items()},
        dtypes={k: v.dtype for k, v in stored.items()},
        label="test",
    )
    options = quark.parse(settings, context)
    groups = quark.group(list(stored), options, context)
    return quark.load("m", {s: stored[name] for s, name in groups["m"].items()}, options, context)


def test_rotations_that_layers_share() -> None:
    matrix = hadamard(32).astype(np.int8)
    own, shared = rotated(m__input_rotation=matrix), rotated(shared_input_rotation_32=matrix)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, K)), jnp.bfloat16)
    np.testing.assert_array_equal(jq.matmul(x, own), jq.matmul(x, shared))
    assert set(quark.dump(own)) == {"weight", "weight_scale", "input_rotation"}
    assert set(quark.dump(shared)) == {"weight", "weight_scale"}
    assert rotated(online=("other",), shared_input_rotation_32=matrix).activation is None


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({"shared_input_rotation_32": np.ones((32, 32), np.int8)}, {"online": []}, "does not say which"),
        ({"shared_input_rotation_16": np.ones((16, 16), np.int8)}, {}, r"m\.input_rotation: missing"),
        ({"m__input_prescale": np.ones(K, BF16)}, {}, r"m\.input_rotation: missing.*input_prescale"),
        ({"shared_input_rotation_32": np.ones((32, 32), np.int8)}, {}, "no Hadamard matrix"),
        ({"shared_input_rotation_32": np.ones((32, 16), np.int8)}, {}, r"m\.input_rotation: found shape"),
        ({}, {"online": "m"}, "must be a list of names"),
        ({}, {"size": -1}, "rotation_size is -1"),
        (
            {"m__input_rotation": hadamard(32).astype(np.int8), "m__input_prescale": np.ones(8, BF16)},
            {},
            r"m\.input_prescale: found shape",
        ),
    ],
)
def test_bad_rotations(parts: dict[str, np.ndarray], settings: dict[str, Any], message: str) -> None:
    with pytest.raises((FormatError, UnsupportedError), match=message):
        rotated(**settings, **parts)
