"""Activation quantization to float8 of the `fp8`, `fbgemm_fp8` and `modelopt` checkpoints.

Their kernels (Triton, CUTLASS) run on GPUs alone; the rules are read from their sources: transformers 5.23 with
kernels-community/finegrained-fp8, FBGEMM `quantize_fp8_per_row`, nvidia-modelopt 0.47 export. All work in float32:
y = dtype(sum over K of (code * scale) * (weight code * weight scale)). The kernels apply scales to partial sums, and
on tensor cores sum with fewer digits, so outputs agree within a tolerance, codes and scales exactly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import exact
from jq.activation_schemes.elements import round_e2m1
from jq.activations import register
from jq.qtensor import NarrowFloat

TOP = 448.0


def to_e4m3(x: jax.Array) -> jax.Array:
    """float32 -> the nearest e4m3 values (half to even, saturating), as float32."""
    return exact.float8(jnp.clip(x, -TOP, TOP), ml_dtypes.float8_e4m3fn).astype(jnp.float32)


def _product(codes: jax.Array, scale: jax.Array, w: Any, dtype: Any) -> jax.Array:
    """dtype(sum of (codes * scale) * weight), all in float32; scale broadcasts to codes [M, K]."""
    if isinstance(w, NarrowFloat) and w.formula in ("cast", "own"):
        w = w.replace(formula="f32")
    if getattr(w, "formula", "") != "f32_e4m3":  # that one rounds to its own dtype on the way
        w = w.replace(dtype="float32")
    weight = w.replace(activation=None, extras={}).dequantize(np.float32)
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(codes * scale, weight, contract, precision=jax.lax.Precision.HIGHEST)
    return y.astype(dtype)


def quantize_blocks(
    x: jax.Array, cols: int, *, floor: float = 1e-12, pow2: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Dynamic scales of each row and block of `cols` inputs (0: the whole row).

    s = max|x| / 448; codes = e4m3(x / max(s, floor)). With `pow2` (MX weights) s is rounded up to a power of two.

    Returns:
      codes float32 [M, K], scales float32 [M, ceil(K / cols)].
    """
    rows, k = x.shape
    cols = cols or k
    x = jnp.pad(exact.cast(x, jnp.float32), ((0, 0), (0, -k % cols)))
    blocks = x.reshape(rows, -1, cols)
    scale = exact.div(jnp.max(jnp.abs(blocks), axis=-1), jnp.float32(TOP))
    if pow2:
        mantissa, exponent = jnp.frexp(jnp.maximum(scale, jnp.float32(floor)))
        scale = exact.pow2(jnp.where(mantissa == 0.5, exponent - 1, exponent))
    codes = to_e4m3(exact.div(blocks, jnp.maximum(scale, jnp.float32(floor))[..., None]))
    return codes.reshape(rows, -1)[:, :k], scale


def _spread(scale: jax.Array, cols: int, k: int) -> jax.Array:
    """Scales of blocks [M, blocks] -> [M, K]."""
    return jnp.repeat(scale, cols or k, axis=1)[:, :k]


@register("fp8_block")
def fp8_block(x: jax.Array, w: Any) -> jax.Array:
    """Per token and K block, dynamic. Options: "cols" inputs a block (0 = row), "pow2" scales."""
    cols = w.activation.get("cols", 0)
    codes, scale = quantize_blocks(x, cols, pow2=w.activation.get("pow2", False))
    return _product(codes, _spread(scale, cols, x.shape[-1]), w, x.dtype)


@register("fp8_static")
def fp8_static(x: jax.Array, w: Any) -> jax.Array:
    """Per tensor with a stored scale (`parameters[0]`): e4m3(clamp(x / s))."""
    scale = static_scale(w)
    return _product(quantize_static(x, scale), scale, w, x.dtype)


def static_scale(w: Any) -> jax.Array:
    return jnp.asarray(w.extras[w.activation.parameters[0]]).astype(jnp.float32).reshape(())


def quantize_static(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes as float32 [M, K]."""
    return to_e4m3(exact.div(exact.cast(x, jnp.float32), scale))


@register("fbgemm_fp8")
def fbgemm_fp8(x: jax.Array, w: Any) -> jax.Array:
    """Per token with the row maximum bounded by option "upper"; see `quantize_rows`."""
    codes, scale = quantize_rows(x, w.activation.get("upper"))
    return _product(codes, scale, w, x.dtype)


def quantize_rows(x: jax.Array, upper: float | None) -> tuple[jax.Array, jax.Array]:
    """FBGEMM `quantize_fp8_per_row`: s = max(min(max|x|, upper) / 448, 1 / (448 * 512)), codes e4m3(x / s) saturating.

    Returns:
      codes float32 [M, K], scales float32 [M, 1].
    """
    wide = exact.cast(x, jnp.float32)
    peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    if upper is not None:
        peak = jnp.minimum(peak, jnp.float32(upper))
    scale = jnp.maximum(exact.div(peak, jnp.float32(TOP)), jnp.float32(np.float32(1.0 / (TOP * 512.0))))
    return to_e4m3(exact.div(wide, scale)), scale


@register("nvfp4_static")
def nvfp4_static(x: jax.Array, w: Any) -> jax.Array:
    """modelopt's NVFP4 inputs: e4m3 scales of groups of 16 under a stored scale (a multiplier).

    s = e4m3(max|x| / (6 * input_scale)), values = E2M1(x / (s * input_scale)); from the format's source, not run.
    """
    whole = static_scale(w)
    groups = exact.cast(x, jnp.float32).reshape(x.shape[0], -1, w.activation.get("cols", 16))
    peak = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    local = to_e4m3(exact.div(peak, whole * 6))
    step = jnp.where(local == 0, jnp.float32(1), local) * whole
    values = round_e2m1(exact.div(groups, step))
    return _product(values.reshape(x.shape), jnp.broadcast_to(step, groups.shape).reshape(x.shape), w, x.dtype)
