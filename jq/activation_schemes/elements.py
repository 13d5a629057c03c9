"""Rounding onto the values of narrow floats, shared by the schemes of several libraries."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jq import exact

# element -> (mantissa bits, smallest normal exponent, largest exponent, largest value); OCP MX v1.0, section 5.3
ELEMENTS = {
    "float8_e4m3fn": (3, -6, 8, 448.0),
    "float8_e5m2": (2, -14, 15, 57344.0),
    "fp6_e2m3": (3, 0, 2, 7.5),
    "fp6_e3m2": (2, -2, 4, 28.0),
    "float4_e2m1fn_x2": (1, 0, 2, 6.0),
}


# bits of compressed-tensors' floats -> element
BY_BITS = {4: "float4_e2m1fn_x2", 6: "fp6_e2m3", 8: "float8_e4m3fn"}


def to_element(x: jax.Array, element: str) -> jax.Array:
    """float32 values rounded half to even onto a narrow float, clipped to its range; still float32."""
    mantissa, smallest, _, top = ELEMENTS[element]
    return exact.to_digits(jnp.clip(x, -top, top), mantissa, smallest)


def round_e2m1(x: jax.Array) -> jax.Array:
    """Nearest of 0 .5 1 1.5 2 3 4 6 with sign, ties to the even code; larger values become 6. In x's dtype."""
    return to_element(exact.cast(x, jnp.float32), "float4_e2m1fn_x2").astype(x.dtype)
