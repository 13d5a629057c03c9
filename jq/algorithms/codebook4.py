"""bitsandbytes' 4-bit quantization (NF4, FP4) and its 8-bit quantization of block maxima (double quantization).

The target is the library's CPU code (bitsandbytes 0.50.2: backends/default/ops.py, csrc/cpu_ops.cpp); codes, maxima and
offsets are its bits.
Its CUDA code differs at ties (it divides approximately, has decimal FP4 midpoints and compares |x|), in the codes of
all-zero NF4 blocks (0 in place of 7), in the last bits of `nested_offset`, and in 0.2 % of the nested codes.
All numpy, float32, one rounding a step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from jq.algorithms import blocks, torch_sum

# Quantiles of a normal distribution (QLoRA, appendix E), in code order; sorted.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
# A float of 1 sign, 2 exponent and 1 mantissa bits, in code order; bit 3 is the sign.
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4_MAGNITUDES, np.where(_FP4_MAGNITUDES == 0, np.float32(0), -_FP4_MAGNITUDES)])
TABLES = {"nf4": NF4, "fp4": FP4}
for _table in TABLES.values():
    _table.setflags(write=False)  # all tensors hold the same one
# Codes by value; of FP4's two zeros (0 and 8) 0 comes first, as the library's sort leaves them.
_BY_VALUE = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
_LEAST = np.float32(
    1e-38
)  # what the library divides by where a block is all zeros; in a last, short block it stores that


class Nested(NamedTuple):
    """Quantized block maxima: `f32(f32(table[code] * absmax[i // 256]) + offset)`.

    Fields:
      codes: uint8[blocks].
      absmax: float32[ceil(blocks / 256)].
      offset: float32, the mean that was subtracted.
      table: float32[256].
    """

    codes: np.ndarray
    absmax: np.ndarray
    offset: np.float32
    table: np.ndarray


def quantize(w: np.ndarray, *, kind: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes and block maxima; blocks run over the flattened weight.

    Args:
      w: float32, float16 or bfloat16, any shape.
      kind: "nf4" or "fp4".

    Returns:
      uint8 codes in w's shape and float32[ceil(w.size / block_size)].
    """
    flat = w.reshape(-1)
    table, order = TABLES[kind][_BY_VALUE[kind]], _BY_VALUE[kind]
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    absmax = np.empty(-(-flat.size // block_size), np.float32)
    codes = np.empty(flat.size, np.uint8)
    step = max(1, blocks.CHUNK // block_size) * block_size
    for start in range(0, flat.size, step):
        part = flat[start : start + step].astype(np.float32)
        a = blocks.block_absmax(part, block_size)
        if part.size % block_size:
            a[-1] = max(a[-1], _LEAST)
        absmax[start // block_size : start // block_size + a.size] = a
        codes[start : start + part.size] = order[_below(_normalized(part, a, block_size), middles)]
    return codes.reshape(w.shape), absmax


def _normalized(part: np.ndarray, absmax: np.ndarray, block_size: int) -> np.ndarray:
    """part / absmax in [-1, 1]: a product with the reciprocal, but a quotient in a last block that is not full."""
    whole = part.size // block_size
    out = np.empty_like(part)
    inverse = np.float32(1) / np.maximum(absmax[:whole, None], _LEAST)
    head = part[: whole * block_size].reshape(whole, block_size)
    np.multiply(head, inverse, out=out[: whole * block_size].reshape(whole, block_size))
    out[whole * block_size :] = part[whole * block_size :] / absmax[-1]
    return np.clip(out, -1, 1, out=out)


def _below(values: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """How many midpoints are smaller than each value: uint8, an index into the sorted table."""
    count = np.zeros(values.shape, np.uint8)
    for middle in middles:
        count += values > middle
    return count


def quantize_absmax(absmax: np.ndarray) -> Nested:
    """8-bit codes of block maxima, in blocks of 256 around their mean.

    The library looks a normalized value up on a grid of 65536 points, which moves 0.2 % of the codes by one against
    the nearest entry. The mean is torch's, summed on one thread (more than 32768 maxima are summed in parts by
    several threads there, which can change its last bit).
    """
    table = dynamic_map()
    offset = torch_sum.mean_all(absmax)
    centered = absmax - offset
    top = blocks.block_absmax(centered, NESTED_BLOCK)
    f = np.float32
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        v = centered * np.repeat(f(1) / top, NESTED_BLOCK)[: centered.size]
    v = np.clip(np.nan_to_num(v, nan=-1.0), f(-1), f(1))  # all maxima equal: 0 * inf, which the library reads as -1
    index = (((v + f(1)) * f(0.5)) * f(65535) + f(0.5)).astype(np.uint16)
    grid = f(-1) + (2 * index.astype(np.int64)).astype(f) / f(65535)
    middles = (table[:-1] + table[1:]) * f(0.5)
    codes = np.searchsorted(middles, grid, side="left").astype(np.uint8)
    return Nested(codes, top, offset, table)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type (`create_dynamic_map`), sorted, float32."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        middle = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (i - 6)) * middle
        values += [float(s) for s in scaled] + [-float(s) for s in scaled]
    table = np.sort(np.array(values, np.float32))
    table.setflags(write=False)
    return table


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """torch.linspace in float32: half counts up from the start, half down from the end, each with one rounding (fma)."""
    f = np.float32
    step = np.float64((f(stop) - f(start)) / f(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, f(start) + step * i, f(stop) - step * (count - 1 - i)).astype(f)
