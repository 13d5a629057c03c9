"""Products of quantized activations and weights, shared by the schemes of several libraries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jq import exact
from jq.matmul import dense_matmul


def integer_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Exact `x @ w.T` of int8 numbers.

    Args:
      x: int8[M, K].
      w: int8[N, K].

    Returns:
      int32[M, N].
    """
    if jax.default_backend() == "cpu":  # XLA:CPU has a library product for int32, none for int8
        x, w = x.astype(jnp.int32), w.astype(jnp.int32)
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def float_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` of narrow floats or small integers (any dtype), summed in float32: float32[M, N]."""
    return dense_matmul(exact.cast(x, jnp.float32), exact.cast(w, jnp.float32))
