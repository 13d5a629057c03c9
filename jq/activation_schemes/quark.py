"""Quark's static per-tensor activations: quantized and dequantized, then multiplied as floats.

After amd-quark 0.13 (torch/kernel/hw_emulation/hw_emulation_interface.py), whose own functions run on a CPU: float8
divides and multiplies in the input's dtype, integers in float32 with a reciprocal of the scale.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes

from jq import exact
from jq.activations import register
from jq.errors import UnsupportedError
from jq.matmul import dense_matmul

_FLOAT8 = {"fp8_e4m3": (448.0, ml_dtypes.float8_e4m3fn), "fp8_e5m2": (57344.0, ml_dtypes.float8_e5m2)}
_INTEGERS = {"int8": (-128, 127), "uint8": (0, 255)}


@register("quark")
def quark(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]: inputs and outputs (bias included) as the layer's settings say."""
    dtype = x.dtype
    if w.activation.get("input") is not None:
        x = fake_quantized(x, w.activation.get("input"), w.extras, "input")
    y = exact.rounded(dense_matmul(x, w.dequantize(dtype)))
    if bias is not None:
        y = exact.rounded(y + bias.astype(dtype))
    if w.activation.get("output") is not None:
        y = fake_quantized(y, w.activation.get("output"), w.extras, "output")
    return y


quark.adds_bias = True  # type: ignore[attr-defined]


def fake_quantized(x: jax.Array, spec: Any, extras: Any, name: str) -> jax.Array:
    """x on the grid of a static per-tensor scale, in x's dtype.

    Raises:
      UnsupportedError: dynamic scales, other granularities or dtypes.
    """
    scale = extras.get(f"{name}_scale")
    static = spec.qscheme == "per_tensor" and not spec.dynamic and scale is not None
    if not static or spec.dtype not in _FLOAT8 | _INTEGERS:
        how = "dynamic" if spec.dynamic else "static"
        raise UnsupportedError(
            f"Quark's {how} {spec.qscheme} {spec.dtype} activations are not done here, static per-tensor fp8 and int8 "
            "are; quantize_activations=False computes with float activations"
        )
    scale = jnp.asarray(scale).reshape(()).astype(jnp.float32)
    if spec.dtype in _FLOAT8:
        top, kind = _FLOAT8[spec.dtype]
        scaled = exact.rounded(exact.div(x.astype(jnp.float32), scale).astype(x.dtype))
        codes = jnp.clip(scaled, -top, top).astype(kind).astype(jnp.float32)
        return exact.rounded((codes * scale).astype(x.dtype))
    low, high = _INTEGERS[spec.dtype]
    zero = jnp.asarray(extras.get(f"{name}_zero_point", 0)).reshape(()).astype(jnp.float32)
    codes = jnp.round(x.astype(jnp.float32) * exact.reciprocal(scale)) + zero
    return exact.rounded(((jnp.clip(codes, low, high) - zero) * scale).astype(x.dtype))
