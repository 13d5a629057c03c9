"""Four Over Six: inputs rounded as the weights are, to NVFP4 with one largest magnitude for the whole call, or to MXFP4.

After github.com/mit-han-lab/fouroversix of 2026-04-21 (quantize/pytorch/reference.py, matmul/pytorch.py), whose PyTorch
code runs on a CPU: both sides dequantized to float32, float32 sums.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.activation_schemes.elements import round_e2m1
from jq.activation_schemes.products import float_sums
from jq.activations import register
from jq.algorithms.fouroversix import BLOCK, LIMITS, MX_BLOCK


@register("fouroversix")
def fouroversix(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N] in the dtype that the weights dequantize to."""
    if w.activation.get("dtype") == "mxfp4":
        inputs = dequantized_mx(x, w.activation.get("rule"))
    else:
        inputs = dequantized(x, w.activation.get("rule"))
    return float_sums(inputs, w.replace(dtype="float32").dequantize()).astype(np.dtype(w.dtype))


def dequantized(x: jax.Array, rule: str) -> jax.Array:
    """x float[M, K] after e2m1 values, e4m3 scales of 16 and one largest magnitude: float32[M, K]."""
    blocks = x.astype(jnp.float32).reshape(-1, BLOCK)
    amax = jnp.max(jnp.abs(blocks))
    dense = _dense(blocks, amax, rule, 1.0)
    if not rule.startswith("static"):
        other = _dense(blocks, amax, rule, 1.5)
        closer = _error(other - blocks, rule) < _error(dense - blocks, rule)
        dense = jnp.where(closer[:, None], other, dense)
    return dense.reshape(x.shape)


def dequantized_mx(x: jax.Array, rule: str) -> jax.Array:
    """x float[M, K] after e2m1 values with exponents of 32, rounded up: float32[M, K]."""
    blocks = x.astype(jnp.float32).reshape(-1, MX_BLOCK)
    peak = exact.div(jnp.max(jnp.abs(blocks), axis=1), jnp.float32(LIMITS[rule][0]))
    stored = (jax.lax.bitcast_convert_type(peak, jnp.int32) + 0x7FFFFF) >> 23
    step = exact.pow2(stored - 127)[:, None]
    values = jnp.where(stored[:, None] == 0, jnp.float32(0), blocks * exact.pow2(127 - stored)[:, None])
    half = jnp.where(step > 2.0**-25, step, jnp.float32(0)).astype(jnp.float16).astype(jnp.float32)
    dense = exact.rounded((round_e2m1(values) * half).astype(jnp.float16))
    return dense.astype(jnp.float32).reshape(x.shape)


def _dense(blocks: jax.Array, amax: jax.Array, rule: str, expansion: float) -> jax.Array:
    top, scale_top = LIMITS[rule]
    whole = exact.div(jnp.float32(top * scale_top), jnp.where(amax == 0, jnp.float32(1), amax))
    peak = exact.div(jnp.max(jnp.abs(blocks), axis=1), jnp.float32(top)) * whole * jnp.float32(expansion)
    scales = exact.float8(jnp.minimum(peak, jnp.float32(448)), jnp.float8_e4m3fn).astype(jnp.float32)[:, None]
    step = exact.reciprocal(whole) * scales
    values = blocks * exact.reciprocal(jnp.where(scales == 0, jnp.float32(1), step))
    raised = round_e2m1(values) * scales * amax
    return jnp.where(scales == 0, jnp.float32(0), exact.div(raised, jnp.float32(top * scale_top)))


def _error(off: jax.Array, rule: str) -> jax.Array:
    """Error of each block; XLA's order of sums, so blocks whose two errors are equal but for rounding may differ."""
    if rule == "mse":
        return jnp.sum(off * off, axis=1)
    return jnp.max(jnp.abs(off), axis=1) if rule == "abs_max" else jnp.sum(jnp.abs(off), axis=1)
