"""AutoRound's activations: quantized and dequantized in float32, then multiplied in the input's dtype.

After auto-round 0.16.1 (experimental/qmodules, data_type/{mxfp,nvfp}.py), whose layers run on a CPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes

from jq import exact
from jq.activation_schemes.elements import round_e2m1
from jq.activation_schemes.products import float_sums
from jq.activation_schemes.torchao_mx import quantize_mx
from jq.activations import register


def _product(inputs: jax.Array, x: jax.Array, w: Any) -> jax.Array:
    """Inputs rounded to x's dtype, times the weight in it."""
    return float_sums(exact.rounded(inputs.reshape(x.shape).astype(x.dtype)), w.dequantize(x.dtype)).astype(x.dtype)


@register("auto_round_mx")
def auto_round_mx(x: jax.Array, w: Any) -> jax.Array:
    """Option "element"; exponents of 32 values, floor(log2(max)) less that of the element's largest number."""
    values, exponent = quantize_mx(x, w.activation.get("element"), 32, "FLOOR")
    return _product(values * exact.pow2(exponent)[..., None], x, w)


@register("auto_round_nv")
def auto_round_nv(x: jax.Array, w: Any) -> jax.Array:
    """e2m1 with e4m3 scales of 16 under `input_global_scale`, which multiplies; reciprocals where the library has them."""
    whole = jnp.asarray(w.extras["input_global_scale"]).reshape(()).astype(jnp.float32)
    groups = exact.cast(x, jnp.float32).reshape(x.shape[0], -1, 16)
    peak = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    local = jnp.clip(whole * (peak * jnp.float32(1 / 6)), -448, 448)
    local = exact.float8(local, ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    factor = _reciprocal(local * _reciprocal(whole))
    values = round_e2m1(jnp.clip(groups * factor, -6, 6))
    return _product(values * _reciprocal(factor), x, w)


def _reciprocal(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.float32(0), exact.reciprocal(jnp.where(x == 0, jnp.float32(1), x)))


@register("auto_round_fp8")
def auto_round_fp8(x: jax.Array, w: Any) -> jax.Array:
    """float8 under `input_scale`; quotient and product rounded to its dtype."""
    scale = jnp.asarray(w.extras["input_scale"]).reshape(())
    wide = jnp.promote_types(x.dtype, scale.dtype)
    step = scale.astype(jnp.float32)
    quotient = exact.rounded(exact.div(exact.cast(x, jnp.float32), step).astype(wide)).astype(jnp.float32)
    codes = exact.float8(jnp.clip(quotient, -448, 448), ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    return _product(exact.rounded((codes * step).astype(scale.dtype)), x, w)
