"""Marlin's order of 4-bit codes for tensor cores: AutoGPTQ's and IST-DASLab's files, AutoAWQ's version "marlin".

    words   int32 [K/16, 2N]    codes q + 8 of tiles of 16x16, each run of four tiles (1024 codes) permuted
    scales  float16 [K/G, N]    each run of 64 columns (one group for all inputs: of 32) permuted

AutoGPTQ calls them B and s, AutoAWQ qweight and scales; zero points are 8. The weight is `(code - 8) * scale`, rounded
once. 8-bit codes and 2:4 sparse tiles are marlin-24's (`compressed_tensors_sparse`), which shares the permutation but for
the columns that a thread holds.

Source: IST-DASLab/marlin 2f6d7c1 (`Layer.pack`), autoawq 0.2.9 (modules/linear/marlin.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, expect_shape, take
from jq.qtensor import Affine, Grouping, Source

GROUPED = np.array([i + 8 * j for i in range(8) for j in range(8)])
SINGLE = np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


@cache
def tile_order(bits: int, *, sparse: bool = False) -> np.ndarray:
    """Permutation of the 1024 codes of 16 rows x 64 columns (four 16x16 tiles), interleave within a word included."""
    order = []
    for thread in range(32):
        column = thread // 4
        base = []
        for block in (0, 1):
            for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1):
                place = (column // 2) * 256 + 8 * (column % 2) + 4 * block if sparse else column + 8 * block
                base.append(16 * row + place)
        for j in range(4):
            order += [p + (j if sparse else 256 * j) for p in base]
    within = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return np.array(order).reshape(-1, len(within))[:, within].reshape(-1)


def untile(
    words: np.ndarray, rows: int, n: int, bits: int, *, sparse: bool = False, order: np.ndarray | None = None
) -> np.ndarray:
    """int32 [rows/16, N*bits/2] -> codes int32 [rows, N], as they are stored; `order` in place of Marlin's."""
    order = tile_order(bits, sparse=sparse) if order is None else order
    shuffled = _bits.unpack_words(words, tuple(range(0, 32, bits)), bits).reshape(-1, order.size)
    flat = np.empty_like(shuffled)
    flat[:, order] = shuffled
    return flat.reshape(rows // 16, n // 16, 16, 16).transpose(0, 2, 1, 3).reshape(rows, n)


def tile(codes: np.ndarray, bits: int, *, sparse: bool = False, order: np.ndarray | None = None) -> np.ndarray:
    """Inverse of `untile`."""
    rows, n = codes.shape
    order = tile_order(bits, sparse=sparse) if order is None else order
    flat = codes.reshape(rows // 16, 16, n // 16, 16).transpose(0, 2, 1, 3).reshape(-1, order.size)
    return _bits.pack_words(flat[:, order].reshape(rows // 16, -1), tuple(range(0, 32, bits)), bits, np.int32)


def load(prefix: str, parts: Parts, group_size: int, names: tuple[str, str], source: Source) -> Affine:
    """One module's tensors as a symmetric `Affine`.

    Args:
      group_size: -1 for all inputs.
      names: suffixes of words and scales.

    Raises:
      FormatError: missing tensors, shapes or dtypes that do not fit together.
    """
    words, scales = (take(parts, name, prefix) for name in names)
    expect_dtype(words, (np.int32,), f"{prefix}.{names[0]}")
    expect_dtype(scales, (np.float16, "bfloat16"), f"{prefix}.{names[1]}")
    if (
        words.ndim != 2
        or scales.ndim != 2
        or not words.size
        or words.shape[1] != 2 * scales.shape[1]
        or scales.shape[1] % 64
    ):
        raise FormatError(
            f"{prefix}.{names[0]}: found shape {words.shape} with {names[1]} of {scales.shape}; marlin has (K/16, 2N) with "
            "(groups, N), N a multiple of 64"
        )
    k, n = 16 * words.shape[0], scales.shape[1]
    group = k if group_size == -1 else group_size
    expect_shape(scales, (-(-k // group), n), f"{prefix}.{names[1]}", f"in_features {k} in groups of {group}")
    order = GROUPED if group < k else SINGLE
    plain = np.empty((scales.size // order.size, order.size), scales.dtype)
    plain[:, order] = scales.reshape(-1, order.size)
    made = Affine.make(
        np.ascontiguousarray(untile(words, k, n, 4).T),
        np.ascontiguousarray(plain.reshape(scales.shape).T),
        code_bits=4,
        name=prefix,
        zero_point=8,
        grouping=Grouping("block", 1, group if group < k else 0),
        source=source,
    )
    extras = {name: array for name, array in parts.items() if name not in names}
    return made.replace(extras=extras) if extras else made


def dump(q: Any, names: tuple[str, str]) -> Parts:
    """Stored tensors of a module."""
    scales = np.ascontiguousarray(np.asarray(q.scales).T)
    order = GROUPED if scales.shape[0] > 1 else SINGLE
    extras = {name: np.asarray(array) for name, array in q.extras.items()}
    shuffled = scales.reshape(-1, order.size)[:, order].reshape(scales.shape)
    return {names[0]: tile(np.ascontiguousarray(np.asarray(q.unpack()).T), 4), names[1]: shuffled, **extras}
