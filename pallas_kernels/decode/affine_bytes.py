"""8-bit integer codes -> code - zero as bf16 or fp16, exactly.

fp16 has room for a code in the low mantissa bits of 1024.0: one byte permute sets both halves of a register. bf16 has
seven bits of mantissa. There the low half of a code goes into those of 128.0 and the high half into those of 2048.0,
whose last place is 16; each part of the zero point is taken off its half, and the halves are added. Every step is exact:
integers up to 256 are bf16 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode.affine import MAGIC, fill, shared_bytes
from pallas_kernels.form import Form
from pallas_kernels.ptx import Int

__all__ = ["constant_zeros", "fill", "fragment", "integer_zeros", "order", "shared_bytes"]

order = "bytes"

HIGH = 0x4500  # 2048 in bf16

# What is subtracted from the halves of a code, in both halves of a register: (low, high); (whole, None) for fp16.
Zero = tuple[Any, Any]


def integer_zeros(dtype: str, pair: Any) -> list[Zero]:
    """Zero points of rows g (low byte) and g + 8 (next byte) -> what `fragment` subtracts."""
    if dtype == "f16":
        text = "prmt.b32 $0, $1, $2, {};"
        high = MAGIC[dtype] >> 8
        return [(ptx.asm([ptx.i32()], text.format(s), pair, high, pure=True)[0], None) for s in ("0x4040", "0x4141")]
    pair, out = Int(pair), []
    for row in (0, 1):
        zero = (pair >> (8 * row)) & 255
        out.append(((zero & 15) * 0x10001 + MAGIC[dtype] * 0x10001, (zero >> 4) * 0x10001 + HIGH * 0x10001))
    return out


def constant_zeros(dtype: str, zero_point: int) -> list[Zero]:
    if dtype == "f16":
        return [((MAGIC[dtype] + zero_point) * 0x10001, None)] * 2
    low, high = zero_point & 15, zero_point >> 4
    if low == 0:  # with the constant of the low half: one subtraction less
        return [(None, (HIGH + high + 8) * 0x10001)] * 2
    return [((MAGIC[dtype] + low) * 0x10001, (HIGH + high) * 0x10001)] * 2


def fragment(
    form: Form,
    dtype: str,
    words: Sequence[ir.Value],
    zero: Sequence[Any] | None,
    table: Any = None,
    magic: Any = None,
) -> list[ir.Value]:
    """Arguments as `affine.fragment`; two words a k16 step. Registers 2j and 2j + 1 of a step come from its word j."""
    zero = zero or constant_zeros(dtype, form.zero_point)
    magic = MAGIC[dtype] * 0x10001 if magic is None else magic
    out = []
    for word in words:
        for row in (0, 1):
            low, high = zero[row]
            if dtype == "f16":
                bytes_ = ("0x5250", "0x5351")[row]
                text = f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {bytes_}; sub.rn.f16x2 $0, t, $3; }}"
                out.append(ptx.asm([ptx.i32()], text, word, magic, low, pure=True)[0])
                continue
            first = f"shr.b32 l, $1, {8 * row};" if row else "mov.b32 l, $1;"
            text = (
                f"{{ .reg .b32 l, h; {first} shr.b32 h, $1, {8 * row + 4}; lop3.b32 l, l, 0x000F000F, $2, 0xEA; "
                f"lop3.b32 h, h, 0x000F000F, {HIGH * 0x10001}, 0xEA; sub.rn.bf16x2 h, h, $3; "
            )
            text += "" if low is None else "sub.rn.bf16x2 l, l, $4; "
            operands = (word, magic, high) if low is None else (word, magic, high, low)
            out.append(ptx.asm([ptx.i32()], text + "add.rn.bf16x2 $0, l, h; }", *operands, pure=True)[0])
    return out
