"""Four Over Six against a slow, obvious numpy version."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import context_of

import jq
from jq.activation_schemes import fouroversix as activation_schemes
from jq.errors import FormatError, UnsupportedError
from jq.formats import fouroversix
from jq.formats.base import Context

CONTEXT = Context(label="test")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Q = "quantized_weight_"


def module(n: int, k: int, *, blocked: bool, top: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(n)
    rows, columns = -(-n // 128) * 128, -(-k // 64) * 64
    codes = np.zeros((rows, columns), np.uint8)
    codes[:n, :k] = rng.integers(0, 16, (n, k))
    scales = np.zeros((rows, columns // 16), np.uint8)
    scales[:n, : k // 16] = rng.integers(1, 0x78, (n, k // 16))
    real = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    amax = np.float32(3.7)
    want = E2M1[codes] * np.repeat(real, 16, axis=1) * amax / np.float32(top)
    stored = scales
    if blocked:  # element by element: row r, column c of a 128 x 4 block lies at ((r % 32) * 4 + r // 32) * 4 + c
        stored = np.empty(scales.size, np.uint8)
        for r in range(rows):
            for c in range(columns // 16):
                block = (r // 128) * (columns // 64) + c // 4
                stored[block * 512 + ((r % 32) * 4 + r % 128 // 32) * 4 + c % 4] = scales[r, c]
    parts = {
        Q + "values": codes[:, ::2] | codes[:, 1::2] << 4,
        Q + "scale_factors": stored.view(ml_dtypes.float8_e4m3fn),
        Q + "amax": amax.reshape(1),
        Q + "metadata": np.array([n, k, rows, columns, 1, int(blocked)], np.int64),
    }
    return parts, want[:n, :k].astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(("n", "k", "blocked"), [(128, 64, True), (100, 80, True), (256, 192, True), (64, 64, False)])
@pytest.mark.parametrize(("rule", "top"), [("mse", 1536), ("static_6", 2688), ("static_4", 1792)])
def test_decoding(n: int, k: int, blocked: bool, rule: str, top: int, cell) -> None:
    cell("fouroversix", "read", "write", "identical bits", "identical dequantize")
    parts, want = module(n, k, blocked=blocked, top=top)
    options = fouroversix.parse({"module_config_overrides": {"m": {"weight_scale_rule": rule}}}, CONTEXT)
    q = fouroversix.load("m", parts, options, CONTEXT)
    assert q.shape == (n, k)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).view(np.uint16), want.view(np.uint16))
    for name, array in fouroversix.dump(q).items():
        assert (array.dtype, array.shape) == (parts[name].dtype, parts[name].shape), name
        assert array.tobytes() == parts[name].tobytes(), name


def test_padding_is_carried() -> None:
    parts, want = module(100, 64, blocked=True, top=1536)
    parts[Q + "values"][120] = 7
    q = fouroversix.load("m", parts, fouroversix.parse({}, CONTEXT), CONTEXT)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want)
    assert fouroversix.dump(q)[Q + "values"].tobytes() == parts[Q + "values"].tobytes()


@pytest.mark.parametrize("rule", ["mse", "mae", "abs_max", "static_6", "static_4"])
def test_inputs_are_rounded_as_weights(rule: str) -> None:
    """The product is that of inputs quantized as a weight is (tests/recorded holds what the library makes of one)."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((7, 96)) * rng.lognormal(size=(7, 1))).astype(ml_dtypes.bfloat16)
    quantizer = jq.FourOverSix(rule)
    w = quantizer.quantize(rng.standard_normal((8, 96)).astype(np.float32))
    inputs = np.asarray(quantizer.quantize(x).replace(dtype="float32").dequantize())
    want = inputs @ np.asarray(w.replace(dtype="float32").dequantize()).T
    got = np.asarray(jq.matmul(x, w)).astype(np.float32)
    np.testing.assert_allclose(got, want.astype(ml_dtypes.bfloat16).astype(np.float32), rtol=8e-3, atol=1e-3)
    exact = np.asarray(jax.jit(activation_schemes.dequantized, static_argnums=1)(jnp.asarray(x), rule))
    assert (exact != inputs).mean() < 1e-3


def test_errors() -> None:
    with pytest.raises(UnsupportedError, match="dtype 'if4' is not read, nvfp4 and mxfp4 are"):
        fouroversix.parse({"dtype": "if4"}, CONTEXT)
    with pytest.raises(FormatError, match="weight scale_rule 'mse'; mxfp4 has static_6 and static_4 alone"):
        fouroversix.parse({"dtype": "mxfp4"}, CONTEXT)
    with pytest.raises(FormatError, match="scale_rule 'best'"):
        fouroversix.parse({"scale_rule": "best"}, CONTEXT)
    parts, _ = module(128, 64, blocked=True, top=1536)
    q = fouroversix.load("m", parts, fouroversix.parse({}, CONTEXT), CONTEXT)
    x: Any = np.ones((2, 64), np.float32)
    assert jq.matmul(x, q, quantize_activations=False).shape == (2, 128)
    parts[Q + "metadata"] = np.array([128, 64, 128, 60, 1, 1])
    with pytest.raises(FormatError, match="make no NVFP4 weight"):
        fouroversix.load("m", parts, fouroversix.parse({}, CONTEXT), CONTEXT)


def test_master_weights_are_quantized_once() -> None:
    """`keep_master_weights`: plain files, of which every Linear that is not skipped is quantized at run time."""
    w = np.random.default_rng(5).standard_normal((32, 128)).astype(ml_dtypes.bfloat16)
    stored = {"embed_tokens.weight": w, "a.weight": w, "b.weight": w, "lm_head.weight": w, "norm.weight": w[0]}
    context = context_of(stored)
    config = {"keep_master_weights": True, "scale_rule": "mae", "weight_scale_2d": True}
    options = fouroversix.parse(config | {"module_config_overrides": {"b": {}}}, context)
    found = fouroversix.group(list(stored), options, context)
    assert found == {"a": {"weight": "a.weight"}}
    q = fouroversix.load("a", {"weight": w}, options, context)
    want = jq.FourOverSix("mae", weight_scale_2d=True).quantize(w)
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(want.codes))
    np.testing.assert_array_equal(np.asarray(q.dequantize()), np.asarray(want.dequantize()))
    x = np.ones((2, 128), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(jq.matmul(x, q.to_jax())), np.asarray(jq.matmul(x, want.to_jax())))
    assert fouroversix.dump(q)["weight"].tobytes() == w.tobytes()


def test_unknown_output_dtypes_are_named() -> None:
    with pytest.raises(FormatError, match="output_dtype 'int8', expected one of float16, bfloat16, float32"):
        fouroversix.parse({"output_dtype": "int8"}, Context(label="test"))
