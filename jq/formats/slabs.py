"""Packing along the first axis in slabs: how HQQ, quanto and BitNet store a matrix of codes in words.

With `per` codes to a word and R rows, the packed matrix has S = ceil(R / per) rows: word (s, c) holds the codes of rows
s, s + S, s + 2S, ... of column c. HQQ puts the first slab into the highest bits, quanto and BitNet into the lowest.
Missing rows of the last slab are zero bits.
"""

from __future__ import annotations

import numpy as np


def unpack_slabs(packed: np.ndarray, bits: int, per: int, *, high_first: bool) -> np.ndarray:
    """Codes of a slab-packed matrix.

    Args:
      packed: uint8 or uint32[S, C].
      bits: width of a code.
      per: codes of a word.
      high_first: the first slab lies in the highest bits that are used (bit bits * (per - 1) and up).

    Returns:
      uint8[S * per, C], padding rows included.
    """
    mask = packed.dtype.type((1 << bits) - 1)
    places = range(per - 1, -1, -1) if high_first else range(per)
    slabs = [((packed >> packed.dtype.type(bits * i)) & mask).astype(np.uint8) for i in places]
    return slabs[0] if per == 1 else np.concatenate(slabs)


def pack_slabs(codes: np.ndarray, bits: int, per: int, *, high_first: bool, dtype: type = np.uint8) -> np.ndarray:
    """Inverse of `unpack_slabs`: integer[R, C] -> dtype[ceil(R / per), C]."""
    rows = -(-codes.shape[0] // per)
    packed = np.zeros((rows, codes.shape[1]), dtype)
    for i in range(per):
        slab: np.ndarray = codes[i * rows : (i + 1) * rows].astype(dtype)
        place = per - 1 - i if high_first else i
        packed[: len(slab)] |= slab << packed.dtype.type(bits * place)
    return packed
