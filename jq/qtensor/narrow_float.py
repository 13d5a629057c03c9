"""`NarrowFloat`: weights stored as floats of 4, 6 or 8 bits with block scales."""

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
from jq.qtensor.affine import check_divisor, check_finite, check_inputs
from jq.qtensor.base import (
    Array,
    Grouping,
    QTensor,
    Rows,
    Source,
    codes_shape,
    dense_value,
    expand,
    from_bits,
    groups_of,
    look_up,
    padding,
    register,
    row_codes,
)

# kind -> (bits of a code, ml_dtypes name of an 8-bit float or None)
KINDS: dict[str, tuple[int, str | None]] = {
    "e4m3fn": (8, "float8_e4m3fn"),
    "e5m2": (8, "float8_e5m2"),
    "e4m3fnuz": (8, "float8_e4m3fnuz"),
    "e2m1": (4, None),
    "e2m3": (6, None),
    "e3m2": (6, None),
    "e0m3": (4, None),  # a sign and quarters: AutoRound's MXINT4
}


def _small_float_table(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """All values of a sign-exponent-mantissa code without infinities (OCP MX v1.0, section 5.3), float32."""
    bias = (1 << (exponent_bits - 1)) - 1
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    magnitude = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    return (sign * magnitude).astype(np.float32)


TABLES: dict[str, np.ndarray] = {
    "e2m1": _small_float_table(2, 1),
    "e2m3": _small_float_table(2, 3),
    "e3m2": _small_float_table(3, 2),
    "e0m3": np.concatenate([np.arange(8), -np.arange(8.0)]).astype(np.float32) / 4,
}


def _ue4m3_table() -> np.ndarray:
    """Values float32[256] of ggml's unsigned e4m3: the sign bit is ignored and 0x7f, not 0xff, reads as 0."""
    values = (np.arange(256) & 0x7F).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values[0x7F], values[0xFF] = 0.0, 480.0  # ggml tests for 0x7f before it drops the sign (gguf 0.19.0, quants.py)
    return values


UE4M3 = _ue4m3_table()
# Quark's unsigned floats of 5 exponent bits (bias 15) and 3 mantissa bits; the last is NaN.
E5M3 = np.append(_small_float_table(5, 3)[:255], np.float32(np.nan))
NAN_SCALES = {"e4m3": (0x7F, 0xFF), "e5m3": (255,)}
GGUF_E2M1 = np.where(TABLES["e2m1"] == 0, np.float32(0), 2 * TABLES["e2m1"])


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NarrowFloat(QTensor):
    """`weight[n, k] = formula(float(code[n, k]), scale[block], global_scale)`.

    Fields:
      codes: uint8[*stack, N, K] bit patterns of an 8-bit kind, or packed codes [*stack, N, W] of a smaller kind; or a
        nested `Sparse` of bit patterns.
      scales: [*stack, rows, cols] per block (`grouping`): floats, or uint8 bit patterns where `scale_kind` is "e8m0"
        (2**(byte - 127)), "e4m3", "ue4m3" (e4m3 as ggml reads it) or "e5m3" (Quark's); or a nested QTensor.
      global_scale: float32 scalar or [1] per tensor, or None.
      extras: stored tensors carried for saving or for activation quantization (input_scale, ...).
      kind: key of `KINDS`.
      formula: key of `FORMULAS`, the order of roundings.
    """

    kind_name: ClassVar[str] = "narrow float"
    data_fields: ClassVar[tuple[str, ...]] = ("codes", "scales", "global_scale", "extras")

    codes: Array
    scales: Any
    global_scale: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    kind: str = "e4m3fn"
    scale_kind: str = "float"
    grouping: Grouping = Grouping("block", 1, 0)
    formula: str = "f32"
    dtype: str = "bfloat16"
    pad: int = 0
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    @classmethod
    def make(cls, codes: Array, scales: Any, *, kind: str, name: str = "weight", **fields: Any) -> Self:
        """Builds from bit patterns, one integer per weight [*stack, N, K], and checks that the parts fit.

        Raises:
          FormatError: unknown kind, scales of the wrong shape or not finite.
        """
        if kind not in KINDS:
            raise FormatError(f"{name}: unknown float kind {kind!r}; known: {', '.join(KINDS)}")
        width = KINDS[kind][0]
        packed = codes.astype(np.uint8) if width == 8 else _bits.pack(codes, width)
        pad = 0 if width == 8 else padding(packed, width, codes.shape[-1])
        made = cls(packed, scales, kind=kind, pad=pad, **fields)
        made.check(name)
        return made

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the arrays disagree; see `make`."""
        n, k = self.shape[-2:]
        if self.formula not in FORMULAS:
            raise FormatError(f"{name}: unknown dequantization formula {self.formula!r}; known: {', '.join(FORMULAS)}")
        rows, cols = groups_of(n, self.grouping.rows), groups_of(k, self.grouping.cols)
        found = tuple(self.scales.shape[-2:])
        if self.grouping.kind == "block" and found not in ((rows, cols), (1, 1)):
            raise FormatError(
                f"{name}: scales of shape {found}, expected ({rows}, {cols}) for a weight of ({n}, {k}) with {self.grouping}"
            )
        if not isinstance(self.scales, QTensor):
            self._check_scales(f"{name}: scales")
        if self.global_scale is not None:
            check_finite(self.global_scale, f"{name}: global scale")
            if self.formula in ("global_divide", "global_reciprocal"):
                check_divisor(self.global_scale, f"{name}: global scale")
        if self.formula == "divide":
            check_divisor(self.scales, f"{name}: scales")
        check_inputs(self, name)

    def _check_scales(self, name: str) -> None:
        """Raises `FormatError` where a scale is NaN (or infinite, of those that are not bit patterns)."""
        if self.scale_kind == "float":
            return check_finite(self.scales, name)
        check_bits(self.scales, NAN_SCALES.get(self.scale_kind, ()), name)

    @property
    def bits(self) -> int:
        return KINDS[self.kind][0]

    @property
    def shape(self) -> tuple[int, ...]:
        return codes_shape(self.codes, self.bits, self.pad, self.layout)

    def describe(self) -> str:
        return f"{self.kind}, {self.grouping}, {self.scale_kind} scales"

    def unpack(self) -> Array:
        return row_codes(self.codes, self.bits, self.pad)

    def values(self, dtype: Any = np.float32) -> Array:
        """The codes as real numbers [*, N, K], exact in float32, float16 and bfloat16."""
        name = KINDS[self.kind][1]
        if name is not None:
            return from_bits(dense_value(self.codes), name).astype(dtype)
        return look_up(TABLES[self.kind], self.unpack()).astype(dtype)

    def block_scales(self) -> Array:
        """Scales as real numbers per block, in float32 where they are stored as bit patterns."""
        scales = dense_value(self.scales)
        if self.scale_kind == "e8m0":
            return exact.pow2(scales.astype(np.int32) - 127)
        if self.scale_kind == "e4m3":
            return from_bits(scales, "float8_e4m3fn").astype(np.float32)
        if self.scale_kind in ("ue4m3", "e5m3"):
            return look_up(UE4M3 if self.scale_kind == "ue4m3" else E5M3, scales)
        return scales

    def _dense(self) -> Array:
        shape = self.shape
        arguments = (self.block_scales(), self.global_scale, np.dtype(self.dtype))
        dense = FORMULAS[self.formula](self, *arguments, lambda s: expand(s, self.grouping, shape))
        return namespace(dense).broadcast_to(dense, shape)

    def _rows(self, index: Rows) -> Self:
        nested = isinstance(self.scales, QTensor) or isinstance(self.codes, QTensor)
        blocks = self.grouping.rows > 1
        if self.grouping.kind != "block" or nested or (blocks and isinstance(index, slice)):
            return super()._rows(index)
        scales = self.scales
        if scales.shape[0] > 1:
            scales = scales[index // self.grouping.rows if blocks else index]
        grouping = dataclasses.replace(self.grouping, rows=1) if blocks else self.grouping
        return self.replace(codes=self.codes[index], scales=scales, grouping=grouping)


def check_bits(values: Array, nan: tuple[int, ...], name: str) -> None:
    """Raises `FormatError` where scales that are bit patterns hold one of those that mean NaN."""
    bad = np.isin(np.asarray(values), np.array(nan, np.uint8)) if nan else np.zeros(0, bool)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise FormatError(
            f"{name}: {int(bad.sum())} of {bad.size} values are NaN (first at {first}); the file is damaged"
        )


# formula name -> (tensor, block scales, global scale, dtype, spread) -> weights; `spread` brings block scales to [N, K].
Formula = Callable[[NarrowFloat, Array, Any, np.dtype, Callable[[Array], Array]], Array]


def _f32(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(float32(code) * float32(scale)), one rounding."""
    if t.scale_kind == "e8m0":
        return _mul_pow2(t, dtype, spread)
    return (t.values() * spread(scale).astype(np.float32)).astype(dtype)


def _own(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dt(code) * scale with dt the scale's dtype (dtype where scales are bit patterns), one rounding."""
    if t.scale_kind == "e8m0":
        return _mul_pow2(t, dtype, spread)
    scale = scale if t.scale_kind == "float" else scale.astype(dtype)
    return exact.cast(t.values(scale.dtype) * spread(scale), dtype)


def _cast(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(code) * dtype(scale), one rounding after the scale's own cast."""
    return t.values(dtype) * spread(exact.cast(scale, dtype))


def _mul_pow2(t: NarrowFloat, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(code * 2**exponent), one rounding, results below the smallest normal number included.

    XLA:CPU flushes those to zero, so there they are put together from bits where a scale is that small.
    """
    return _times_pow2(t.values(), dense_value(t.scales).astype(np.int32) - 127, dtype, spread)


def _times_pow2(values: Array, exponent: Array, dtype: np.dtype, spread: Callable) -> Array:
    """`_mul_pow2` of values float32[N, K] and exponents int32 per block."""
    if namespace(values, exponent) is np:
        with np.errstate(invalid="ignore", over="ignore"):
            return (values * spread(exact.pow2(exponent))).astype(dtype)

    def plain(values: Array, exponent: Array) -> Array:
        return (values * spread(exact.pow2(exponent))).astype(dtype)

    def careful(values: Array, exponent: Array) -> Array:
        tiny = exponent < -108  # the smallest value of an 8-bit float is 2**-16
        bits = functools.partial(exact.mul_pow2, dtype=dtype)
        return jax.lax.cond(jnp.any(tiny), lambda v, e: bits(v, spread(e)), plain, values, exponent)

    return jax.lax.platform_dependent(values, exponent, cpu=careful, default=plain)


def _global_divide(t: NarrowFloat, scale: Array, global_scale: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(float32(code) * (float32(scale) / global)): compressed-tensors' NVFP4."""
    whole = exact.div(scale.astype(np.float32), global_scale.astype(np.float32).reshape(1, 1))
    return (t.values() * spread(whole)).astype(dtype)


def _global_multiply(t: NarrowFloat, scale: Array, global_scale: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(float32(code) * (float32(scale) * global)), a code of -0 read as +0: modelopt's NVFP4."""
    whole = scale.astype(np.float32) * global_scale.astype(np.float32).reshape(1, 1)
    values = t.values()
    xp = namespace(values)
    values = xp.where(values == 0, xp.zeros_like(values), values)
    return (values * spread(whole)).astype(dtype)


def _global_product(t: NarrowFloat, scale: Array, global_scale: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(float32(code) * (global * float32(scale))), signs of zero kept: torchao's NVFP4."""
    whole = scale.astype(np.float32) * global_scale.astype(np.float32).reshape(1, 1)
    return (t.values() * spread(whole)).astype(dtype)


def _gguf(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype((2 * code) * (scale / 2)), a code of -0 read as +0: ggml holds e2m1 values doubled and scales halved.

    The halved e8m0 scale 2**(byte - 128) is finite for every byte, so that 0 times it is 0.
    """
    doubled = look_up(GGUF_E2M1, t.unpack())  # a table: XLA would merge the factor 2 into the scale
    if t.scale_kind == "e8m0":
        return _times_pow2(doubled, dense_value(t.scales).astype(np.int32) - 128, dtype, spread)
    return (doubled * spread(scale * np.float32(0.5))).astype(dtype)


def _divide(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(code) / dtype(scale), in dtype: GPT-QModel's float8, whose scale is what the weight was multiplied by."""
    return exact.div(t.values(dtype), spread(scale.astype(dtype)))


def _global_reciprocal(t: NarrowFloat, scale: Array, global_scale: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype((float32(code) * (1 / global)) * float32(scale)): AutoRound's NVFP4."""
    factor = exact.reciprocal(global_scale.astype(np.float32).reshape(1, 1))
    raised = t.values() * factor
    xp = namespace(raised)
    kept = raised if xp is np else jnp.where(raised == raised, raised, jnp.nan)  # XLA would join the two factors
    return (kept * spread(scale.astype(np.float32))).astype(dtype)


def _half(t: NarrowFloat, scale: Array, _: Any, dtype: np.dtype, spread: Callable) -> Array:
    """dtype(float16(code) * float16(scale)), the product rounded in float16: fouroversix' MXFP4 (scales below 2**-24 are 0)."""
    xp, half = namespace(scale), np.dtype(np.float16)
    with np.errstate(over="ignore"):
        wide = xp.where(scale > 2.0**-25, scale, np.float32(0)).astype(half).astype(np.float32)
    return exact.cast((t.values() * spread(wide)).astype(half), dtype)


def _amax(top: int) -> Formula:
    """dtype(float32(code * scale) * amax / top): fouroversix, whose `global_scale` is the largest magnitude."""

    def formula(t: NarrowFloat, scale: Array, amax: Any, dtype: np.dtype, spread: Callable) -> Array:
        raised = t.values() * spread(scale.astype(np.float32)) * amax.astype(np.float32).reshape(1, 1)
        return exact.div(raised, np.float32(top) if namespace(raised) is np else jnp.float32(top)).astype(dtype)

    return formula


FORMULAS: dict[str, Formula] = {
    "amax_1536": _amax(6 * 256),
    "amax_1792": _amax(4 * 448),
    "amax_2688": _amax(6 * 448),
    "gguf": _gguf,
    "f32": _f32,
    "own": _own,
    "cast": _cast,
    "global_divide": _global_divide,
    "global_multiply": _global_multiply,
    "global_product": _global_product,
    "divide": _divide,
    "global_reciprocal": _global_reciprocal,
    "half": _half,
}

__all__ = ["FORMULAS", "KINDS", "TABLES", "NarrowFloat", "check_bits"]
