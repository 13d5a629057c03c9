"""Ranges and absolute maxima of groups along K and of blocks of the flattened weight."""

from __future__ import annotations

import numpy as np


def group_ranges(w: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest weight of each group of `group_size` inputs (-1 = all): float32[N, ceil(K / group_size)].

    NaN anywhere in a group makes both NaN.
    """
    k = w.shape[1]
    size = k if group_size == -1 else min(group_size, k)
    starts = np.arange(0, k, size)
    return (
        np.minimum.reduceat(w, starts, axis=1).astype(np.float32),
        np.maximum.reduceat(w, starts, axis=1).astype(np.float32),
    )


def block_absmax(flat: np.ndarray, block_size: int) -> np.ndarray:
    """Largest |value| of each block of `block_size` consecutive values: float32[ceil(n / block_size)]."""
    starts = np.arange(0, flat.shape[0], block_size)
    high = np.maximum.reduceat(flat, starts).astype(np.float32)
    low = np.minimum.reduceat(flat, starts).astype(np.float32)
    return np.maximum(np.abs(high), np.abs(low))
