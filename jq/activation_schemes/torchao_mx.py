"""torchao's microscaled activations: MX (power-of-two scales of 32 values) and NVFP4 (e4m3 scales of 16).

After torchao 0.18.0 (prototype/mx_formats/{mx_tensor,nvfp4_tensor}.py). MX is held against the library's emulated
product on a CPU; NVFP4's product runs on Blackwell GPUs alone, so that rule is an own reading of the source.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activation_schemes.elements import ELEMENTS, to_element
from jq.activation_schemes.products import float_sums, plus_bias
from jq.activations import register

_E4M3_EPS = 2.0**-6  # torchao's E4M3_EPS: the smallest normal number


@register("torchao_mx", adds_bias=True)
def mx(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """MXTensor: x [M, K] -> [M, N], from the dequantized input in x's dtype."""
    values, exponent = quantize_mx(x, w.activation.get("element"), w.activation.get("block"), w.activation.get("mode"))
    scaled = values * exact.pow2(exponent)[..., None]
    dequantized = exact.cast(exact.rounded(scaled.reshape(x.shape).astype(x.dtype)), jnp.float32)
    return plus_bias(float_sums(dequantized, exact.cast(w.dequantize(), x.dtype)), bias).astype(x.dtype)


def quantize_mx(x: jax.Array, element: str, block: int, mode: str) -> tuple[jax.Array, jax.Array]:
    """Element values float32[M, K / block, block] and scale exponents int32[M, K / block].

    Args:
      x: float[M, K].
      element: key of the element types.
      block: values that share a scale.
      mode: FLOOR, CEIL, EVEN or RCEIL, how the exponent follows from the largest magnitude.
    """
    mantissa, _, largest, top = ELEMENTS[element]
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, block)
    peak = jnp.max(jnp.abs(groups), axis=-1)
    if mode == "RCEIL":
        peak = exact.div(peak, jnp.float32(top))
    bits = jax.lax.bitcast_convert_type(peak, jnp.int32)
    if mode == "EVEN":
        bits = bits + (1 << (23 - mantissa - 1))
    exponent = (bits >> 23) - 127
    if mode in ("CEIL", "RCEIL"):
        exponent = exponent + ((bits & 0x7FFFFF) > 0)
    exponent = jnp.clip(exponent if mode == "RCEIL" else exponent - largest, -127, 127)
    # The library divides by no less than the smallest normal number.
    inverse = exact.pow2(-jnp.maximum(exponent, -126))[..., None]
    return to_element(groups * inverse, element), exponent


@register("torchao_nvfp4", adds_bias=True)
def nvfp4(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """NVFP4Tensor: x [M, K] -> [M, N], float32 sums of the dequantized operands."""
    whole = None
    if w.activation.get("dynamic"):
        whole = exact.div(jnp.max(jnp.abs(x)).astype(jnp.float32), jnp.float32(448 * 6))
        whole = jnp.where(whole == 0, jnp.float32(1), whole)
    elif "act_per_tensor_scale" in w.activation.parameters:
        whole = jnp.asarray(w.extras["act_per_tensor_scale"]).astype(jnp.float32).reshape(())
    dequantized = quantize_nvfp4(x, whole, w.activation.get("block"))
    weights = w.replace(dtype="float32").dequantize()
    return plus_bias(float_sums(dequantized, weights), bias).astype(x.dtype)


def quantize_nvfp4(x: jax.Array, whole: jax.Array | None, block: int) -> jax.Array:
    """The input after e2m1 values and e4m3 scales, dequantized to float32[M, K]."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, block)
    scale = exact.div(jnp.max(jnp.abs(groups), axis=-1), jnp.float32(6))
    scale = scale if whole is None else exact.div(scale, whole)
    scale = exact.float8(jnp.clip(scale, _E4M3_EPS, 448), jnp.float8_e4m3fn).astype(jnp.float32)
    inverse = exact.reciprocal(scale) if whole is None else exact.div(exact.reciprocal(whole), scale)
    values = to_element(groups * inverse[..., None], "float4_e2m1fn_x2")
    factor = scale if whole is None else whole * scale
    return (values * factor[..., None]).reshape(x.shape)
