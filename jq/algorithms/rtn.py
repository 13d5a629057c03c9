"""Rounding to nearest with a scale (and a zero point) per group of input features.

The range of a group always contains 0, as in GPTQ's `Quantizer.find_params`. Two deliberate differences to it: a
symmetric group is symmetric even when all its weights have one sign (there the original halves the scale and clips),
and codes are rounded against the scale as it is stored (float16, say), not against its float32 value, so that the
error is at most half a stored step.
"""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from jq.algorithms import blocks


def parameters(
    w: np.ndarray, *, bits: int, group_size: int, sym: bool, scale_dtype: str, name: str = "weight"
) -> tuple[np.ndarray, np.ndarray | int]:
    """Scales and zero points.

    Args:
      w: float[N, K].
      group_size: inputs per scale, -1 for K; the last group may be short.

    Returns:
      scales scale_dtype[N, groups] and zeros: int32[N, groups], or the one zero point 2**(bits-1) where `sym`.

    Raises:
      ValueError: scales that overflow `scale_dtype`.
    """
    low, high = blocks.group_ranges(w, group_size)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    top = (1 << bits) - 1
    width = np.maximum(high, -low) * 2 if sym else high - low
    with np.errstate(over="ignore", under="ignore"):
        scales = (width / np.float32(top)).astype(np.dtype(scale_dtype))
    # An all-zero group, or one so small that its scale rounds to 0: any scale stores it, 1 divides without a warning.
    scales = np.where(scales == 0, np.ones((), scales.dtype), scales)
    if not np.isfinite(scales.astype(np.float32)).all():
        raise ValueError(
            f"{name}: scales up to {width.max() / top:.3g} overflow {scale_dtype}; use scale_dtype='bfloat16'"
        )
    if sym:
        return scales, 1 << (bits - 1)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, top).astype(np.int32)
    return scales, zeros


def codes(w: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int, *, bits: int, group_size: int) -> np.ndarray:
    """clip(round(w / scale) + zero): uint8[N, K], half to even, computed in float32."""
    k = w.shape[1]
    out = np.empty(w.shape, np.uint8)
    for rows in blocks.row_slices(w.shape):
        zero = zeros if isinstance(zeros, int) else blocks.spread(zeros[rows], group_size, k)
        scale = blocks.spread(scales[rows].astype(np.float32), group_size, k)
        quotient = np.rint(w[rows].astype(np.float32) / scale)
        out[rows] = np.clip(quotient + zero, 0, (1 << bits) - 1)
    return out
