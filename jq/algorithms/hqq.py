"""The half-quadratic quantizer of HQQ: a weight matrix and its groups -> codes, scales, zeros.

Source: hqq 0.2.8 (core/quantize.py `Quantizer.quantize`, core/optimize.py `optimize_weights_proximal_legacy`), the
path that hqq takes on a CPU: everything in float32. On a CUDA device hqq runs the solver in float16 and gets other
zeros; that is not reproduced.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jq.algorithms.torch_sum import mean_all, mean_axis

NBITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
_F = np.float32

LP_NORM = 0.7
BETA = 10.0
ITERATIONS = 20
PIECE = 1 << 16  # weights that are worked on at once


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
    best, size = _F(np.inf), np.empty(w.shape, _F)
    zero = zero.copy()
    pieces = _pieces(w.shape, axis)

    def step(piece: tuple[slice, slice]) -> None:
        """Some groups: their zeros, and the magnitudes of their residuals."""
        groups = (piece[0], slice(None)) if axis == 1 else (slice(None), piece[1])
        part, factor = w[piece], scale[groups]
        codes = np.clip(np.rint(part * factor + zero[groups]), 0, top)
        residual = part - (codes - zero[groups]) / factor
        size[piece] = np.abs(residual)
        zero[groups] = mean_axis(codes - (part - shrink(residual)) * factor, axis)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # groups do not depend on each other, so neither does any bit
        for _ in range(ITERATIONS):
            list(pool.map(step, pieces))
            error = mean_all(size)
            if not error < best:
                break
            best = error
    return zero


def _pieces(shape: tuple[int, int], axis: int) -> list[tuple[slice, slice]]:
    """Whole groups that stay in a processor's cache. Columns are cut at multiples of 32, which torch sums as a block."""
    rows, columns = shape
    if axis == 1:
        count = max(1, PIECE // columns)
        return [(slice(i, i + count), slice(None)) for i in range(0, rows, count)]
    count = max(32, PIECE // rows // 32 * 32)
    edges = list(range(0, columns, count))
    if len(edges) > 1 and columns - edges[-1] < 32:  # what is left over is summed in another order: keep it whole
        edges.pop()
    return [(slice(None), slice(i, j)) for i, j in zip(edges, [*edges[1:], columns])]


def shrink(residual: np.ndarray) -> np.ndarray:
    """Generalized soft threshold of the Lp norm: sign(r) * max(|r| - |r|**(p - 1) / beta, 0)."""
    size = np.abs(residual)
    with np.errstate(divide="ignore"):
        # torch's power is correctly rounded (seen), numpy's float32 one is not; this is, to within 1e-8 of all cases.
        power = np.exp(np.log(size.astype(np.float64)) * float(_F(LP_NORM - 1))).astype(_F)
    return np.maximum(size - _F(1 / BETA) * power, 0) * np.sign(residual)
