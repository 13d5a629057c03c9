"""Arithmetic that rounds as IEEE 754 says, step by step, on every backend.

XLA is free to contract `a*b + c` into a fused multiply-add (it does on the CPU under jit), to turn a division by a
broadcast divisor into a product with the reciprocal (CPU, eager too), to divide approximately (GPU, float32), and to
skip the rounding of a bfloat16 or float8 value that is widened at once. Code that promises the bits of another library uses
these functions; each returns exactly what numpy returns, eagerly, under jit, scan and vmap.

float32 and bfloat16 subnormals are outside the promise: XLA:CPU flushes them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


def _is_numpy(*arrays: Array) -> bool:
    return not any(isinstance(a, jax.Array) for a in arrays)


def mul_add(a: Array, b: Array, c: Array) -> Array:
    """`a * b + c` with two roundings (never a fused multiply-add).

    The select between product and sum is what stops LLVM: an optimization barrier or `reduce_precision` does not.
    """
    product = a * b
    if _is_numpy(a, b, c):
        return product + c
    return jnp.where(product == product, product, jnp.nan) + c


def mul_sub(a: Array, b: Array, c: Array) -> Array:
    """`a * b - c` with two roundings."""
    return mul_add(a, b, -c)


def fma(a: Array, b: Array, c: Array, dtype: Any) -> Array:
    """`a * b + c` with one rounding to `dtype` (float16 or bfloat16).

    a and b must have at most 12 significant bits each, so that float32 holds their product exactly. The sum is then
    formed exactly as a pair (sum, error) and rounded to odd before the cast, so that the cast is the only rounding.
    """
    f = np.float32
    product, addend = a.astype(f) * b.astype(f), c.astype(f)
    if _is_numpy(a, b, c):
        return (product.astype(np.float64) + addend.astype(np.float64)).astype(dtype)
    product = jnp.where(product == product, product, jnp.nan)
    total, err = two_sum(product, addend)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    # Round to odd: truncate toward zero, then set the last bit, whenever the sum was inexact.
    toward_zero = jnp.where((err != 0) & ((err > 0) != (total > 0)), bits - 1, bits)
    odd = jnp.where(err != 0, toward_zero | 1, bits)
    return jax.lax.bitcast_convert_type(odd, jnp.float32).astype(dtype)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """`a + b` of float32 JAX arrays as an exact sum of two: the rounded sum and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def div(a: Array, b: Array) -> Array:
    """`a / b` correctly rounded, for float32, float16 and bfloat16, with broadcasting.

    float32 on a GPU: XLA's quotient is off by up to one unit in the last place, so it is corrected by its residual
    `a - q*b`, which is exact as a sum of two products (Dekker). On the CPU the quotient is right as long as XLA cannot
    see that the divisor is a broadcast one, and the correction would take most of a program's compile time.
    Half-precision quotients are formed in float32, which has more than twice their digits, and rounded once.
    """
    if _is_numpy(a, b):
        return a / b
    a, b = jnp.asarray(a), jnp.asarray(b)
    dtype = jnp.result_type(a, b)
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = jnp.broadcast_to(a, shape), jax.lax.optimization_barrier(jnp.broadcast_to(b, shape))
    if dtype != jnp.float32:
        return _div32(a.astype(jnp.float32), b.astype(jnp.float32)).astype(dtype)
    return _div32(a, b)


def _div32(a: Array, b: Array) -> Array:
    return jax.lax.platform_dependent(a, b, cpu=_div_by_unknown, default=_div_by_residual)


def _div_by_unknown(a: Array, b: Array) -> Array:
    """`a / b` with a divisor that depends on `a` as far as XLA can tell.

    It multiplies by the reciprocal of a divisor that it sees to be broadcast; under vmap that is any divisor without
    the mapped axis, however well it was hidden before.
    """
    nothing = jax.lax.optimization_barrier(jnp.uint32(0))
    bits = jax.lax.bitcast_convert_type(b, jnp.uint32) | (jax.lax.bitcast_convert_type(a, jnp.uint32) & nothing)
    return a / jax.lax.bitcast_convert_type(bits, jnp.float32)


def _div_by_residual(a: Array, b: Array) -> Array:
    quotient = a / b
    # Scale by powers of two so that the splitting below neither overflows nor underflows; exact.
    _, ea = jnp.frexp(a)
    _, eb = jnp.frexp(b)
    sa, sb = jnp.ldexp(a, -ea), jnp.ldexp(b, -eb)
    q = sa / sb
    high, low = two_product(q, sb)
    residual = (sa - high) - low
    fixed = jnp.ldexp(q + residual / sb, ea - eb)
    usable = jnp.isfinite(quotient) & (jnp.abs(quotient) > 1e-37) & (b != 0) & jnp.isfinite(b)
    return jnp.where(usable & (a != 0), fixed, quotient)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b as an exact sum high + low (Dekker 1971)."""
    high = a * b
    high = jnp.where(high == high, high, jnp.nan)
    ah, al = _split(a)
    bh, bl = _split(b)

    def keep(p: Array) -> Array:
        return jnp.where(p == p, p, jnp.nan)

    low = ((keep(ah * bh) - high) + keep(ah * bl) + keep(al * bh)) + keep(al * bl)
    return high, low


def _split(a: Array) -> tuple[Array, Array]:
    """a as an exact sum of two floats of 12 significant bits, by masking (no product, so nothing to contract)."""
    bits = jax.lax.bitcast_convert_type(a, jnp.int32) & jnp.int32(-4096)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def reciprocal(a: Array) -> Array:
    """`1 / a` correctly rounded."""
    one = np.ones((), a.dtype) if _is_numpy(a) else jnp.ones((), a.dtype)
    return div(one, a)


def cast(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, keeping the rounding of x's own dtype when it is widened at once (XLA drops it for bfloat16)."""
    if not _is_numpy(x) and x.dtype == jnp.bfloat16 and np.dtype(dtype) != x.dtype:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def rounded(x: Array) -> Array:
    """x, with the rounding of its own 16-bit dtype kept where it is widened later (XLA may drop it)."""
    digits = {"bfloat16": (8, 7), "float16": (5, 10)}.get(str(x.dtype))
    return x if digits is None or _is_numpy(x) else jax.lax.reduce_precision(x, *digits)


# float8 dtype -> (mantissa bits, exponent of the smallest normal number)
_FLOAT8 = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14), "float8_e4m3fnuz": (3, -7), "float8_e5m2fnuz": (2, -15)}


def float8(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)` to a float8 dtype, x within its range; what is widened later keeps this rounding.

    The values are rounded in float32, half to even, before the conversion: where XLA drops a conversion to float8 and
    back as excess precision (it may, on a GPU), it drops nothing.
    """
    if _is_numpy(x):
        return x.astype(dtype)
    return to_digits(cast(x, jnp.float32), *_FLOAT8[np.dtype(dtype).name]).astype(dtype)


def to_digits(x: jax.Array, mantissa: int, smallest: int) -> jax.Array:
    """float32 values rounded half to even to a narrow float's mantissa bits, of any size above; still float32.

    Args:
      mantissa: bits behind the point.
      smallest: exponent of the smallest normal number; below it the steps stay as they are there.
    """
    exponent = ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127
    place = jnp.maximum(exponent, smallest) - mantissa
    return jnp.round(x * pow2(-place)) * pow2(place)  # products by powers of two are exact


def pow2(exponent: Array) -> Array:
    """2**exponent as float32, exact for -149..127 (`jnp.exp2` is not); bits, so subnormals are right too."""
    xp = np if _is_numpy(exponent) else jnp
    exponent = exponent.astype(np.int32)
    normal = (xp.clip(exponent, -126, 127) + 127) << 23
    subnormal = np.int32(1) << xp.clip(exponent + 149, 0, 22)
    bits = xp.where(exponent >= -126, normal, subnormal)
    bits = xp.where(exponent > 127, np.int32(0x7F800000), xp.where(exponent < -149, 0, bits)).astype(np.int32)
    return bits.view(np.float32) if xp is np else jax.lax.bitcast_convert_type(bits, jnp.float32)


def mul_pow2(x: Array, exponent: Array, dtype: Any) -> Array:
    """`x * 2**exponent` rounded once to `dtype` (float32, bfloat16 or float16), subnormal results included.

    As a product of floats would be: 2**128 and above is infinity (so 0 times it is NaN).

    Args:
      x: float32, zero or normal (no subnormals), or not finite.
      exponent: int32, broadcasts to x.
    """
    dtype = np.dtype(dtype)
    if _is_numpy(x, exponent):
        with np.errstate(invalid="ignore", over="ignore"):
            return (x * pow2(exponent)).astype(dtype)
    exponent = jnp.broadcast_to(exponent, x.shape)
    pattern = jax.lax.bitcast_convert_type(x, jnp.int32)
    sign, magnitude = pattern & jnp.int32(-(2**31)), pattern & jnp.int32(0x7FFFFFFF)
    field = magnitude >> 23
    moved = field + exponent
    normal = magnitude + (exponent << 23)
    # A subnormal result: the significand shifted right to the last place that the result's dtype keeps.
    kept = 16 if dtype == jnp.bfloat16 else 0
    drop = jnp.clip(1 - moved + kept, 1, 31)
    significand = (magnitude & jnp.int32(0x7FFFFF)) | jnp.int32(1 << 23)
    low, rest = significand >> drop, significand & ((1 << drop) - 1)
    half = 1 << (drop - 1)
    up = (rest > half) | ((rest == half) & ((low & 1) == 1))
    subnormal = (low + up.astype(jnp.int32)) << kept
    result = jnp.where(moved >= 1, normal, subnormal)
    infinite = (moved >= 255) | (exponent >= 128)
    result = jnp.where(infinite, jnp.int32(0x7F800000), result)
    result = jnp.where(field == 0, jnp.where(exponent >= 128, jnp.int32(0x7FC00000), 0), result)
    result = jnp.where(field == 255, magnitude, result)
    return jax.lax.bitcast_convert_type(result | sign, jnp.float32).astype(dtype)
