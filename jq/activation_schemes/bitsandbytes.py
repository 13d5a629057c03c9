"""LLM.int8: activations quantized per row, with outlier columns computed in floating point (bitsandbytes 0.50.2, CPU)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.activation_schemes.products import integer_matmul
from jq.activations import register

# The library's CPU code has a slip of digits in 1 / 127**2 = 6.2000124e-05; its CUDA code has the right constant.
_OUTPUT_SCALE = np.float32(6.200124e-05)


@register("bnb_int8", adds_bias=True)
def matmul(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N] in x's dtype. Option "threshold": magnitude of an outlier, 0 for none."""
    threshold = w.activation.get("threshold", 0.0)
    codes, absmax, columns = quantize(x, threshold)
    weight = w.unpack().astype(jnp.int8)
    total = integer_matmul(codes, weight).astype(jnp.float32)
    scb = w.scales.reshape(1, -1).astype(jnp.float32)
    scaled = total * (absmax[:, None] * scb)
    wide = scaled * _OUTPUT_SCALE
    if bias is not None:  # before the product is rounded
        wide = exact.mul_add(scaled, _OUTPUT_SCALE, bias.astype(x.dtype).astype(jnp.float32))
    y = exact.cast(wide, x.dtype)
    if threshold <= 0:
        return y

    def with_outliers(y: jax.Array) -> jax.Array:
        # The library multiplies the outlier columns alone; columns of zeros add nothing to the sums.
        part = jnp.where(columns[None], x, jnp.zeros_like(x)).astype(jnp.float32)
        dense = exact.cast(exact.cast(w.dequantize(), x.dtype), jnp.float32)
        added = jnp.einsum("mk,nk->mn", part, dense, precision=jax.lax.Precision.HIGHEST)
        return (y.astype(jnp.float32) + added).astype(x.dtype)

    return jax.lax.cond(columns.any(), with_outliers, lambda y: y, y)


def quantize(x: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes activations per row.

    Args:
      x: float[M, K]; rounded to float16 first, as the library does.
      threshold: |x| from which a column (in any row) is an outlier; 0 for none.

    Returns:
      codes int8[M, K] with outlier columns 0, row maxima float32[M] over what is no outlier, bool[K] outlier columns.
    """
    half = exact.cast(x, jnp.float16)
    outlier = jnp.abs(half) >= jnp.float16(threshold) if threshold > 0 else jnp.zeros(x.shape, bool)
    columns = outlier.any(axis=0)
    wide = jnp.where(outlier, jnp.zeros_like(half), half).astype(jnp.float32)
    absmax = jnp.abs(wide).max(axis=1)
    # torch evaluates 127 / absmax as 127 * (1 / absmax).
    factor = jnp.float32(127) * exact.reciprocal(jnp.where(absmax == 0, jnp.float32(1), absmax))
    codes = jnp.round(wide * factor[:, None]).astype(jnp.int8)
    return jnp.where(columns[None], jnp.int8(0), codes), absmax, columns
