"""Sums of float32 in the order in which torch adds on a CPU, so that a mean has the same last bit.

Source: ATen/native/cpu/SumKernel.cpp (torch 2.13, `cascade_sum`), checked against torch on random matrices of many
shapes. torch adds in vectors of 8 lanes (its AVX2 code, also on AVX-512 machines), four rows interleaved, with partial
sums in four levels. A sum over more than 32768 elements in all is split over threads there; this is one thread's order.
"""

from __future__ import annotations

import numpy as np

LANES = 8
INTERLEAVED = 4
LEVELS = 4


def sum_axis(x: np.ndarray, axis: int) -> np.ndarray:
    """`torch.sum(x, axis)` of a contiguous float32[R, C]: [C] for axis 0, [R] for axis 1."""
    return _outer(x) if axis == 0 else _inner(x)


def mean_axis(x: np.ndarray, axis: int) -> np.ndarray:
    """`torch.mean(x, axis, keepdim=True)` of a contiguous float32[R, C]."""
    return np.expand_dims(sum_axis(x, axis) / np.float32(x.shape[axis]), axis)


def mean_all(x: np.ndarray) -> np.float32:
    """`x.mean()` of a contiguous float32 array, on one thread."""
    return sum_axis(x.reshape(1, -1), 1)[0] / np.float32(x.size)


def _inner(x: np.ndarray) -> np.ndarray:
    """Sum of each row: lanes side by side, then the rest of the row, then the lanes in order."""
    rows, count = x.shape
    if count < LANES:
        return _interleaved(x.T)
    whole = count // LANES
    lanes = _interleaved(np.moveaxis(x[:, : whole * LANES].reshape(rows, whole, LANES), 1, 0))
    total = np.zeros(rows, np.float32)
    for k in range(whole * LANES, count):
        total = total + x[:, k]
    for k in range(LANES):
        total = total + lanes[:, k]
    return total


def _outer(x: np.ndarray) -> np.ndarray:
    """Sum of each column: blocks of four vectors (or four columns) row by row, what is left over interleaved."""
    columns = x.shape[1]
    block = INTERLEAVED * LANES if columns >= LANES else INTERLEAVED
    full = columns // block * block
    return np.concatenate([_cascade(x[:, :full]), _interleaved(x[:, full:])])


def _interleaved(x: np.ndarray) -> np.ndarray:
    """Sum over axis 0 in four interleaved streams that are added at the end."""
    whole = x.shape[0] // INTERLEAVED
    streams = _cascade(x[: whole * INTERLEAVED].reshape(whole, INTERLEAVED, *x.shape[1:]))
    total = streams[0]
    for i in range(whole * INTERLEAVED, x.shape[0]):
        total = total + x[i]
    for k in range(1, INTERLEAVED):
        total = total + streams[k]
    return total


def _cascade(x: np.ndarray) -> np.ndarray:
    """Sum over axis 0 with partial sums of 2**power terms at each of four levels."""
    size = x.shape[0]
    power = max(4, (max(size, 1) - 1).bit_length() // LEVELS)
    step = 1 << power
    partial = []
    for level in range(LEVELS):
        whole = x.shape[0] // step * step if level < LEVELS - 1 else 0
        partial.append(_sequential(x[whole:]))
        x = _sequential(np.moveaxis(x[:whole].reshape(whole // step, step, *x.shape[1:]), 1, 0))
    total = partial[0]
    for p in partial[1:]:
        total = total + p
    return total


def _sequential(x: np.ndarray) -> np.ndarray:
    total = np.zeros(x.shape[1:], np.float32)
    for i in range(x.shape[0]):
        total = total + x[i]
    return total
