"""torchao's quantizers for weights: blocks of a matrix -> codes, scales, zeros (torchao 0.18.0, quant_primitives.py).

Every operation rounds to the weight's dtype unless said otherwise; a quantized value is round(x * (1 / scale)), with the
reciprocal rounded first.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

INT8_EPS = 2.0**-23  # Int8Tensor's smallest scale, for every dtype
# The smallest normal number of a dtype.
NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


def blocks_of(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """[N, K] as [N/r, K/c, r * c]: each block flat."""
    (n, k), (r, c) = w.shape, block
    return np.ascontiguousarray(w.reshape(n // r, r, k // c, c).transpose(0, 2, 1, 3)).reshape(n // r, k // c, r * c)


def unblock(codes: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Inverse of `blocks_of`."""
    (n, k), (r, c) = shape, block
    return np.ascontiguousarray(codes.reshape(n // r, k // c, r, c).transpose(0, 2, 1, 3)).reshape(n, k)


def affine_codes(
    w: np.ndarray,
    block: tuple[int, int],
    low: int,
    high: int,
    *,
    asymmetric: bool = False,
    eps: float | None = None,
    wide_scale: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers of a range.

    Args:
      w: float[N, K].
      block: rows and columns that share a scale.
      low, high: range of the codes.
      asymmetric: with zero points; else the scale is max|w| over half the range.
      eps: smallest scale; None for the smallest normal number of w's dtype.
      wide_scale: keep the scale, and quantize, in float32 (Int8Tensor); its value is computed in w's dtype all the same.

    Returns:
      codes int8[N, K]; scale [N/r, K/c] in w's dtype or float32; zero int8[N/r, K/c].
    """
    dt = w.dtype.type
    x = blocks_of(w, block)
    smallest, largest = np.minimum(x.min(-1), dt(0)), np.maximum(x.max(-1), dt(0))
    floor = dt(NORMAL[str(w.dtype)] if eps is None else eps)
    if asymmetric:
        scale = np.maximum((largest - smallest) / dt(high - low), floor)
        zero = np.clip(dt(low) - np.rint(smallest / scale), dt(low), dt(high))
    else:
        scale = np.maximum(np.maximum(-smallest, largest) / dt((high - low) / 2), floor)
        zero = np.zeros_like(scale)
    if wide_scale:
        scale, x = scale.astype(np.float32), x.astype(np.float32)
    inverse = scale.dtype.type(1) / scale
    codes = np.clip(np.rint(x * inverse[..., None]) + zero[..., None].astype(scale.dtype), low, high)
    return unblock(codes.astype(np.int8), w.shape, block), scale, zero.astype(np.int8)


def float8_codes(w: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Narrow floats: codes [N, K] of `dtype` and float32 scales max|w| / largest, the quotient rounded to w's dtype.

    An all-zero block has scale 0 and NaN codes, as in the original.
    """
    top = float(ml_dtypes.finfo(dtype).max)
    x = blocks_of(w, block)
    scale = (np.abs(x).max(-1) / w.dtype.type(top)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(x.astype(np.float32) / scale[..., None], -top, top).astype(dtype)
    return unblock(codes, w.shape, block), scale


def tinygemm_codes(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit codes 0..15 with a float zero at code 8, for tile-packed tensors.

    Args:
      w: bfloat16[N, K], already padded.
      group: weights along K that share a scale.

    Returns:
      codes uint8[N, K]; scale and zero bfloat16[N, K / group]: weight = (code - 8) * scale + zero.
    """
    dt = w.dtype.type
    x = w.reshape(w.shape[0], -1, group)
    smallest, largest = x.min(-1), x.max(-1)
    scale = np.maximum((largest - smallest) / dt(15), dt(NORMAL[str(w.dtype)]))
    middle = scale * dt(8)
    zero = smallest + middle
    low = zero - middle
    codes = np.clip(np.rint((x - low[..., None]) / scale[..., None]), 0, 15)
    return codes.astype(np.uint8).reshape(w.shape), scale, zero


def plain_int4_codes(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit codes -8..7 with a float zero, float32 arithmetic: `int4_row_quantize_zp` of FBGEMM and mslk (from source).

    Returns:
      codes int8[N, K]; scale and zero in w's dtype, [N, K / group]: weight = code * scale + zero.
    """
    x = w.astype(np.float32).reshape(w.shape[0], -1, group)
    smallest, largest = x.min(-1), x.max(-1)
    scale = np.maximum(largest - smallest, np.float32(1e-6)) / np.float32(15)
    zero = smallest + scale * np.float32(8)
    codes = np.clip(np.rint((x - smallest[..., None]) / scale[..., None]), 0, 15) - 8
    return codes.astype(np.int8).reshape(w.shape), scale.astype(w.dtype), zero.astype(w.dtype)
