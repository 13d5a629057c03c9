"""Ranges and absolute maxima of groups along K and of blocks of the flattened weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jq.errors import FormatError

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
CHUNK = 1 << 16  # weights at a time: intermediate float32 arrays stay in the cache


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of an [N, K] array, about `CHUNK` elements each."""
    step = max(1, CHUNK // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def weight(w: Any, name: str, *, dtypes: Sequence[Any] = FLOATS, stacked: bool | None = False) -> np.ndarray:
    """What every method begins with: the weight to quantize as contiguous rows, float[N, K].

    Args:
      dtypes: those that the method takes.
      stacked: whether it is a stack [E, N, K] of weights; None: it may be.

    Raises:
      FormatError: another shape or type, or no element.
      ValueError: it holds NaN or infinity, which some scale rules would turn into numbers.
    """
    w, expected = np.asarray(w), tuple(map(np.dtype, dtypes))
    if w.ndim not in {False: (2,), True: (3,), None: (2, 3)}[stacked] or w.dtype not in expected or not w.size:
        axes = {False: "", True: "experts, ", None: "(experts,) "}[stacked]
        raise FormatError(
            f"{name}: found {w.dtype}{list(w.shape)}, expected {', '.join(map(str, expected))} "
            f"[{axes}out_features, in_features], none of them 0"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(w.sum(dtype=np.float32)) and not np.isfinite(w.astype(np.float32)).all():
            raise ValueError(f"{name}: holds values that are not finite; nothing can be rounded to them")
    return np.ascontiguousarray(w)


def group_ranges(w: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest weight of each group of `group_size` inputs (-1 = all): float32[N, ceil(K / group_size)].

    NaN anywhere in a group makes both NaN.
    """
    n, k = w.shape
    size = k if group_size == -1 else min(group_size, k)
    starts = np.arange(0, k, size)
    low, high = np.empty((n, starts.size), np.float32), np.empty((n, starts.size), np.float32)
    for rows in row_slices(w.shape):
        wide = w[rows].astype(np.float32)  # 16-bit comparisons are several times slower
        if k % size == 0:
            groups = wide.reshape(-1, starts.size, size)
            low[rows], high[rows] = groups.min(axis=2), groups.max(axis=2)
        else:
            low[rows], high[rows] = (f.reduceat(wide, starts, axis=1) for f in (np.minimum, np.maximum))
    return low, high


def spread(params: np.ndarray, group_size: int, k: int) -> np.ndarray:
    """One parameter per group [N, groups] as one per weight [N, k]."""
    size = k if group_size == -1 else min(group_size, k)
    return np.repeat(params, size, axis=1)[:, :k]


def block_absmax(flat: np.ndarray, block_size: int) -> np.ndarray:
    """Largest |value| of each block of `block_size` consecutive values: float32[ceil(n / block_size)]."""
    whole = flat.size // block_size * block_size
    top = np.abs(flat[:whole].reshape(-1, block_size)).max(axis=1)
    if whole < flat.size:
        top = np.append(top, np.abs(flat[whole:]).max())
    return top.astype(np.float32)
