"""BitNet's dynamic int8 inputs by token, for both of its linear classes.

After transformers 5.23 (integrations/bitnet.py), whose quantizing functions run under torch.compile on a CPU: inside
one function everything is float32, and only its results round to the input's dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activation_schemes.products import float_sums, integer_matmul
from jq.activations import register
from jq.matmul import dense_matmul
from jq.qtensor import Codebook


@register("bitlinear")
def bitlinear(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: the integer product rounds to x's dtype, then is divided by both scales."""
    scale = exact.cast(exact.rounded(multiplier(x).astype(x.dtype)), jnp.float32)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) * scale), -128, 127)
    sums = integer_matmul(codes.astype(jnp.int8), ternary(w)).astype(jnp.float32)
    sums = exact.cast(exact.rounded(sums.astype(x.dtype)), jnp.float32)
    divisor = scale * jnp.asarray(w.scales).astype(jnp.float32).reshape(1, 1)
    return exact.rounded(exact.div(sums, divisor).astype(x.dtype))


@register("autobitlinear", adds_bias=True)
def autobitlinear(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]: quantized and dequantized input, ternary product plus bias, then times the scale."""
    y = exact.rounded(dense_matmul(dequantized(x), ternary(w).astype(x.dtype)))
    if bias is not None:
        y = exact.rounded(y + bias.astype(x.dtype))
    factor = w.absmax if isinstance(w, Codebook) else w.scales
    return exact.rounded(y * jnp.asarray(factor).astype(x.dtype).reshape(1, 1))


@register("autobitlinear_online", adds_bias=True)
def autobitlinear_online(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]: the master weights are ternarized and scaled in x's dtype."""
    y = float_sums(dequantized(x), exact.cast(w.dequantize(), x.dtype))
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def dequantized(x: jax.Array) -> jax.Array:
    """The input after int8 by token, in its own dtype."""
    scale = multiplier(x)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) * scale), -128, 127)
    return exact.rounded(exact.div(codes, scale).astype(x.dtype))


def multiplier(x: jax.Array) -> jax.Array:
    """127 / max|x| of each row, float32 [M, 1]; torch computes number / tensor as number * reciprocal."""
    peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return exact.reciprocal(jnp.maximum(peak, jnp.float32(1e-5))) * jnp.float32(127)


def ternary(w: Any) -> jax.Array:
    """int8[N, K] of -1, 0, 1."""
    codes = jnp.asarray(w.unpack())
    if isinstance(w, Codebook):  # table -1, 0, 1, -0
        codes = jnp.where(codes == 3, 0, codes - 1)
    return codes.astype(jnp.int8)
