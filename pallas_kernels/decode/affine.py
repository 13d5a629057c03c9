"""Integer codes -> code - zero as bf16 or fp16, exactly.

bf16: the bits of a small integer k are the number k * 2**-133, subnormal below 128 and still linear up to 255. So two
codes of a word are masked where they lie, at bit 0 or at bit 4, and one fused multiply-add by a power of two makes
(code - zero) / 64 of both: 9 instructions for 8 codes. fp16 has no room for that: there a code in the low mantissa bits
of 1024.0 is that number plus the code, and a subtraction takes off the constant and the zero point together (15).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import Form

order = "split"

MAGIC = 0x6400  # fp16's power of two that keeps integers in its low mantissa bits


def unit(form: Form, dtype: str) -> int:
    """What fragments are to be multiplied with."""
    return 64 if dtype == "bf16" else 1


def shared_bytes(form: Form, wide: bool = False) -> int:
    return 0


def ones(dtype: str) -> int:
    """1 / `unit` in both halves of a register."""
    return pair_of(1 / 64) if dtype == "bf16" else 0x3C003C00


def pair_of(value: float) -> int:
    """A number that bfloat16 holds, in both halves of a register."""
    return (struct.unpack("<I", struct.pack("<f", value))[0] >> 16) * 0x10001


def integer_zeros(dtype: str, pair: Any) -> list[Any]:
    """Zero points of rows g (low byte) and g + 8 (next byte) -> the registers that `fragment` takes."""
    high = MAGIC >> 8 if dtype == "f16" else 0
    text = "prmt.b32 $0, $1, $2, {};"
    codes = [ptx.asm([ptx.i32()], text.format(s), pair, high, pure=True)[0] for s in ("0x4040", "0x4141")]
    return codes if dtype == "f16" else [ptx.mul_pair(z, pair_of(-(2.0**127)), dtype) for z in codes]


def constant_zeros(dtype: str, zero_point: int) -> list[int]:
    return [(MAGIC + zero_point) * 0x10001 if dtype == "f16" else pair_of(-zero_point / 64)] * 2


def fragment(
    form: Form,
    dtype: str,
    words: Sequence[ir.Value],
    zero: Sequence[Any] | None,
    table: Any = None,
    magic: Any = None,
) -> list[ir.Value]:
    """Args:
    words: four words, one per k16 step.
    zero: the two registers of `integer_zeros` / `constant_zeros` (rows g and g + 8).
    magic: for fp16, a register with `MAGIC` in both halves; the arithmetic cannot start before it is there.
    """
    zero = zero or constant_zeros(dtype, form.zero_point)
    if dtype == "bf16":
        return multiplied(words, [pair_of(2.0**127), pair_of(2.0**123)], zero)
    magic = MAGIC * 0x10001 if magic is None else magic
    out = []
    for word in words:
        for p in range(4):
            shift = f"shr.b32 t, $1, {4 * p};" if p else "mov.b32 t, $1;"
            text = f"{{ .reg .b32 t; {shift} lop3.b32 t, t, 0x000F000F, $3, 0xEA; sub.rn.f16x2 $0, t, $2; }}"
            out.append(ptx.asm([ptx.i32()], text, word, zero[p % 2], magic, pure=True)[0])
    return out


def multiplied(words: Sequence[ir.Value], factors: Sequence[Any], terms: Sequence[Any]) -> list[ir.Value]:
    """bf16: code * 2**-133 * factor + term. Registers of rows g + 8 have their codes at bit 4: 16 times as large.

    Args:
      factors, terms: of rows g and g + 8.
    """
    out = []
    for word in words:
        high = ptx.asm([ptx.i32()], "shr.b32 $0, $1, 8;", word, pure=True)[0]
        for p in range(4):
            mask = ("0x000F000F", "0x00F000F0")[p % 2]
            text = f"{{ .reg .b32 t; and.b32 t, $1, {mask}; fma.rn.bf16x2 $0, t, $2, $3; }}"
            source = high if p > 1 else word
            out.append(ptx.asm([ptx.i32()], text, source, factors[p % 2], terms[p % 2], pure=True)[0])
    return out
