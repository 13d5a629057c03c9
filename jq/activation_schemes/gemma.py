"""Gemma's static ranges: inputs and outputs rounded to 256 levels with one stored scale each.

After transformers 5.23 (integrations/gemma_quant.py, `apply_srq`), everything in the input's dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activations import register
from jq.matmul import dense_matmul


@register("gemma_static_range", adds_bias=True)
def gemma_static_range(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]: rounded input times the dequantized weight plus bias, rounded in turn."""
    x = static_range(x, w.extras["input_activation_scale"])
    y = exact.rounded(dense_matmul(x, w.replace(dtype=str(x.dtype)).dequantize()))
    if bias is not None:
        y = exact.rounded(y + bias.astype(y.dtype))
    return static_range(y, w.extras["output_activation_scale"])


def static_range(x: jax.Array, scale: Any) -> jax.Array:
    """clamp(round(x / scale), -128, 127) * scale in x's dtype; x where the scale is 0 (not calibrated)."""
    scale = jnp.asarray(scale).reshape(()).astype(x.dtype)
    safe = jnp.where(scale != 0, scale, jnp.ones_like(scale))
    codes = jnp.clip(jnp.round(exact.div(x, safe)), -128, 127).astype(x.dtype)
    return jnp.where(scale != 0, exact.rounded(codes * safe), x)
