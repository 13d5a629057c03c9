"""The orders of AWQ's words: gemm's eight columns and the interleaved one of gemv_fast and llm-awq."""

from __future__ import annotations

import numpy as np

from jq import bits as _bits
from jq.qtensor.affine import pack_zeros

# Bit of column c of the eight that a gemm word holds.
GEMM_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def gemm_codes(words: np.ndarray, n: int, bits: int) -> np.ndarray:
    """Codes int32[R, n] of gemm words int32[R, ceil(n*b/32)]."""
    if bits == 4:
        return _bits.unpack_words(words, GEMM_SHIFTS, 4)[:, :n]
    return _bits.unpack(words, bits, n)


def gemm_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `gemm_codes`; bits that no code uses are zero."""
    if bits == 4:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
        return _bits.pack_words(codes, GEMM_SHIFTS, 4, np.int32)
    rows = pack_zeros(codes, bits)
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))).view(np.int32)


def fast_codes(words: np.ndarray) -> np.ndarray:
    """Codes int32[N, K] of interleaved words int16[N/4, K].

    Four rows share a row of words; of each row the 64 inputs of a block take 16 words in turn. Inside 32 inputs the
    order is that of the tensor-core fragment (pairs 0 1 8 9 16 17 24 25 ...), inside 8 even before odd.
    """
    n, k = words.shape[0] * 4, words.shape[1]
    codes = _bits.unpack_words(words, (0, 4, 8, 12), 4)
    codes = codes.reshape(n // 4, k // 64, 4, 64).transpose(0, 2, 1, 3).reshape(n, k)
    codes = codes.reshape(n, k // 32, 4, 2, 4).transpose(0, 1, 2, 4, 3).reshape(n, k // 32, 32)
    return codes.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(n, k)


def fast_words(codes: np.ndarray) -> np.ndarray:
    """Inverse of `fast_codes`: integer[N, K] -> int16[N/4, K]."""
    n, k = codes.shape
    codes = codes.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(n, k // 32, 32)
    codes = codes.reshape(n, k // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3).reshape(n, k)
    codes = codes.reshape(n // 4, 4, k // 64, 64).transpose(0, 2, 1, 3).reshape(n // 4, k * 4)
    return _bits.pack_words(codes, (0, 4, 8, 12), 4, np.int16)
