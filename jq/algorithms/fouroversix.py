"""Four Over Six: NVFP4 whose blocks are scaled to a largest value of 6 or of 4, whichever is closer; MXFP4 to one of them.

Source: github.com/mit-han-lab/fouroversix of 2026-04-21, quantize/pytorch/reference.py, whose code runs on a CPU. One
difference: values that the scale's rounding raises above 6 saturate there, as in the library's CUDA kernel; the PyTorch
code writes them into the sign bit (blocks whose scale is among the smallest numbers of e4m3).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jq.algorithms import narrow
from jq.algorithms.torch_sum import sum_axis

F32 = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
BLOCK, MX_BLOCK = 16, 32
# rule -> (largest value of a block, largest scale)
LIMITS = {"static_6": (6, 448), "static_4": (4, 448), "mse": (6, 256), "mae": (6, 256), "abs_max": (6, 256)}


def quantize(w: np.ndarray, rule: str, *, square: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, block scales and the largest magnitude.

    Args:
      w: float[N, K]; K a multiple of 16, where `square` N too.
      rule: key of `LIMITS`; "mse", "mae" and "abs_max" choose between 6 and 4 by that error.
      square: scales of 16 x 16 blocks in place of 1 x 16.

    Returns:
      uint8 [N, K] e2m1 codes, uint8 [N, K/16] bit patterns of e4m3, float32 [].
    """
    rows = BLOCK if square else 1
    grid = narrow.tiles(w.astype(F32), (rows, BLOCK)).swapaxes(1, 2)  # [N/rows, K/16, rows, 16]
    blocks = grid.reshape(-1, rows * BLOCK)
    amax = np.asarray(np.abs(blocks).max(), F32)
    values, scales = _scaled(blocks, amax, rule, F32(1))
    codes = _codes(values)
    if not rule.startswith("static"):
        other_values, other_scales = _scaled(blocks, amax, rule, F32(1.5))
        six, four = (_error(blocks, v, s, amax, rule) for v, s in ((values, scales), (other_values, other_scales)))
        codes = np.where((four < six)[:, None], _codes(other_values), codes)
        scales = np.where(four < six, other_scales, scales)
    shaped = codes.reshape(grid.shape).swapaxes(1, 2)
    return narrow.untile(shaped, w.shape), np.repeat(scales.reshape(grid.shape[:2]), rows, axis=0).view(np.uint8), amax


def quantize_mx(w: np.ndarray, rule: str, *, square: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """MXFP4: the exponent of a block's largest magnitude over 6 ("static_6") or 4 ("static_4"), rounded up.

    Args:
      w: float[N, K]; K a multiple of 32, where `square` N too.
      rule: "static_6" or "static_4".
      square: scales of 32 x 32 blocks in place of 1 x 32.

    Returns:
      uint8 [N, K] e2m1 codes, uint8 [N, K/32] exponents + 127 (0 for a block of zeros).
    """
    rows = MX_BLOCK if square else 1
    grid = narrow.tiles(w.astype(F32), (rows, MX_BLOCK)).swapaxes(1, 2)
    blocks = grid.reshape(-1, rows * MX_BLOCK)
    step = np.abs(blocks).max(axis=1) / F32(LIMITS[rule][0])
    stored = (step.view(np.int32) + 0x7FFFFF) >> 23
    values = np.where(stored[:, None] == 0, F32(0), np.ldexp(blocks, 127 - stored[:, None]))
    shaped = _codes(values).reshape(grid.shape).swapaxes(1, 2)
    return narrow.untile(shaped, w.shape), np.repeat(stored.reshape(grid.shape[:2]), rows, axis=0).astype(np.uint8)


def _scaled(blocks: np.ndarray, amax: np.ndarray, rule: str, expansion: np.floating) -> tuple[np.ndarray, np.ndarray]:
    """Blocks divided by their scales, and the scales in e4m3."""
    top, scale_top = LIMITS[rule]
    whole = F32(top * scale_top)
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = np.abs(blocks).max(axis=1) / F32(top) * (whole / amax) * expansion
        scales = np.where(amax == 0, F32(0), np.minimum(peak, F32(448))).astype(E4M3)
        step = F32(1) / (whole / amax)
        values = blocks * (F32(1) / (step * scales.astype(F32)[:, None]))
    return np.where(scales.astype(F32)[:, None] != 0, values, F32(0)), scales


def _codes(values: np.ndarray) -> np.ndarray:
    return narrow.e2m1_codes(values, keep_zero_sign=False)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The nearest number that e2m1 has, and multiples of 2 above 6."""
    size = np.abs(values)
    step = np.where(size < 2, F32(0.5), np.where(size < 4, F32(1), F32(2)))
    return np.sign(values) * np.rint(size / step) * step


def _error(blocks: np.ndarray, values: np.ndarray, scales: np.ndarray, amax: np.ndarray, rule: str) -> np.ndarray:
    """Error of each block, float32, sums in torch's order."""
    top, scale_top = LIMITS[rule]
    dense = _rounded(values) * scales.astype(F32)[:, None] * amax / F32(top * scale_top)
    off = dense - blocks
    if rule == "mse":
        return sum_axis(off * off, 1)
    return np.abs(off).max(axis=1) if rule == "abs_max" else sum_axis(np.abs(off), 1)
