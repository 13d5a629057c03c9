"""EXL3's tiles: 16 x 16 weights as one circular stream of 256 * b bits, each weight a window of 16 bits of it.

Weight t of a tile is the value that a codebook gives to bits [(t + 1) * b - 16, (t + 1) * b) of the stream (QTIP's
"bitshift trellis"); the stream is the tile's 32-bit words, highest bit first. The order of weights is that of a
tensor-core fragment (`places`). Codebooks are arithmetic on the window, in float16:

    3inst   x * 89226354 + 64248484, masked into two float16 that are added
    mcg     x * 0xCBAC1FED, the same
    mul1    the sum of the four bytes of x * 0x83DCD12D, mapped by one fma

Source: exllamav3 1.4.1 (exllamav3_ext/quant/codebook.cuh, exl3_dq.cuh; modules/quant/exl3_lib/quantize.py); gptqmodel
7.7.0 has the same in torch (nn_modules/exllamav3_torch.py), which runs on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jq.qtensor.base import look_up

Array = Any
BITS = tuple(range(1, 9))
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
CODEBOOKS = ("3inst", *MULTIPLIERS)


@functools.cache
def places() -> np.ndarray:
    """Stream position of the weight at (n, k) of a tile, int[16, 16]."""
    found = np.empty((16, 16), np.int64)
    for lane in range(32):
        inputs = [2 * (lane % 4) + i for i in (0, 1, 8, 9)]
        for j in range(8):
            found[lane // 4 + 8 * (j // 4), inputs[j % 4]] = 8 * lane + j
    return found


@functools.cache
def values(codebook: str) -> np.ndarray:
    """float32[65536]: the value of each window, a float16."""
    x = np.arange(1 << 16, dtype=np.uint32)
    if codebook == "mul1":
        total = (x * np.uint32(MULTIPLIERS["mul1"])).view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.uint16)
        number = (total + np.uint16(0x6400)).view(np.float16).astype(np.float64)
        factor, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        exact = number * factor + offset  # in float64
        return exact.astype(np.float16).astype(np.float32)
    x = x * np.uint32(89226354) + np.uint32(64248484) if codebook == "3inst" else x * np.uint32(MULTIPLIERS["mcg"])
    halves = ((x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)).view(np.float16).reshape(-1, 2)
    return (halves[:, 0] + halves[:, 1]).astype(np.float32)


def decode(words: Array, bits: int, codebook: str) -> Array:
    """Tiles uint32[B, 8 * bits] -> float32[B, 256], rows of outputs, then inputs."""
    end = (places().reshape(-1) + 1) * bits
    first, last = (end - 16) // 32 % (8 * bits), (end - 1) // 32
    shift = ((last + 1) * 32 - end).astype(np.uint32)
    low = words[:, last] >> shift
    crossing = np.where(first != last, np.uint32(0xFFFF), np.uint32(0))
    high = (words[:, first] << ((32 - shift) % 32).astype(np.uint32)) & crossing
    return look_up(values(codebook), (low | high) & np.uint32(0xFFFF))
