"""ParoQuant's inputs: scaled, then turned in pairs of channels, one set of independent pairs after the other.

The arithmetic is that of its CUDA kernel (paroquant 0.1.16, kernels/cuda/rotation.cuh): angles in the dtype of the inputs,
sines, cosines and sums in float32, one rounding to the inputs' dtype after the scale and after each set.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activations import PREPARATIONS

ROTATION = ("theta", "pairs", "channel_scales")


def _givens(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, K]; extras theta [R, K/2], pairs int16[R, K] (every channel of a group of option "group" once), channel_scales [1, K]."""
    key, group = w.activation.get("key", ""), w.activation.get("group")
    theta, pairs, scales = (jnp.asarray(w.extras[f"{key}{name}"]) for name in ROTATION)
    rounds, k = pairs.shape

    def kept(a: jax.Array) -> jax.Array:
        return exact.cast(exact.rounded(a.astype(x.dtype)), jnp.float32)

    first, second = pairs[:, ::2].astype(jnp.int32), pairs[:, 1::2].astype(jnp.int32)
    offsets = jnp.arange(k // 2) * 2 // group * group
    first, second = first + offsets, second + offsets
    row = jnp.arange(rounds)[:, None]
    angle = kept(exact.cast(theta, jnp.float32))

    def spread(of_first: jax.Array, of_second: jax.Array) -> jax.Array:
        """One number for each channel from one for each member of a pair."""
        start = jnp.zeros((rounds, k), of_first.dtype)
        return start.at[row, first].set(of_first).at[row, second].set(of_second)

    partner = spread(second, first)
    cosine, sine = spread(jnp.cos(angle), jnp.cos(angle)), spread(jnp.sin(angle), -jnp.sin(angle))

    def turn(values: jax.Array, one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        other, c, s = one
        return kept(exact.mul_add(values, c, jnp.take(values, other, axis=1) * s)), None

    scaled = kept(exact.cast(x, jnp.float32) * kept(exact.cast(scales, jnp.float32)))
    turned, _ = jax.lax.scan(turn, scaled, (partner, cosine, sine))
    return turned.astype(x.dtype)


PREPARATIONS["givens"] = _givens
