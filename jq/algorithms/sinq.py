"""SINQ: rounding after the rows and columns of a matrix were brought to one standard deviation (Sinkhorn-Knopp).

Source: sinq 0.2.0 (sinkhorn.py `sinkhorn_log`, dual_shift.py `quantize_dual_scale_shift`, quantizer.py `rtn8`), whose
code runs on a CPU. Standard deviations are summed in float64 there too, so their order does not show. Exponentials and
logarithms are rounded from float64 here; torch's are off by up to one unit in the last place now and then, which moves a
code only where a quotient lies on the border of two.
"""

from __future__ import annotations

import numpy as np

F32, HALF = np.float32, np.float16
STEPS = 16
KURTOSIS = 5.0  # a matrix with heavier tails is rounded without normalization


def deviation(x: np.ndarray, axis: int) -> np.ndarray:
    """Standard deviation with n - 1, summed in float64, float32."""
    return x.astype(np.float64).std(axis=axis, ddof=1).astype(F32)


def sinkhorn(x: np.ndarray, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divisors of columns and rows after which all standard deviations are about equal.

    Args:
      x: float32[T, N, K], T matrices.

    Returns:
      x / columns / rows float32[T, N, K], columns float32[T, 1, K], rows float32[T, N, 1]: those of the step with the
      smallest ratio of largest to smallest deviation. Steps end for a matrix whose ratio rises.
    """
    least, most = F32(1e-3), F32(1e3)
    low = np.minimum(*(np.clip(deviation(x, axis), least, most).min(axis=1) for axis in (1, 2)))
    target = (low + F32(1e-6))[:, None]
    log_columns, log_rows = np.zeros((len(x), x.shape[2]), F32), np.zeros((len(x), x.shape[1]), F32)
    best_columns, best_rows = np.ones_like(log_columns), np.ones_like(log_rows)
    best = _imbalance(x)
    running = np.ones((len(x), 1), F32)
    for _ in range(steps):
        columns, rows = _exp(log_columns), _exp(log_rows)
        current = (x / columns[:, None, :]) / rows[:, :, None]
        ratio = _imbalance(current)
        better = (ratio <= best)[:, None]
        best = np.minimum(best, ratio)
        best_columns = np.where(better, columns, best_columns)
        best_rows = np.where(better, rows, best_rows)
        running = np.where((ratio > best)[:, None], F32(0), running)
        log_columns = np.clip(log_columns + _step(current, 1, target) * running, F32(-0.3), F32(10))
        log_rows = np.clip(log_rows + _step(current, 2, target) * running, F32(-0.3), F32(10))
    columns, rows = best_columns[:, None, :], best_rows[:, :, None]
    return x / columns / rows, columns, rows


def _imbalance(x: np.ndarray) -> np.ndarray:
    """Largest deviation of a row or column over the smallest, float32[T]."""
    along = [deviation(x, axis) for axis in (1, 2)]
    low = np.maximum(np.minimum(*(d.min(axis=1) for d in along)), F32(1e-12))
    return np.maximum(*(d.max(axis=1) for d in along)) / low


def _step(x: np.ndarray, axis: int, target: np.ndarray) -> np.ndarray:
    """Logarithm of each deviation over the target, held to 0.7 .. 2."""
    spread = np.clip(deviation(x, axis), F32(1e-3), F32(1e3))
    return np.log(np.clip(spread / target, F32(0.7), F32(2)).astype(np.float64)).astype(F32)


def _exp(x: np.ndarray) -> np.ndarray:
    return np.exp(x.astype(np.float64)).astype(F32)


def heavy_tailed(w: np.ndarray) -> bool:
    """Whether the kurtosis of w is above `KURTOSIS`."""
    centred = w.astype(np.float64).reshape(-1)
    centred = centred - centred.mean()
    square = max((centred**2).mean(), 1e-6)
    return bool((centred**4).mean() / square**2 > KURTOSIS)


def quantize(w: np.ndarray, bits: int, *, plain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, row scales, zero points and column scales of tiles.

    Args:
      w: float16[T, N, K], T tiles that are normalized on their own.
      plain: do not normalize (heavy tails).

    Returns:
      uint8[T, N, K]; float16[T, N, 1] scales of rows and zero points; float16[T, 1, K] scales of columns:
      w ~ (code - zero) * row * column.
    """
    top = F32((1 << bits) - 1)
    scaled, columns, rows = sinkhorn(w.astype(F32))
    if plain:
        scaled = scaled * columns * rows
        columns, rows = np.ones_like(columns), np.ones_like(rows)
    high, low = scaled.max(axis=2, keepdims=True), scaled.min(axis=2, keepdims=True)
    step = np.maximum(high - low, F32(1e-4)) / top
    zero = -np.rint(low / step)
    codes = np.clip(np.rint(scaled / step + zero), 0, top).astype(np.uint8)
    with np.errstate(over="ignore"):
        return codes, (step * rows).astype(HALF), zero.astype(HALF), columns.astype(HALF)


def bytes_of(x: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float16 values as bytes with a step and an offset for each column: `rtn8`.

    Args:
      x: float16, any shape of a size that `rows` divides.

    Returns:
      uint8[rows, C], steps float16[1, C], offsets float16[1, C].
    """
    x = x.reshape(rows, -1)
    offset = x.min(axis=0, keepdims=True)
    above = x - offset
    step = (above.max(axis=0, keepdims=True).astype(F32) / F32(255)).astype(HALF)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.rint(above / step), nan=0.0, posinf=255.0)  # a column of equal values: 0 / 0
    return np.clip(ratio, 0, 255).astype(np.uint8), step, offset
