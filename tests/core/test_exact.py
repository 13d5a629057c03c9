"""Arithmetic that must round as numpy does: eagerly, under jit, scan and vmap, on random and edge values."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jq import exact

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
EDGES = np.array([0, -0.0, 1, -1, 3, 7, 127, 1e-30, 1e30, np.inf, -np.inf, np.nan, 65504, 3e38], np.float64)


def values(dtype, seed: int, count: int = 40_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    span = 4 if np.dtype(dtype).itemsize == 2 else 12
    wide = rng.standard_normal(count) * 10.0 ** rng.uniform(-span, span, count)
    with np.errstate(over="ignore"):
        made = np.concatenate([wide, EDGES]).astype(dtype)
    tiny = np.finfo(np.float32).tiny if np.dtype(dtype) != np.float16 else 0
    return np.where(np.abs(made.astype(np.float64)) < tiny, dtype(0), made).astype(dtype)


def ways(function):
    """The function eagerly, under jit, in scan, and under vmap over rows and over single elements."""
    yield "eager", function
    yield "jit", jax.jit(function)
    yield "scan", jax.jit(lambda *a: jax.lax.scan(lambda c, x: (c, function(*x)), 0, tuple(v[None] for v in a))[1][0])
    yield "vmap", jax.jit(lambda *a: jax.vmap(function)(*(v[None] for v in a))[0])
    yield "vmap of elements", jax.vmap(function)
    yield "jit of vmap of elements", jax.jit(jax.vmap(function))


def same(got, want, what: str) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    bits = f"u{want.dtype.itemsize}"
    nan = np.isnan(got.astype(np.float64)) & np.isnan(want.astype(np.float64))
    subnormal = np.abs(want.astype(np.float64)) < (np.finfo(np.float32).tiny if want.dtype != np.float16 else 0)
    differ = (got.view(bits) != want.view(bits)) & ~nan & ~subnormal
    assert not differ.any(), f"{what}: {differ.sum()} of {differ.size} differ, first at {np.argwhere(differ)[0]}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_division(dtype) -> None:
    a, b = values(dtype, 1), values(dtype, 2)
    with np.errstate(all="ignore"):
        want = a / b
    for way, function in ways(exact.div):
        same(function(jnp.asarray(a), jnp.asarray(b)), want, way)


@pytest.mark.parametrize("divisor", [3, 7, 15, 127, 448])
@pytest.mark.parametrize("dtype", DTYPES)
def test_division_by_a_broadcast_divisor(dtype, divisor: int) -> None:
    a = values(dtype, 3)
    with np.errstate(all="ignore"):
        want = a / dtype(divisor)
    for way, function in ways(lambda x: exact.div(x, jnp.asarray(divisor, x.dtype))):
        same(function(jnp.asarray(a)), want, way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_add_rounds_twice(dtype) -> None:
    a, b, c = (values(dtype, seed) for seed in (4, 5, 6))
    with np.errstate(all="ignore"):
        want, want_sub = a * b + c, a * b - c
    for way, function in ways(exact.mul_add):
        same(function(jnp.asarray(a), jnp.asarray(b), jnp.asarray(c)), want, way)
    for way, function in ways(exact.mul_sub):
        same(function(jnp.asarray(a), jnp.asarray(b), jnp.asarray(c)), want_sub, way)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_fused_multiply_add_rounds_once(dtype) -> None:
    rng = np.random.default_rng(7)
    code = rng.integers(0, 16, 20_000).astype(dtype)
    scale = (rng.standard_normal(20_000) * 0.1).astype(dtype)
    shift = rng.standard_normal(20_000).astype(dtype)
    exact_sum = [Fraction(float(q)) * Fraction(float(s)) + Fraction(float(z)) for q, s, z in zip(code, scale, shift)]
    want = np.array([round_once(v, dtype) for v in exact_sum])
    for way, function in ways(lambda q, s, z: exact.fma(q, s, z, dtype)):
        same(function(jnp.asarray(code), jnp.asarray(scale), jnp.asarray(shift)), want, way)
    same(exact.fma(code, scale, shift, dtype), want, "numpy")


def round_once(value: Fraction, dtype) -> np.generic:
    """A rational rounded to the nearest value of dtype, ties to even."""
    near = np.array(float(value)).astype(dtype)
    around = [near, np.nextafter(near, dtype(np.inf), dtype=dtype), np.nextafter(near, dtype(-np.inf), dtype=dtype)]
    around.sort(key=lambda v: (abs(Fraction(float(v)) - value), int(np.array(v).view(np.uint16)) & 1))
    return around[0] if value else dtype(float(near))


def test_cast_keeps_the_rounding_of_bfloat16() -> None:
    a, b = values(ml_dtypes.bfloat16, 8), values(ml_dtypes.bfloat16, 9)
    with np.errstate(all="ignore"):
        want = (a * b).astype(np.float32)
    for way, function in ways(lambda x, y: exact.cast(x * y, np.float32)):
        same(function(jnp.asarray(a), jnp.asarray(b)), want, way)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8_keeps_its_rounding(name: str) -> None:
    """Codes, and codes that are widened at once (XLA drops such a conversion on a GPU)."""
    target = np.dtype(getattr(ml_dtypes, name))
    top = float(ml_dtypes.finfo(target).max)
    codes = np.arange(256, dtype=np.uint8).view(target).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    halves = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(halves, np.float32(way)) for way in (-np.inf, np.inf)]
    x = np.concatenate([codes, halves, *near, np.clip(values(np.float32, 3), -top, top), [0, -0.0, np.nan]])
    x = np.clip(x, -top, top).astype(np.float32)
    want = x.astype(target)
    for way, f in ways(lambda a: exact.float8(a, target)):
        got = np.asarray(f(jnp.asarray(x)))
        assert got.dtype == target
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32), err_msg=way)
    for way, f in ways(lambda a: exact.float8(a, target).astype(jnp.float32)):
        np.testing.assert_array_equal(np.asarray(f(jnp.asarray(x))), want.astype(np.float32), err_msg=way)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        short = np.clip(x.astype(dtype).astype(np.float32), -top, top).astype(dtype)
        np.testing.assert_array_equal(
            np.asarray(exact.float8(jnp.asarray(short), target)).astype(np.float32),
            short.astype(target).astype(np.float32),
        )


def test_powers_of_two() -> None:
    exponents = np.arange(-155, 135)
    with np.errstate(over="ignore"):
        want = np.ldexp(np.float32(1), exponents)
    np.testing.assert_array_equal(exact.pow2(exponents), want)
    for way, function in ways(exact.pow2):
        got = np.asarray(function(jnp.asarray(exponents)))
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32), err_msg=way)
