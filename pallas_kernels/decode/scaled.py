"""Weights with their scale, as 16-bit floats: what wgmma takes, where one accumulator runs over all groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES, affine
from pallas_kernels.form import Form
from pallas_kernels.ptx import Int

EXPONENTS = (133, 129)  # a code of row g is k * 2**-133 where it lies, one of row g + 8 is 16 times that
SHIFT = 8  # scales below `SMALL` times 2**133 / 2**SHIFT are finite


def as_floats(kind: str, stored: Sequence[ir.Value]) -> list[ir.Value]:
    """Two stored parameters (rows g and g + 8) as float32."""
    if kind == "f32":
        return list(stored)
    pair = Int(stored[0])
    if kind == "bf16":
        return [ptx.as_float(pair << 16), ptx.as_float(pair & 0xFFFF0000)]
    if kind == "e8m0":  # the exponent of a float32
        return [ptx.as_float((pair & 255) << 23), ptx.as_float((pair >> 8) << 23)]
    if kind == "u8":
        return [ptx.asm([ptx.f32()], "cvt.rn.f32.u32 $0, $1;", half, pure=True)[0] for half in (pair & 255, pair >> 8)]
    text = "{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, $1; cvt.f32.f16 $0, {}; }}"
    return [ptx.asm([ptx.f32()], text.format(half), pair, pure=True)[0] for half in ("lo", "hi")]


def twice(kind: str, dtype: str, stored: Sequence[ir.Value]) -> list[ir.Value]:
    """Two stored parameters, each in both halves of a register of `dtype`."""
    if kind == dtype:
        text = "prmt.b32 $0, $1, $1, {};"
        return [ptx.asm([ptx.i32()], text.format(s), stored[0], pure=True)[0] for s in ("0x1010", "0x3232")]
    return [ptx.pack_pair(v, v, dtype) for v in as_floats(kind, stored)]


def shifts(form: Form, scale: Sequence[ir.Value], zero: Sequence[ir.Value]) -> list[ir.Value]:
    """What a zero adds to (code - form.zero_point) * scale, float32."""
    point, minus = ptx.constant(form.zero_point), ptx.constant(-1)
    if form.zero_form == "code":
        return [ptx.mul(s, ptx.fma(z, minus, point)) for s, z in zip(scale, zero)]
    sign = minus if form.zero_form == "minus" else ptx.constant(1)
    return [ptx.fma(s, point, ptx.mul(sign, z)) for s, z in zip(scale, zero)]


def folds(form: Form, dtype: str) -> bool:
    """Whether `Powers` is for this form: the zero point's product with a scale must be exact."""
    plain = form.kind == "affine" and form.bits == 4 and not form.zero and dtype == "bf16"
    return plain and (form.small or form.scale == "bf16") and form.zero_point & (form.zero_point - 1) == 0


class Powers:
    """The scale inside of the decode's multiply-add: weights of rows g and g + 8, divided by powers of two.

    A code is k * 2**-133, so the scale is multiplied with 2**133 / 2**q. That must be finite: q is 8 for scales below
    `SMALL`, and follows from the row's largest scale where some are not. Every weight is rounded as the product of scale
    and code is.

    Fields:
      factors: 2**(133 - q) of row g and 2**(129 - q) of row g + 8, each in both halves of a register.
    """

    def __init__(self, largest: Sequence[Int] = ()):
        """`largest`: bits of the largest absolute scales of the two rows, bfloat16; none where all are small."""
        self.known = not largest
        self.factors: list[Any] = [affine.pair_of(2.0 ** (p - SHIFT)) for p in EXPONENTS]
        for i, bits in enumerate(largest):
            widest = EXPONENTS[i] - SHIFT + 127  # exponent bits
            fitting = widest + 129 - (bits >> 7)
            self.factors[i] = ptx.raw((ptx.select(fitting < widest, fitting, widest) << 7) * 0x10001)

    def fragment(self, form: Form, words: Sequence[ir.Value], params: Sequence) -> list[ir.Value]:
        """Words of one or more k16 steps -> weights, four registers a step."""
        scale = twice(form.scale, "bf16", params[0])
        factors = [ptx.mul_pair(s, f, "bf16") for s, f in zip(scale, self.factors)]
        points = (-form.zero_point * 2.0**-p for p in EXPONENTS)
        terms = [ptx.mul_pair(f, affine.pair_of(p), "bf16") for f, p in zip(factors, points)]
        return affine.multiplied(words, factors, terms)

    def whole(self, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """The sums times 2**q: in two steps where it can be more than a float holds."""
        if self.known:
            return [ptx.mul(s, ptx.constant(2.0**SHIFT)) for s in sums]
        q = [p + 127 - ((Int(f) >> 7) & 255) for p, f in zip(EXPONENTS, self.factors)]
        gains = [[ptx.as_float((part + 127) << 23) for part in (v >> 1, v - (v >> 1))] for v in q]
        return [ptx.mul(ptx.mul(s, gains[i // 2 % 2][0]), gains[i // 2 % 2][1]) for i, s in enumerate(sums)]


def scaled_fragment(
    form: Form,
    dtype: str,
    words: Sequence[ir.Value],
    params: Sequence[Sequence[ir.Value]],
    table: Any,
    magic: Any = None,
) -> list[ir.Value]:
    """Words of one or more k16 steps -> weights / `unit`, four registers a step.

    Args:
      params: stored scales (and zeros) of rows g and g + 8.
      table: `codebook.Pairs` of a codebook.
      magic: see `affine.fragment`.
    """
    kind = f"{dtype}x2"
    decode = DECODES[form.decode]
    if form.kind != "affine":
        return scaled(form, dtype, decode.fragment(form, dtype, words, None, table), params)
    scale = twice(form.scale, dtype, params[0])
    if form.zero == "u8" and form.zero_form == "code":
        values = decode.fragment(form, dtype, words, decode.integer_zeros(dtype, params[1][0]), magic=magic)
    else:
        values = decode.fragment(form, dtype, words, None, magic=magic)
        if form.zero:
            shift = shifts(form, as_floats(form.scale, params[0]), as_floats(form.zero, params[1]))
            small = ptx.constant(1 / affine.unit(form, dtype))
            add = [ptx.pack_pair(s, s, dtype) for s in (ptx.mul(s, small) for s in shift)]
            text = f"fma.rn.{kind} $0, $1, $2, $3;"
            return [ptx.asm([ptx.i32()], text, v, scale[i % 2], add[i % 2], pure=True)[0] for i, v in enumerate(values)]
    return scaled(form, dtype, values, params)


def scaled(form: Form, dtype: str, values: Sequence[ir.Value], params: Sequence[Sequence[ir.Value]]) -> list[ir.Value]:
    """Decoded values times their stored scales."""
    scale = twice(form.scale, dtype, params[0])
    return [ptx.mul_pair(v, scale[i % 2], dtype) for i, v in enumerate(values)]
