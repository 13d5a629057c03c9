"""Floats of 8 bits -> bf16 or fp16, exactly; NaN stays NaN.

e4m3 goes through the conversion of two codes at once that the hardware has, e5m2 is the upper half of fp16. Both are
fp16 numbers of few digits, so that the way on to bf16 by float32 rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode.affine import shared_bytes
from pallas_kernels.form import Form

__all__ = ["fragment", "order", "shared_bytes", "unit"]

order = "pairs"


def unit(form: Form, dtype: str) -> int:
    return 1


_TO_BF16 = (
    "mov.b32 {a, b}, h; cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 $0, y, x;",
    ".reg .b16 a, b; .reg .f32 x, y;",
)


def fragment(
    form: Form, dtype: str, words: Sequence[ir.Value], zero: Any = None, table: Any = None, magic: Any = None
) -> list[ir.Value]:
    """Arguments as `affine.fragment`; two words a k16 step. Registers 2j and 2j + 1 of a step come from its word j."""
    out = []
    for word in words:
        for row in (0, 1):
            if form.kind == "e4m3":
                half = f"{{ .reg .b16 l, u; mov.b32 {{l, u}}, $1; cvt.rn.f16x2.e4m3x2 h, {'lu'[row]}; }}"
            else:  # the two bytes into the upper halves
                half = f"prmt.b32 h, $1, 0, {('0x1404', '0x3424')[row]};"
            if dtype == "f16":
                text = f"{{ .reg .b32 h; {half} mov.b32 $0, h; }}"
            else:
                text = f"{{ .reg .b32 h; {_TO_BF16[1]} {half} {_TO_BF16[0]} }}"
            out.append(ptx.asm([ptx.i32()], text, word, pure=True)[0])
    return out
