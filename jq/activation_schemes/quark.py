"""Quark's activations: quantized and dequantized, then multiplied as floats.

After amd-quark 0.13 (torch/kernel/hw_emulation/hw_emulation_interface.py), whose own functions run on a CPU: float8
divides and multiplies in the input's dtype, integers in float32 with a reciprocal of the scale. Dynamic scales are formed
in the input's dtype (torch/quantization/observer/observer.py): for the whole call, for each token (`ch_axis` 1 of
[batch, tokens, K], which the library shares between the sequences of a batch) or in groups with power-of-two scales.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes

from jq import exact
from jq.activation_schemes.elements import round_e2m1
from jq.activation_schemes.products import float_sums
from jq.activation_schemes.torchao_mx import quantize_mx
from jq.activations import register
from jq.algorithms.quark import EPS
from jq.errors import UnsupportedError

_FLOAT8 = {"fp8_e4m3": (448.0, ml_dtypes.float8_e4m3fn), "fp8_e5m2": (57344.0, ml_dtypes.float8_e5m2)}
_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
_MX = {"fp4": "float4_e2m1fn_x2", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}


@register("quark", adds_bias=True)
def quark(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]: inputs and outputs (bias included) as the layer's settings say."""
    dtype = x.dtype
    if w.activation.get("input") is not None:
        x = fake_quantized(x, w.activation.get("input"), w.extras, "input")
    sums = float_sums(x, w.dequantize(dtype))
    if bias is not None:  # added to the float32 sums, as torch's linear does
        sums = sums + bias.astype(dtype).astype(jnp.float32)
    y = exact.rounded(sums.astype(dtype))
    if w.activation.get("output") is not None:
        y = fake_quantized(y, w.activation.get("output"), w.extras, "output")
    return y


def fake_quantized(x: jax.Array, spec: Any, extras: Any, name: str) -> jax.Array:
    """x [M, K] on the grid of its scales, in x's dtype.

    Raises:
      UnsupportedError: granularities or dtypes that are not done here.
    """
    if spec.dtype in _MX and spec.qscheme == "per_group" and spec.dynamic and spec.scale_format == "e8m0":
        values, exponent = quantize_mx(x, _MX[spec.dtype], spec.group_size, "EVEN")
        return exact.rounded((values * exact.pow2(exponent)[..., None]).reshape(x.shape).astype(x.dtype))
    if (
        spec.dtype == "fp4"
        and spec.qscheme == "per_group"
        and spec.dynamic
        and (spec.scales or spec.scale_format == "e5m3")
    ):
        return _two_stages(x, spec, extras.get(f"{name}_scale_2"))
    if spec.dtype in _INTEGERS and spec.qscheme == "per_group" and spec.dynamic and x.shape[1] % spec.group_size == 0:
        groups = x.reshape(-1, spec.group_size)
        token = dataclasses.replace(spec, qscheme="per_channel", axis=1)
        return fake_quantized(groups, token, extras, name).reshape(x.shape)
    scale, zero = _parameters(x, spec, extras, name)
    if scale is None or spec.dtype not in _FLOAT8 | _INTEGERS:
        how = "dynamic" if spec.dynamic else "static"
        raise UnsupportedError(
            f"Quark's {how} {spec.qscheme} {spec.dtype} activations are not done here, fp8 and int8 per tensor and per "
            "token are; quantize_activations=False computes with float activations"
        )
    if spec.dtype in _FLOAT8:
        top, kind = _FLOAT8[spec.dtype]
        scaled = exact.rounded(exact.div(x.astype(jnp.float32), scale).astype(x.dtype))
        codes = exact.float8(jnp.clip(scaled, -top, top), kind).astype(jnp.float32)
        return exact.rounded((codes * scale).astype(x.dtype))
    low, high = _INTEGERS[spec.dtype]
    codes = jnp.round(x.astype(jnp.float32) * exact.reciprocal(scale)) + zero
    return exact.rounded(((jnp.clip(codes, low, high) - zero) * scale).astype(x.dtype))


def _two_stages(x: jax.Array, spec: Any, whole: Any) -> jax.Array:
    """fp4 with a scale for each group that is rounded itself: to float8 under a stored scalar, or to e5m3."""
    groups = exact.cast(x, jnp.float32).reshape(x.shape[0], -1, spec.group_size)
    peak = exact.cast(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), x.dtype)
    step = exact.div(peak.astype(jnp.float32), jnp.float32(6))
    if not spec.wide:
        step = exact.rounded(step.astype(x.dtype)).astype(jnp.float32)
    step = jnp.where(step == 0, EPS, step)
    top = jnp.float32(1) if whole is None else jnp.asarray(whole).reshape(()).astype(jnp.float32)
    ratio = exact.div(step, top)
    if spec.scales is not None and spec.scales.dtype == "fp8_e4m3":
        ratio = exact.float8(jnp.minimum(ratio, jnp.float32(448)), ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    else:
        ratio = exact.to_digits(ratio, 3, -14)
    scale = ratio * top
    scale = jnp.where(scale == 0, EPS, scale)
    values = round_e2m1(exact.div(groups, scale))
    return exact.rounded((values * scale).reshape(x.shape).astype(x.dtype))


def _parameters(x: jax.Array, spec: Any, extras: Any, name: str) -> tuple[Any, Any]:
    """Scales and zero points as float32 that broadcast to x; None where there are none."""
    if not spec.dynamic:
        scale = extras.get(f"{name}_scale")
        if spec.qscheme != "per_tensor" or scale is None:
            return None, None
        zero = jnp.asarray(extras.get(f"{name}_zero_point", 0)).reshape(()).astype(jnp.float32)
        return jnp.asarray(scale).reshape(()).astype(jnp.float32), zero
    axes: tuple[int, ...] | None = (0, 1) if spec.qscheme == "per_tensor" else None
    if spec.qscheme == "per_channel":
        axes = {1: (1,), -2: (1,), -1: (0,), 2: (0,)}.get(spec.axis)
    if axes is None:
        return None, None
    low = jnp.minimum(jnp.min(x, axis=axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, axis=axes, keepdims=True), 0)

    def divided(value: jax.Array, by: float) -> jax.Array:
        step = exact.div(value.astype(jnp.float32), jnp.float32(by))
        return step if spec.wide else exact.rounded(step.astype(x.dtype)).astype(jnp.float32)

    if spec.dtype in _FLOAT8:
        scale = divided(jnp.maximum(-low, high), _FLOAT8[spec.dtype][0])
        return jnp.where(scale == 0, EPS, scale), None
    if spec.dtype not in _INTEGERS:
        return None, None
    bottom, top = _INTEGERS[spec.dtype]
    if spec.symmetric:
        return jnp.maximum(divided(jnp.maximum(-low, high), (top - bottom) / 2), EPS), jnp.float32(0)
    scale = jnp.maximum(divided(exact.rounded(high - low), top - bottom), EPS)
    steps = exact.rounded(exact.div(low.astype(jnp.float32), scale).astype(x.dtype)).astype(jnp.float32)
    return scale, jnp.clip(bottom - jnp.round(steps), bottom, top)
