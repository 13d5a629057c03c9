"""Integer codes -> code - zero as bf16 or fp16, exactly.

A 4-bit code in the low mantissa bits of 128.0 (bf16) or 1024.0 (fp16) is that number plus the code: one `lop3` masks
and sets the exponent of two codes at once, one subtraction takes off the constant and the zero point together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import Form
from pallas_kernels.ptx import Int

order = "split"

# dtype -> bit pattern of the power of two that keeps integers in its low mantissa bits
MAGIC = {"bf16": 0x4300, "f16": 0x6400}


def shared_bytes(form: Form) -> int:
    return 0


def fill(form: Form, dtype: str, base: Int, table: ir.Value, thread: Int, threads: int) -> None:
    """No tables."""


def integer_zeros(dtype: str, pair: Any) -> list[Any]:
    """Zero points of rows g (low byte) and g + 8 (next byte) -> what `fragment` subtracts from both halves."""
    high = MAGIC[dtype] >> 8
    text = "prmt.b32 $0, $1, $2, {};"
    return [ptx.asm([ptx.i32()], text.format(s), pair, high, pure=True)[0] for s in ("0x4040", "0x4141")]


def constant_zeros(dtype: str, zero_point: int) -> list[int]:
    return [(MAGIC[dtype] + zero_point) * 0x10001] * 2


def lift(form: Form, dtype: str) -> int:
    """What a lifted fragment has too much, negative, in both halves of a register."""
    return constant_zeros(dtype, form.zero_point)[0] ^ 0x80008000


def fragment(
    form: Form,
    dtype: str,
    words: Sequence[ir.Value],
    zero: Sequence[Any] | None,
    table: Any = None,
    magic: Any = None,
    lifted: bool = False,
) -> list[ir.Value]:
    """Args:
    words: four words, one per k16 step.
    zero: the two registers of `integer_zeros` / `constant_zeros` (rows g and g + 8).
    magic: a register with `MAGIC` in both halves; the arithmetic cannot start before it is there.
    lifted: leave `MAGIC` and the zero point on the codes; see `lift`.
    """
    kind = f"{dtype}x2"
    magic = MAGIC[dtype] * 0x10001 if magic is None else magic
    zero = zero or constant_zeros(dtype, form.zero_point)
    out = []
    for word in words:
        for p in range(4):
            shift = f"shr.b32 t, $1, {4 * p};" if p else "mov.b32 t, $1;"
            last = "mov.b32 $0, t;" if lifted else f"sub.rn.{kind} $0, t, $2;"
            text = f"{{ .reg .b32 t; {shift} lop3.b32 t, t, 0x000F000F, $3, 0xEA; {last} }}"
            out.append(ptx.asm([ptx.i32()], text, word, zero[p % 2], magic, pure=True)[0])
    return out
