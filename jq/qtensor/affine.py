"""`Affine`: integer codes with a scale and a zero point per group."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq import exact
from jq.bits import namespace
from jq.errors import FormatError
from jq.qtensor.base import (
    Array,
    Grouping,
    QTensor,
    Rows,
    Source,
    codes_shape,
    dense_value,
    expand,
    groups_of,
    padding,
    register,
    row_codes,
)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Affine(QTensor):
    """`weight[n, k] = formula(code[n, k], scale, zero)`, mostly `(code - zero) * scale`.

    Fields:
      codes: packed codes, uint32 or uint8 [*stack, N, W] (`jq.bits.pack` order), or a nested `Sparse` of integers.
      scales: [*stack, N', groups] for block grouping, [*stack, groups] for flat and strided ones; or a nested QTensor
        ([*stack, 1, groups] for flat and strided grouping).
      zeros: None (then `zero_point` is the zero of every group); an array like scales; a nested QTensor; or packed
        uint8 words [*stack, N', ceil(groups * zeros_bits / 8)] where `zeros_bits` > 0.
      g_idx: int32[*stack, K], group of each input feature, or None for k // grouping.cols.
      extras: stored tensors carried for saving or for activation quantization.
      code_bits: width of a code, 1..8.
      signed: codes are two's complement.
      zero_point: the zero where `zeros` is None.
      formula: key of `FORMULAS`, the order of roundings.
      dtype: dtype of the dequantized weight.
      pad: padding codes at the end of each packed row.
    """

    kind_name: ClassVar[str] = "affine"
    data_fields: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "g_idx", "extras")

    codes: Array
    scales: Any
    zeros: Any = None
    g_idx: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    code_bits: int = 4
    signed: bool = False
    zero_point: int = 0
    zeros_bits: int = 0
    grouping: Grouping = Grouping()
    formula: str = "sub_mul"
    dtype: str = "float16"
    pad: int = 0
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    @classmethod
    def make(cls, codes: Array, scales: Any, *, code_bits: int, name: str = "weight", **fields: Any) -> Self:
        """Builds from unpacked codes [*stack, N, K] and checks that the parts fit together.

        Args:
          codes: integer[*stack, N, K].
          scales, zeros, g_idx, ...: as the fields; integer `zeros` may be given unpacked with `zeros_bits` set.
          name: tensor name for error messages.

        Raises:
          FormatError: shapes that do not fit, g_idx out of range, scales that are not finite.
        """
        in_features = codes.shape[-1]
        packed = _bits.pack(codes, code_bits)
        zeros_bits, zeros = fields.get("zeros_bits", 0), fields.get("zeros")
        if zeros_bits and zeros is not None and zeros.dtype != np.uint8:
            fields["zeros"] = pack_zeros(zeros, zeros_bits)
        fields.setdefault("dtype", str(np.dtype(scales.dtype)))
        made = cls(packed, scales, code_bits=code_bits, pad=padding(packed, code_bits, in_features), **fields)
        made.check(name)
        return made

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the arrays disagree; see `make`."""
        n, k = self.shape[-2:]
        if self.formula not in FORMULAS:
            raise FormatError(f"{name}: unknown dequantization formula {self.formula!r}; known: {', '.join(FORMULAS)}")
        if self.grouping.kind == "block":
            rows, cols = groups_of(n, self.grouping.rows), groups_of(k, self.grouping.cols)
            found = tuple(self.scales.shape[-2:])
            if found[0] not in (rows, 1) or (found[1] < cols and self.g_idx is None):
                raise FormatError(
                    f"{name}: scales of shape {found}, expected ({rows}, {cols}) for a weight of ({n}, {k}) with {self.grouping}"
                )
        self._check_counts(name)
        if self.g_idx is not None:
            check_indices(self.g_idx, self.scales.shape[-1], f"{name}: g_idx")
            if self.g_idx.shape[-1] != k:
                raise FormatError(f"{name}: g_idx has {self.g_idx.shape[-1]} entries, expected in_features = {k}")
        for part in ("scales", "zeros"):
            found = getattr(self, part)
            if found is not None and not isinstance(found, QTensor):
                check_finite(found, f"{name}: {part}")
        if self.formula == "div":
            check_divisor(self.scales, f"{name}: scales")
        check_inputs(self, name)

    def _check_counts(self, name: str) -> None:
        """Raises `FormatError` where scales or zeros are too few: JAX would repeat the last or fail much later."""
        n, k = self.shape[-2:]
        if self.grouping.kind != "block":
            need = -(-n * k // self.grouping.cols)
            for part in ("scales", "zeros"):
                found = getattr(self, part)
                if found is not None and (
                    found.shape[-1] < need or (found.shape[-1] > need and self.grouping.kind == "strided")
                ):
                    raise FormatError(
                        f"{name}: {found.shape[-1]} {part}, expected {need} for ({n}, {k}) with {self.grouping}"
                    )
            return
        if self.zeros is None or self.zeros_bits:
            return
        zeros, scales = tuple(self.zeros.shape[-2:]), tuple(self.scales.shape[-2:])
        enough = len(zeros) == 2 and (zeros[1] >= scales[1] or (zeros[1] == 1 and self.g_idx is None))
        if not enough or zeros[0] not in (scales[0], 1):
            raise FormatError(f"{name}: zeros of shape {tuple(self.zeros.shape)} beside scales of {scales}")

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def shape(self) -> tuple[int, ...]:
        return codes_shape(self.codes, self.code_bits, self.pad, self.layout)

    @property
    def group_size(self) -> int:
        """Weights along K that share a scale."""
        return self.grouping.cols or self.in_features

    def describe(self) -> str:
        if np.dtype(self.codes.dtype).kind not in "iu":
            return f"ternary of {self.codes.dtype} masters, {self.grouping}"
        kind = "sym" if self.zeros is None else "asym"
        order = ", act-order" if self.g_idx is not None else ""
        return f"int{self.code_bits} {kind}, {self.grouping}{order}"

    def unpack(self) -> Array:
        if np.dtype(self.codes.dtype).kind not in "iu":  # master weights, ternarized at every call (BitNet online)
            xp = namespace(self.codes, self.scales)
            return xp.clip(xp.rint(self.codes.astype(np.float32) * self.scales), -1, 1).astype(np.int32)
        return row_codes(self.codes, self.code_bits, self.pad, signed=self.signed)

    def group_zeros(self) -> Array | None:
        """Zeros one per group, in code units unless the format says otherwise; None where `zero_point` holds."""
        if self.zeros is None or not self.zeros_bits:
            return self._per_group(self.zeros)
        return _bits.unpack(self.zeros, self.zeros_bits, self.scales.shape[-1])

    def _per_group(self, param: Any) -> Array:
        """A parameter with its values one per group; a nested one of flat or strided groups is [1, groups]."""
        value = dense_value(param)
        return value.reshape(-1) if isinstance(param, QTensor) and self.grouping.kind != "block" else value

    def _dense(self) -> Array:
        shape = self.shape
        spread = functools.partial(expand, grouping=self.grouping, shape=shape, g_idx=self.g_idx)
        zeros = self.group_zeros()
        zero = np.int32(self.zero_point) if zeros is None else spread(zeros)
        dense = FORMULAS[self.formula](self.unpack(), spread(self._per_group(self.scales)), zero, np.dtype(self.dtype))
        return namespace(dense).broadcast_to(dense, shape)

    def _rows(self, index: Rows) -> Self:
        nested = isinstance(self.scales, QTensor) or isinstance(self.codes, QTensor)
        blocks = self.grouping.rows > 1
        if self.grouping.kind != "block" or nested or (blocks and isinstance(index, slice)):
            return super()._rows(index)
        tall = index // self.grouping.rows if blocks else index

        def cut(a: Any) -> Any:
            return a if a is None or isinstance(a, QTensor) or a.shape[0] == 1 else a[tall]

        grouping = dataclasses.replace(self.grouping, rows=1) if blocks else self.grouping
        return self.replace(codes=self.codes[index], scales=cut(self.scales), zeros=cut(self.zeros), grouping=grouping)


def pack_zeros(zeros: Array, bits: int) -> Array:
    """Integer zeros [*, N, groups] as the packed uint8 rows that `Affine.zeros` holds."""
    packed = _bits.pack(zeros, bits)
    if packed.dtype == np.uint8:
        return packed
    if isinstance(packed, np.ndarray):
        return np.ascontiguousarray(packed).view(np.uint8)
    as_bytes = jax.lax.bitcast_convert_type(packed, jnp.uint8)
    return as_bytes.reshape(*packed.shape[:-1], packed.shape[-1] * 4)


def check_indices(indices: Array, count: int, name: str) -> None:
    """Raises `FormatError` if any index is outside [0, count): JAX would clamp it silently."""
    values = np.asarray(indices)
    if values.size and (values.min() < 0 or values.max() >= count):
        raise FormatError(
            f"{name}: values {values.min()}..{values.max()} are outside 0..{count - 1}; the file is damaged"
        )


def check_inputs(w: Any, name: str) -> None:
    """Raises `FormatError` if a static scale of a weight's quantized inputs or outputs is not finite."""
    for key in w.activation.parameters if w.activation is not None else ():
        if key in w.extras:
            check_finite(w.extras[key], f"{name}.{key}")


def check_divisor(values: Array, name: str) -> None:
    """Raises `FormatError` if a scale that weights are divided by is zero."""
    if not np.asarray(values).all():
        raise FormatError(f"{name}: holds 0, which weights would be divided by; the file is damaged")


def check_finite(values: Array, name: str) -> None:
    """Raises `FormatError` if a float array holds NaN or infinity."""
    values = np.asarray(values)
    if values.dtype.kind in "iub":
        return
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(values.astype(np.float32))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise FormatError(
            f"{name}: {int(bad.sum())} of {bad.size} values are not finite (first at {first}); the file is damaged"
        )


# formula name -> (int32 codes [N, K], scales, zeros, dtype) -> weights. Scales and zeros broadcast against codes.
# Each writes down the order of roundings of one library; see the formats that name it.
Formula = Callable[[Array, Array, Array, np.dtype], Array]


def _is_integer(a: Array) -> bool:
    return np.dtype(a.dtype).kind in "iu"


def _sub_mul(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dt(code - zero) * scale, dt = the scale's dtype; an integer difference is exact, a float one rounds to dt."""
    dt = scale.dtype
    diff = (code - zero.astype(np.int32)).astype(dt) if _is_integer(zero) else code.astype(dt) - zero.astype(dt)
    return exact.cast(diff * scale, dtype)


def _cast_sub_mul(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """(dtype(code) - dtype(zero)) * dtype(scale): scales and zeros are cast to the result's dtype before use."""
    return (code.astype(dtype) - zero.astype(dtype)) * scale.astype(dtype)


def _div(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dt(code - zero) / scale, dt = the scale's dtype: BitNet, whose scale divides."""
    return exact.div((code - zero.astype(np.int32)).astype(scale.dtype), scale).astype(dtype)


def _f32_mul_add(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dtype(float32(code) * scale + zero), one rounding in float32 (the product is exact) and one to dtype."""
    scale, zero = scale.astype(np.float32), zero.astype(np.float32)
    return exact.mul_add(code.astype(np.float32), scale, zero).astype(dtype)


def _f32(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dtype(float32(code - zero) * float32(scale))."""
    diff = (code - zero.astype(np.int32)).astype(np.float32) if _is_integer(zero) else code - zero.astype(np.float32)
    return (diff * scale.astype(np.float32)).astype(dtype)


def _f32_twice(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dtype((float32(code) * scale) * a second scale, which `zero` holds), in float32: Quark's int4 of float8."""
    first = _f32(code, scale, np.int32(0), np.dtype(np.float32))
    return (first * zero.astype(np.float32)).astype(dtype)


def _int8_twice(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dtype(int8(float32(code) * scale) * a second scale, which `zero` holds): QQQ's groups, whose weights are int8."""
    xp = namespace(code, scale)
    first = xp.clip(xp.round(_f32(code, scale, np.int32(0), np.dtype(np.float32))), -128, 127)
    return (first * zero.astype(np.float32)).astype(dtype)


def _f32_e4m3(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """`_f32` without a zero point, then rounded to e4m3 under a second scale, which `zero` holds (ModelOpt's W4A8).

    In float32: e4m3(clip(w * s, -448, 448)) * (1 / s) with s = 448 / (448 * zero), as its `fp8_eager` forms it.
    """
    first = exact.cast(_f32(code, scale, np.int32(0), dtype), np.float32)
    top = np.float32(448)
    xp = namespace(first)
    step = exact.div(xp.full_like(zero, top), zero * top)
    values = exact.float8(xp.clip(first * step, -top, top), ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (values * exact.reciprocal(step)).astype(dtype)


def _mul_sub(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dt(scale * code) - zero, two roundings to the scale's dtype."""
    return exact.cast(exact.mul_sub(scale, code.astype(scale.dtype), zero.astype(scale.dtype)), dtype)


def _mul_add(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """dt(scale * code) + zero, two roundings to the scale's dtype."""
    return exact.cast(exact.mul_add(scale, code.astype(scale.dtype), zero.astype(scale.dtype)), dtype)


def _fma(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """code * scale + zero with one rounding to the scale's dtype."""
    return exact.cast(exact.fma(code, scale, zero, scale.dtype), dtype)


def _bnb_int8(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
    """f32(f32(code * SCB) * f32(1/127)), the order of bitsandbytes' int8 dequantization."""
    return (code.astype(np.float32) * scale.astype(np.float32) * np.float32(7.874015718698502e-3)).astype(dtype)


# SINQ's tables (the second from "Asymmetric Floating Point Quantization for LLMs"), float16 as they are used.
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0],
    np.float16,
)
NF3 = np.array([-1.0, -0.53502274, -0.24693140, 0.0, 0.18333752, 0.38199395, 0.62298566, 1.0], np.float16)


def _table_sub_mul(table: np.ndarray) -> Formula:
    """(table[code] - zero) * scale, each step in the scale's dtype; codes beyond the table mean its last entry."""

    def formula(code: Array, scale: Array, zero: Array, dtype: np.dtype) -> Array:
        xp, dt = namespace(code, scale), scale.dtype
        values = xp.asarray(table).astype(dt)[xp.minimum(code, len(table) - 1)]
        return exact.cast((values - zero.astype(dt)) * scale, dtype)

    return formula


FORMULAS: dict[str, Formula] = {
    "sub_mul": _sub_mul,
    "cast_sub_mul": _cast_sub_mul,
    "div": _div,
    "f32": _f32,
    "f32_e4m3": _f32_e4m3,
    "f32_twice": _f32_twice,
    "int8_twice": _int8_twice,
    "f32_mul_add": _f32_mul_add,
    "mul_sub": _mul_sub,
    "mul_add": _mul_add,
    "fma": _fma,
    "bnb_int8": _bnb_int8,
    "nf4_sub_mul": _table_sub_mul(NF4),
    "nf3_sub_mul": _table_sub_mul(NF3),
}
