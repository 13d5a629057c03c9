"""Products of quantized activations and weights, shared by the schemes of several libraries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jq import exact
from jq.matmul import dense_matmul

# |sum of 1024 products of int8 codes| <= 2**24: float32 holds it exactly.
_EXACT_TERMS = 1024


def integer_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Exact `x @ w.T` of int8 numbers.

    XLA:CPU has no fast int8 product: there it is made of float32 products over slices of K whose sums are exact.

    Args:
      x: int8[M, K].
      w: int8[N, K].

    Returns:
      int32[M, N].
    """
    if jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    total = jnp.zeros((x.shape[0], w.shape[0]), jnp.int32)
    for start in range(0, x.shape[1], _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        product = jnp.einsum("mk,nk->mn", x[:, part].astype(jnp.float32), w[:, part].astype(jnp.float32))
        total = total + product.astype(jnp.int32)
    return total


def float_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` of narrow floats or small integers (any dtype), summed in float32: float32[M, N]."""
    return dense_matmul(exact.cast(x, jnp.float32), exact.cast(w, jnp.float32))


def plus_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [M, N] plus a bias [N] in y's dtype; y where there is none."""
    return y if bias is None else y + bias.astype(y.dtype)
