"""QQQ's inputs: int8 by token, exact integer products. After gptqmodel 7.7.0 (`QQQTorchLinear.forward`) on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activation_schemes.products import integer_matmul
from jq.activations import register


@register("qqq")
def qqq(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: the token's scale in x's dtype, products of integers, then both scales in float32."""
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = exact.cast(exact.rounded(exact.div(peak, jnp.full_like(peak, 127))), jnp.float32)
    quotient = exact.div(exact.cast(x, jnp.float32), jnp.where(scale == 0, jnp.float32(1), scale))
    codes = jnp.clip(jnp.round(quotient), -128, 127).astype(jnp.int8)
    if w.formula == "f32":
        weights, outputs = 16 * w.unpack(), jnp.asarray(w.scales) / 16
    else:
        outputs = jnp.asarray(w.zeros)
        weights = w.replace(zeros=jnp.ones_like(outputs), dtype="float32", activation=None).dequantize()
    sums = integer_matmul(codes, weights.astype(jnp.int8)).astype(jnp.float32)
    return (sums * scale * outputs.reshape(1, -1)).astype(x.dtype)
