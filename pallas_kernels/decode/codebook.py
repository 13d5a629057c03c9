"""Codes of a 16-entry table -> its values, two at a time, by a look-up in shared memory.

Arithmetic with byte permutes is limited by the integer units (+37 % at M = 1 on an H100), the load unit is free. The
table holds all 256 pairs of values; each entry is repeated for the 32 lanes of a warp, so that every lane has a bank
of its own and no look-up conflicts.

The bytes of an address are those of the codes and of the lane, so that a byte permute makes it: entries lie 256 bytes
apart. A wide table leaves every other 128 bytes free; in a narrow one the upper half of the entries lies there, and the
upper bit of the codes must be moved to the lane's byte first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxlib.mlir import ir

from jq.algorithms import codebook4
from jq.qtensor.narrow_float import TABLES
from pallas_kernels import ptx
from pallas_kernels.form import Form
from pallas_kernels.ptx import Int

order = "natural"

ENTRY = 128  # bytes: one pair for each of 32 lanes
PITCH = 256  # bytes from one entry to the next one

# Codebooks that kernels hold, by `Form.table`: bitsandbytes' two and the 4-bit float of MXFP4.
KNOWN = {**codebook4.TABLES, "e2m1": TABLES["e2m1"]}


def name_of(table: Any) -> str:
    """Of a codebook float32[..., 16] (or of all those of a stack) that kernels hold, or ""."""
    if isinstance(table, jax.core.Tracer):
        return ""
    return next((name for name, values in KNOWN.items() if np.all(np.asarray(table) == values)), "")


def unit(form: Form, dtype: str) -> int:
    return 1


def shared_bytes(form: Form, wide: bool = False) -> int:
    return 256 * (PITCH if wide else ENTRY)


def offset(entry: Int, wide: bool) -> Int:
    """Where an entry begins."""
    return entry * PITCH if wide else (entry & 127) * PITCH + (entry >> 7) * ENTRY


class Pairs:
    """The pair table as a lane sees it."""

    def __init__(self, base: Int, lane: Int, wide: bool):
        """`base`: shared-memory address."""
        self.base, self.wide = base, wide
        self.lane = lane * (4 if wide else 0x04040404)  # the lane's place in an entry, in one byte or in all

    def addresses(self, word: ir.Value) -> list[Int]:
        """Where the four pairs of a word lie."""
        low, high = self.lane, Int(word)
        if not self.wide:
            low, high = (high & 0x80808080) | low, high & 0x7F7F7F7F
        # bytes of an address: the lane's, the pair's, and two zeros: a byte of the lane, or the sign of the pair's
        picks = [0x1140 + 0x10 * p if self.wide else 0xCC40 + 0x1111 * p for p in range(4)]
        return [Int(ptx.permute(low, high, pick)) + self.base for pick in picks]


class Part(NamedTuple):
    """What a thread writes of an entry of the pair table. Entry b holds (table[b % 16], table[b // 16])."""

    number: Int
    values: list[ir.Value]  # of the pair; none where the form names them
    begin: Int  # bytes in the entry
    size: int


def read(form: Form, table: ir.Value | None, thread: Int, threads: int) -> list[Part]:
    """A thread's parts of the pair table, to be written when they have come.

    Args:
      table: global address of float32[16], or None where `form` names the values.
      thread, threads: index and number of the threads that share the work.
    """
    parts = 1 << max(0, (threads // 256).bit_length() - 1)  # of an entry's copies, where there are threads for each
    out = []
    for first in range(0, 256, threads):
        b = (thread + first) & 255  # more than 256 threads for each part: some write the same
        halves = () if table is None or form.table else (b & 15, b >> 4)
        values = [ptx.load_global(ptx.address(table, half, 4), "f32") for half in halves]
        out.append(Part(b, values, (thread >> 8 & (parts - 1)) * (ENTRY // parts), ENTRY // parts))
    return out


def write(form: Form, dtype: str, base: Int, parts: Sequence[Part], wide: bool = False) -> None:
    for b, values, begin, size in parts:
        place = base + offset(b, wide)
        pair = ptx.pack_pair(values[0], values[1], dtype) if values else known_pair(KNOWN[form.table], b, dtype)
        for i in range(0, size, 16):
            # neighbouring threads start at different banks
            ptx.store_shared(place + ((b * 16 + begin + i) & (ENTRY - 1)), [pair] * 4)


def known_pair(table: np.ndarray, entry: Int, dtype: str) -> ir.Value:
    """(table[entry % 16], table[entry // 16]) of 16 constants, by byte permutes: low and high bytes of the values with
    the lower and the upper half of the codes, then of the halves, then in order.
    """
    kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[dtype]
    halves = table.astype(kind).view(np.uint8).reshape(2, 8, 2)  # by bit 3 of a code, by the rest, low and high byte
    place, half = entry & 0x77, ((entry >> 1) & 0x44) | 0x10
    found = []
    for byte in range(2):
        (a, b), (c, d) = halves[:, :, byte].copy().view(np.uint32).tolist()
        found.append(ptx.permute(ptx.permute(a, b, place), ptx.permute(c, d, place), half))
    return ptx.permute(found[0], found[1], 0x5140)


def fragment(
    form: Form, dtype: str, words: Sequence[ir.Value], zero: Any, table: Pairs, here: bool = False
) -> list[ir.Value]:
    """Args:
    words: four words, one per k16 step.
    here: the look-ups leave here, in their order. As plain loads they are moved to where their values are used, a few at
      once, and each of them is waited for.
    """
    return [ptx.look_up(at, here) for word in words for at in table.addresses(word)]
