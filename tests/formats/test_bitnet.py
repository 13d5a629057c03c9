"""BitNet: both linear classes, packed and as floats, with and without norms; execution against slow numpy; every error."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, assert_same, dense, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import activations, nn
from jq.errors import FormatError
from jq.formats import bitnet
from jq.formats.base import Context

NAME = "model.layers.0.mlp.up_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


def pack_slowly(ternary):
    rows = -(-len(ternary) // 4)
    packed = np.zeros((rows, ternary.shape[1]), np.uint8)
    for n in range(len(ternary)):
        for k in range(ternary.shape[1]):
            packed[n % rows, k] |= (int(ternary[n, k]) + 1) << (2 * (n // rows))
    return packed


def config(linear_class="bitlinear", **more):
    return {"quant_method": "bitnet", "linear_class": linear_class, **more}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_reads_and_writes_both_classes(data):
    n, k = 4 * data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    auto, floats = data.draw(st.booleans()), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ternary = rng.integers(-1, 2, (n, k)).astype(np.int8)
    scale = rng.uniform(0.5, 90, 1).astype(dtype)
    values = ternary.astype(dtype)
    if auto and floats:
        values[(ternary == 0) & (rng.random((n, k)) < 0.5)] = -0.0  # rounding -0.3 leaves one
    tensors = {f"{NAME}.weight": values if auto and floats else pack_slowly(ternary), f"{NAME}.weight_scale": scale}
    q = read(bitnet.FORMAT, tensors, config("autobitlinear" if auto else "bitlinear"))[NAME]
    want = (values * scale).astype(dtype) if auto else (ternary.astype(dtype) / scale).astype(dtype)
    got = dense(q, data.draw(TURNS))
    assert_same(got if auto else got + dtype(0), want if auto else want + dtype(0))
    assert q.nbytes <= sum(t.nbytes for t in tensors.values()) + 4 * n + 64


def test_rows_beyond_the_bias_are_carried():
    """6 outputs are packed as 8; the library would unpack all 8."""
    ternary = np.array([[1, 0, -1, 1, 1, 0]]).T * np.ones((1, 5), int)
    tensors = {f"{NAME}.weight": pack_slowly(ternary), f"{NAME}.weight_scale": np.ones(1, np.float32)}
    tensors[f"{NAME}.bias"] = np.zeros(6, np.float32)
    q = read(bitnet.FORMAT, tensors, config())[NAME]
    np.testing.assert_array_equal(np.asarray(q.unpack()), ternary)


def weight(linear_class, dtype=np.float32, norm=None, n=8, k=64):
    rng = np.random.default_rng(5)
    ternary = rng.integers(-1, 2, (n, k)).astype(np.int8)
    scale = np.array([3.5 if linear_class == "bitlinear" else 0.3], dtype)
    tensors = {f"{NAME}.weight": pack_slowly(ternary), f"{NAME}.weight_scale": scale}
    more = {}
    if norm is not None:
        tensors[f"{NAME}.rms_norm.weight"], more = norm.astype(dtype), {"use_rms_norm": True, "rms_norm_eps": 1e-3}
    return read(bitnet.FORMAT, tensors, config(linear_class, **more))[NAME], ternary, scale


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("linear_class", ("bitlinear", "autobitlinear"))
def test_inputs_are_quantized_by_token(linear_class, norm):
    rng = np.random.default_rng(6)
    norms = rng.uniform(0.5, 2, 64) if norm else None
    w, ternary, scale = weight(linear_class, norm=norms)
    x, bias = rng.normal(size=(7, 64)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    x[3] = 0
    inputs = x
    if norm:
        inputs = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-3) * norms
    factor = 127 / np.maximum(np.abs(inputs).max(-1, keepdims=True), 1e-5)
    codes = np.clip(np.rint(inputs * factor), -128, 127)
    y = codes @ ternary.T / factor
    want = y / scale + bias if linear_class == "bitlinear" else (y + bias) * scale
    got = activations.matmul(jnp.asarray(x), w, jnp.asarray(bias))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_the_norm_stays_without_activation_quantization():
    """It is a part of the layer, not of the quantization."""
    norms = np.linspace(0.5, 2, 64)
    w, _, _ = weight("autobitlinear", norm=norms)
    x = np.random.default_rng(7).normal(size=(3, 64)).astype(np.float32)
    inputs = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-3) * norms
    want = inputs @ np.asarray(w.dequantize()).T
    got = jq.matmul(jnp.asarray(x), w, quantize_activations=False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    layer = nn.linear_of(w, quantize_activations=False)
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear_class", ("bitlinear", "autobitlinear"))
def test_quantizes_by_the_absolute_mean(linear_class):
    w = np.random.default_rng(8).normal(size=(8, 96)).astype(np.float32)
    made = jq.BitNet(linear_class).quantize(w)
    mean = np.abs(w).mean()
    np.testing.assert_array_equal(np.asarray(made.unpack()), np.clip(np.rint(w / mean), -1, 1))
    np.testing.assert_allclose(made.scales[0, 0], 1 / mean if linear_class == "bitlinear" else mean, rtol=1e-6)
    again = jq.BitNet(linear_class).quantize(np.asarray(made.dequantize()))
    assert np.mean(np.asarray(again.unpack()) == np.asarray(made.unpack())) == 1


@pytest.mark.parametrize(
    "change, options, message",
    (
        ({"weight": np.full((2, 5), 255, np.uint8)}, {}, r"up_proj.weight: holds the field 3"),
        ({"weight": np.ones((8, 5), np.float16)}, {}, r"up_proj.weight: found dtype float16, bitlinear stores packed"),
        (
            {"weight": np.full((8, 5), 0.5, np.float16)},
            {"linear_class": "autobitlinear"},
            r"up_proj.weight: holds values beside -1, 0 and 1",
        ),
        ({"weight_scale": np.ones(2, np.float16)}, {}, r"up_proj.weight_scale: found shape \(2,\), expected one value"),
        ({}, {"use_rms_norm": True}, r"up_proj.rms_norm.weight: missing; .* use_rms_norm is set"),
        (
            {"rms_norm.weight": np.ones(5, np.float16)},
            {},
            r"up_proj.rms_norm.weight: stored, but .*use_rms_norm is not",
        ),
        ({"weight": None}, {}, r"up_proj.weight: missing"),
    ),
)
def test_errors_name_the_tensor(change, options, message):
    parts = {"weight": pack_slowly(np.zeros((8, 5), int)), "weight_scale": np.ones(1, np.float16)} | change
    tensors = {f"{NAME}.{k}": v for k, v in parts.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        read(bitnet.FORMAT, tensors, config(**options))


def test_config_errors():
    with pytest.raises(FormatError, match=r"linear_class: found 'x', expected bitlinear or autobitlinear"):
        read(bitnet.FORMAT, {}, config("x"))
    with pytest.raises(FormatError, match=r"w: 6 output features; BitNet packs rows by 4"):
        jq.BitNet().quantize(np.ones((6, 8), np.float32), "w")
    assert bitnet.parse({"quant_method": "bitnet"}, Context()) == bitnet.Options()  # old files say no more


@pytest.mark.parametrize("dtype", FLOATS)
def test_online_masters_are_ternarized_at_every_call(dtype):
    rng = np.random.default_rng(9)
    master, norm = rng.normal(size=(8, 64)).astype(dtype), rng.uniform(0.5, 2, 64).astype(dtype)
    tensors = {f"{NAME}.weight": master, f"{NAME}.rms_norm.weight": norm}
    tensors |= {f"model.{skipped}.weight": np.ones((4, 4), dtype) for skipped in ("embed_tokens", "layers.1.mlp.gate")}
    tensors |= {"lm_head.weight": np.ones((4, 4), dtype), "model.norm.weight": np.ones(4, dtype)}
    options = {"quantization_mode": "online", "use_rms_norm": True, "modules_to_not_convert": ["lm_head", "mlp.gate"]}
    found = read(bitnet.FORMAT, tensors, config("autobitlinear", **options))
    assert list(found) == [NAME]
    w = found[NAME]
    assert w.shape == (8, 64) and w.codes.nbytes == master.nbytes  # no second copy
    wide = master.astype(np.float32)
    mean = np.abs(wide).mean()
    ternary = np.clip(np.rint(wide / mean), -1, 1)
    np.testing.assert_array_equal(np.asarray(w.unpack()), ternary)
    np.testing.assert_allclose(np.asarray(w.dequantize(), np.float32), ternary * mean, rtol=1e-2)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    inputs = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * norm.astype(np.float32)
    factor = 127 / np.abs(inputs).max(-1, keepdims=True)
    want = np.rint(inputs * factor) / factor @ np.asarray(w.dequantize(), np.float32).T
    np.testing.assert_allclose(jq.matmul(jnp.asarray(x), w), want, rtol=1e-4, atol=1e-4)
