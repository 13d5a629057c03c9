"""8-bit integer codes -> code - zero as bf16 or fp16, exactly; the ways of `affine`, with a code in each half of a register.

bf16: the bits of k up to 255 are the number k * 2**-133, and integers up to 256 are bf16 numbers, so that one fused
multiply-add makes (code - zero) / 64. fp16: a byte permute puts codes into the low mantissa bits of 1024.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode.affine import MAGIC, constant_zeros, integer_zeros, pair_of, shared_bytes, unit
from pallas_kernels.form import Form

__all__ = ["constant_zeros", "fragment", "integer_zeros", "order", "shared_bytes", "unit"]

order = "bytes"


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
    magic = MAGIC * 0x10001 if magic is None else magic
    out = []
    for word in words:
        for row in (0, 1):
            if dtype == "f16":
                chosen = ("0x5250", "0x5351")[row]
                text = f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {chosen}; sub.rn.f16x2 $0, t, $3; }}"
                out.append(ptx.asm([ptx.i32()], text, word, magic, zero[row], pure=True)[0])
                continue
            chosen = ("and.b32 t, $1, 0x00FF00FF;", "prmt.b32 t, $1, 0, 0x4341;")[row]
            text = f"{{ .reg .b32 t; {chosen} fma.rn.bf16x2 $0, t, $2, $3; }}"
            out.append(ptx.asm([ptx.i32()], text, word, pair_of(2.0**127), zero[row], pure=True)[0])
    return out
