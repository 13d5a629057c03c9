"""Products of quantized activations and weights, shared by the schemes of several libraries."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp

from jq import exact
from jq.formats.base import warn_once
from jq.matmul import dense_matmul

# |sum of 1024 products of int8 codes| <= 2**24: float32 holds it exactly.
_EXACT_TERMS = 1024
# Flags with which XLA:GPU does not check the tiling that it takes for a product (the default, level 4, does); see
# `select_first_config` and `check_buffers` in xla/service/gpu/autotuning/autotuner_pass.cc.
_UNCHECKED = re.compile(
    r"--xla_gpu_(autotune_level=[0-3]|(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?)(?=\s|$)"
)
_CUBLAS = "--xla_gpu_enable_triton_gemm=false"


def integer_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Exact `x @ w.T` of int8 numbers.

    XLA:CPU has no fast int8 product: there it is made of float32 products over slices of K whose sums are exact. On a
    GPU so it is, of bfloat16 ones, where XLA's int8 products are not to be trusted.

    Args:
      x: int8[M, K].
      w: int8[N, K].

    Returns:
      int32[M, N].
    """
    backend = jax.default_backend()
    if backend != "cpu" and (backend != "gpu" or _int8_is_checked()):
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    wide = jnp.float32 if backend == "cpu" else jnp.bfloat16
    total = jnp.zeros((x.shape[0], w.shape[0]), jnp.int32)
    for start in range(0, x.shape[1], _EXACT_TERMS):
        a, b = (m[:, start : start + _EXACT_TERMS].astype(wide) for m in (x, w))
        total = total + jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.float32).astype(jnp.int32)
    return total


def _int8_is_checked() -> bool:
    """Whether XLA:GPU takes cuBLAS' int8 products, or compares its own tilings with them before it takes one.

    The first of its tilings has 16 int8 along K, and Triton gives the tensor core, which multiplies 32, each of them
    twice: sums are twice as large (seen with jax 0.11.2 on an H100). The search for the fastest tiling drops it, where it
    compares results.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    found = _UNCHECKED.search(flags)
    if found is None or _CUBLAS in flags:
        return True
    warn_once(
        "XLA_FLAGS",
        f"with {found[0]} XLA's int8 products on a GPU are wrong: they are made of bfloat16 products here, with the same "
        f"results, but slower. For fast ones leave the flag out, or add {_CUBLAS}",
    )
    return False


def float_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` of narrow floats or small integers (any dtype), summed in float32: float32[M, N]."""
    return dense_matmul(exact.cast(x, jnp.float32), exact.cast(w, jnp.float32))


def plus_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [M, N] plus a bias [N] in y's dtype; y where there is none."""
    return y if bias is None else y + bias.astype(y.dtype)
