"""The half-quadratic quantizer of HQQ: a weight matrix and its groups -> codes, scales, zeros.

Source: hqq 0.2.8 (core/quantize.py `Quantizer.quantize`, core/optimize.py `optimize_weights_proximal_legacy`), the
path that hqq takes on a CPU: everything in float32. On a CUDA device hqq runs the solver in float16 and gets other
zeros; that is not reproduced.
"""

from __future__ import annotations

import numpy as np

from jq.algorithms.torch_sum import mean_all, mean_axis

NBITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
_F = np.float32

LP_NORM = 0.7
BETA = 10.0
ITERATIONS = 20


def max_code(nbits: float) -> int:
    """Largest code: 2**nbits - 1, rounded (1.58 bit: 2)."""
    return round(2**nbits - 1)


def hqq_codes(
    w: np.ndarray, *, top: int, axis: int, round_zero: bool, optimize: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes the groups of a matrix.

    Args:
      w: float32[R, C]; a group is a row (axis 1) or a column (axis 0).
      top: largest code.
      axis: axis that statistics run along.
      round_zero: round the starting zeros to integers.
      optimize: refine the zeros so that sum |w - dequantized|**0.7 falls.

    Returns:
      codes uint8[R, C]; scale float32 (multiplies at dequantization) and zero float32, [R, 1] or [1, C].
    """
    low, high = w.min(axis, keepdims=True), w.max(axis, keepdims=True)
    span = high - low
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # torch computes number / tensor as number * reciprocal; a division gives other scales in 0.4 % of the codes.
        scale = _F(1) / span * _F(top)
    scale = np.where(np.abs(span) <= _F(1e-4), _F(1), scale)
    scale = np.minimum(scale, _F(2e4))
    zero = -low * scale
    if round_zero:
        zero = np.rint(zero)
    if optimize:
        zero = _refine_zero(w, scale, zero, top, axis)
    codes = np.clip(np.rint(w * scale + zero), 0, top).astype(np.uint8)
    return codes, _F(1) / scale, zero


def _refine_zero(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int, axis: int) -> np.ndarray:
    """Half-quadratic splitting: alternates a shrinkage of the residual and a closed-form zero, until the error rises.

    The zero of the step that made the error rise is kept, as hqq keeps it.
    """
    best = _F(np.inf)
    for _ in range(ITERATIONS):
        codes = np.clip(np.rint(w * scale + zero), 0, top)
        residual = w - (codes - zero) / scale
        zero = mean_axis(codes - (w - shrink(residual)) * scale, axis)
        error = mean_all(np.abs(residual))
        if not error < best:
            break
        best = error
    return zero


def shrink(residual: np.ndarray) -> np.ndarray:
    """Generalized soft threshold of the Lp norm: sign(r) * max(|r| - |r|**(p - 1) / beta, 0)."""
    size = np.abs(residual)
    with np.errstate(divide="ignore"):
        # The power is rounded once from float64, which agrees with torch's vector code more often than numpy's own.
        power = np.power(size.astype(np.float64), float(_F(LP_NORM - 1))).astype(_F)
    return np.maximum(size - _F(1 / BETA) * power, 0) * np.sign(residual)
