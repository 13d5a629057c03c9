"""Codes of a 16-entry table -> its values, two at a time, by a look-up in shared memory.

Arithmetic with byte permutes is limited by the integer units (+37 % at M = 1 on an H100), the load unit is free. The
table holds all 256 pairs of values; each entry is repeated for the 32 lanes of a warp, so that every lane has a bank
of its own and no look-up conflicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

# Codebooks that kernels hold, by `Form.table`: bitsandbytes' two and the 4-bit float of MXFP4.
KNOWN = {**codebook4.TABLES, "e2m1": TABLES["e2m1"]}


def name_of(table: Any) -> str:
    """Of a codebook float32[..., 16] (or of all those of a stack) that kernels hold, or ""."""
    if isinstance(table, jax.core.Tracer):
        return ""
    return next((name for name, values in KNOWN.items() if np.all(np.asarray(table) == values)), "")


def unit(form: Form, dtype: str) -> int:
    return 1


def shared_bytes(form: Form) -> int:
    return 256 * ENTRY


def fill(form: Form, dtype: str, base: Int, table: ir.Value | None, thread: Int, threads: int) -> None:
    """Writes the pair table; entry b holds (table[b % 16], table[b // 16]).

    Args:
      base: shared-memory address.
      table: global address of float32[16], or None where `form` names the values.
      thread, threads: index and number of the threads that share the work.
    """
    write(form, dtype, base, read(form, table, thread, threads))


def read(form: Form, table: ir.Value | None, thread: Int, threads: int) -> list[tuple[Int, list[ir.Value]]]:
    """A thread's entries, to be written when they have come: (number, its two values); no values where `form` names
    them.
    """
    out = []
    for first in range(0, 256, threads):
        b = (thread + first) & 255  # more than 256 threads: some write the same
        halves = () if table is None or form.table else (b & 15, b >> 4)
        out.append((b, [ptx.load_global(ptx.address(table, half, 4), "f32") for half in halves]))
    return out


def write(form: Form, dtype: str, base: Int, entries: Sequence[tuple[Int, list[ir.Value]]]) -> None:
    for b, values in entries:
        pair = ptx.pack_pair(values[0], values[1], dtype) if values else known_pair(KNOWN[form.table], b, dtype)
        for i in range(0, ENTRY, 16):
            # neighbouring threads start at different banks
            at = base + b * ENTRY + ((b * 16 + i) & (ENTRY - 1))
            ptx.store_shared(at, [pair] * 4)


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


def fragment(form: Form, dtype: str, words: Sequence[ir.Value], zero: Any, table: Int) -> list[ir.Value]:
    """Args:
    words: four words, one per k16 step.
    table: shared-memory address of the pair table plus four times the lane.
    """
    out = []
    for word in words:
        for p in range(4):
            # a byte permute and a multiplication: shift, mask and addition would be one more, and all for one unit
            text = (
                f"{{ .reg .b32 t; prmt.b32 t, $1, 0, 0x444{p}; mad.lo.u32 t, t, {ENTRY}, $2; ld.shared.b32 $0, [t]; }}"
            )
            out.append(ptx.asm([ptx.i32()], text, word, table, pure=True)[0])
    return out
