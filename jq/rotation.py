"""Rotations of activations by stored matrices, as libraries apply them at run time: computed as if in float64.

A Hadamard matrix of size n is held as `diag(signs) @ kron(core, H)`: H is Sylvester's matrix of n / K, `core` a matrix of
1 and -1 of size K (12, 20, ... where n is no power of two; mostly 1). Then a product takes n log(n) additions instead of
n * n, and a layer holds n + K * K bytes instead of a matrix. They are added as unevaluated pairs of float32, so that the
result is what a library gets in float64. Any other matrix multiplies in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.qtensor.rotated import hadamard

Array = Any
CORE = 256  # the largest matrix that is no product with Sylvester's among those that libraries know


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What `rotate` does to the last axis, in blocks of `size`. Hashable; the arrays lie beside it.

    Fields:
      kind: "hadamard" (arrays "signs" and "core", see `held`; divided by sqrt(size)) or "dense" ("matrix").
      size: inputs that are rotated together; they divide the axis.
      core: K of a Hadamard matrix.
      transposed: multiply by the transposed matrix.
      key: beginning of its arrays' names; "perm" int32[size] may be one of them: rows and columns are taken in that order.
      sums: "exact", "steps" (each addition rounded to x's dtype, as where a library adds in place of a product),
        "single" (exact with 1 / sqrt(size) rounded to float32) or "own" (exact with the matrix rounded to x's dtype).
    """

    kind: str
    size: int
    core: int = 1
    transposed: bool = False
    key: str = ""
    permuted: bool = False
    sums: str = "exact"

    @property
    def names(self) -> tuple[str, ...]:
        own = ("signs", "core") if self.kind == "hadamard" else ("matrix",)
        return tuple(f"{self.key}{name}" for name in (*own, *(("perm",) if self.permuted else ())))


def held(matrix: np.ndarray, *, scaled: bool) -> tuple[Rotation, dict[str, np.ndarray]]:
    """(what `rotate` does with it, its arrays) of a stored matrix [n, n].

    Signs and core are held as bits, lowest first, set for -1: uint8[ceil(n / 8)] and uint8[ceil(K * K / 8)]. A matrix that
    modules share is taken apart once, while it lives: they get the same arrays.

    Args:
      scaled: the product is divided by sqrt(n), as it is for Hadamard matrices.
    """
    key = (id(matrix), scaled)
    if key not in _held:
        _held[key] = _taken_apart(matrix, scaled=scaled)
        weakref.finalize(matrix, _held.pop, key, None)
    made, arrays = _held[key]
    return made, dict(arrays)


_held: dict[tuple[int, bool], tuple[Rotation, dict[str, np.ndarray]]] = {}


def _taken_apart(matrix: np.ndarray, *, scaled: bool) -> tuple[Rotation, dict[str, np.ndarray]]:
    n = matrix.shape[0]
    found = factors(matrix) if scaled else None
    if found is not None:
        bits = {name: np.packbits(part.reshape(-1) < 0, bitorder="little") for name, part in found.items()}
        return Rotation("hadamard", n, found["core"].shape[0]), bits
    dense = matrix.astype(np.float64) / (np.sqrt(n) if scaled else 1.0)
    return Rotation("dense", n), {"matrix": dense.astype(np.float32)}


def factors(matrix: np.ndarray) -> dict[str, np.ndarray] | None:
    """Signs int8[n] and core int8[K, K], matrix == diag(signs) @ kron(core, H), of the smallest K; None: no Hadamard matrix with them."""
    n = matrix.shape[0]
    if not (np.abs(matrix) == 1).all():
        return None
    matrix = matrix.astype(np.int8)
    signs = matrix[:, 0]
    core_size = n // (n & -n)
    while core_size <= min(n, CORE):
        step = n // core_size
        core = matrix[::step, ::step] * signs[::step, None]
        if np.array_equal(signs[:, None] * np.kron(core, hadamard(step).astype(np.int8)), matrix):
            wide = core.astype(np.int32)
            orthogonal = np.array_equal(wide @ wide.T, core_size * np.eye(core_size, dtype=np.int32))
            return {"signs": signs, "core": core} if orthogonal else None
        core_size *= 2
    return None


def matrix_of(made: Rotation, arrays: Mapping[str, Array]) -> np.ndarray:
    """The stored matrix of 1 and -1 that `held` took apart, int8[n, n]."""
    bits = {name: np.asarray(arrays[f"{made.key}{name}"]) for name in ("signs", "core")}
    count = {"signs": made.size, "core": made.core**2}
    signs, core = (
        1 - 2 * np.unpackbits(bits[name], count=count[name], bitorder="little").astype(np.int8) for name in bits
    )
    step = made.size // made.core
    return signs[:, None] * np.kron(core.reshape(made.core, -1), hadamard(step).astype(np.int8))


def rotate(x: jax.Array, rotation: Rotation, arrays: Mapping[str, Array]) -> jax.Array:
    """x [..., K] times the block-diagonal matrix, rounded to float32 and to x's dtype."""
    own = {name.removeprefix(rotation.key): jnp.asarray(arrays[name]) for name in rotation.names}
    return _linear(rotation, x, own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rotation: Rotation, x: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
    blocks = exact.cast(x, jnp.float32).reshape(*x.shape[:-1], -1, rotation.size)
    perm = own.get("perm")
    if perm is not None:
        blocks = jnp.take(blocks, jnp.argsort(perm), axis=-1)
    if rotation.kind == "dense":
        matrix = own["matrix"].T if rotation.transposed else own["matrix"]
        if rotation.sums == "own":
            matrix = exact.rounded(matrix.astype(x.dtype))
        matrix = exact.cast(matrix, jnp.float32)
        turned = jnp.einsum("...i,ij->...j", blocks, matrix, precision="highest")
    else:
        k = rotation.core
        core = _signs(own["core"], k * k).reshape(k, k)
        signs = _signs(own["signs"], rotation.size)
        if rotation.sums == "steps":
            turned = _by_steps(blocks * signs, core, x.dtype)
        else:
            dtype = {"single": np.float32, "own": x.dtype}.get(rotation.sums, np.float64)
            turned = _hadamard_product(blocks, signs, core, rotation.transposed, dtype)
    if perm is not None:
        turned = jnp.take(turned, perm, axis=-1)
    return exact.rounded(turned.astype(x.dtype)).reshape(
        x.shape
    )  # torch rounds float64 to 16 bits by way of float32, too


def _forward(rotation: Rotation, x: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _linear(rotation, x, own), own


def _backward(rotation: Rotation, own: dict[str, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    return _linear(dataclasses.replace(rotation, transposed=not rotation.transposed), g, own), None


_linear.defvjp(_forward, _backward)

Pair = tuple[jax.Array, jax.Array]


def _signs(packed: jax.Array, count: int) -> jax.Array:
    """Bits -> 1 and -1, float32[count]."""
    bits = (packed[:, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:count].astype(jnp.float32)


def _by_steps(x: jax.Array, core: jax.Array, dtype: Any) -> jax.Array:
    """x [..., n] (its signs changed) @ kron(core, H) / sqrt(n), each sum of two rounded to `dtype`; float32."""
    n, k = x.shape[-1], core.shape[0]
    shape, width = (*x.shape[:-1], k, n // k), 1

    def kept(a: jax.Array) -> jax.Array:
        return exact.cast(exact.rounded(a.astype(dtype)), jnp.float32)

    x = x.reshape(shape)
    while width < n // k:
        first, second = jnp.moveaxis(x.reshape(*shape[:-1], n // k // (2 * width), 2, width), -2, 0)
        x = jnp.stack([kept(first + second), kept(first - second)], axis=-2).reshape(shape)
        width *= 2
    if k > 1:
        x = kept(jnp.einsum("...am,ac->...cm", x, core, precision="highest"))
    root = np.sqrt(np.float32(n))
    return exact.div(x, jnp.full_like(x, root)).reshape(*shape[:-2], n)


def _hadamard_product(x: jax.Array, sign: jax.Array, core: jax.Array, transposed: bool, dtype: Any) -> jax.Array:
    """x [..., n] @ diag(sign) kron(core, H) times 1 / sqrt(n) of `dtype`, or its transpose; float32."""
    n, k = x.shape[-1], core.shape[0]
    if not transposed:
        x = x * sign
    pair = _butterflies((x.reshape(*x.shape[:-1], k, n // k), jnp.zeros((*x.shape[:-1], k, n // k), jnp.float32)))
    if k > 1:
        pair = _core_product(pair, core.T if transposed else core)
    high, low = (a.reshape(*a.shape[:-2], n) for a in pair)
    if transposed:
        high, low = high * sign, low * sign
    return _divided(high, low, n, dtype)


def _butterflies(pair: Pair) -> Pair:
    """Sylvester's matrix along the last axis, a power of two."""
    size, width = pair[0].shape[-1], 1
    shape = pair[0].shape
    while width < size:
        split = [a.reshape(*shape[:-1], size // (2 * width), 2, width) for a in pair]
        first, second = tuple(a[..., 0, :] for a in split), tuple(a[..., 1, :] for a in split)
        both = _add(first, second), _add(first, tuple(-a for a in second))
        pair = tuple(jnp.stack([s, d], axis=-2).reshape(shape) for s, d in zip(*both, strict=True))  # type: ignore[assignment]
        width *= 2
    return pair


def _core_product(pair: Pair, core: jax.Array) -> Pair:
    """[..., K, m] -> sum over rows i of core[i, j] * x[..., i, m], one after the other."""

    def add(total: Pair, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Pair, None]:
        high, low, sign = row
        return _add(total, tuple(a[..., None, :] * sign[:, None] for a in (high, low))), None

    rows = (*(jnp.moveaxis(a, -2, 0) for a in pair), core)
    zero = jnp.zeros_like(pair[0])
    return jax.lax.scan(add, (zero, zero), rows)[0]


def _add(a: Any, b: Any) -> Pair:
    """Sum of two pairs."""
    total, error = exact.two_sum(a[0], b[0])
    return exact.two_sum(total, error + (a[1] + b[1]))


def _divided(high: jax.Array, low: jax.Array, n: int, dtype: Any) -> jax.Array:
    factor = (1.0 / np.sqrt(np.float64(n))).astype(dtype).astype(np.float64)
    first = np.float32(factor)
    if n & (n - 1) == 0 and n.bit_length() % 2:  # a power of two
        return (high + low) * first
    product, error = exact.two_product(high, jnp.full_like(high, first))
    rest = error + (high * np.float32(factor - float(first)) + low * first)
    return product + rest
