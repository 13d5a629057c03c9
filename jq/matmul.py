"""`matmul(x, w)`: activations times a quantized (or dense) weight, on the best path that the device has."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.qtensor import Affine, Codebook, NarrowFloat, QTensor

Array = Any
Impl = Literal["jnp", "pallas"] | None

# Rows of x up to which a GPU without a kernel multiplies and reduces instead of calling a dot: XLA fuses
# dequantization into that form, while a dot makes it write the dense weight to memory first. On an H100, int4 and int8
# are 3.4 to 4 times faster so at one row, 1.6 to 1.8 times at 4, and about even at 8; 3 bits take longer to unpack.
FUSED_ROWS = 4


def matmul(x: Array, w: Any, *, impl: Impl = None, quantize_activations: bool = True) -> jax.Array:
    """`x @ dequantize(w).T`, with the activation quantization that the checkpoint asks for.

    Args:
      x: float[..., K] (float32, bfloat16 or float16).
      w: QTensor or dense array [N, K].
      impl: "jnp" dequantizes in plain JAX; "pallas" asks for the GPU kernel; None takes the kernel where one fits
        the device and the tensor, and plain JAX else.
      quantize_activations: False ignores `w.activation`: the weight alone is quantized.

    Returns:
      [..., N] in x's dtype; products are summed in float32. Differentiable with respect to x.

    Raises:
      ValueError: shapes that do not fit, an x that is not of floats, or impl="pallas" where no kernel fits (the message says why).
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or len(w.shape) != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"matmul: x of shape {x.shape} does not fit a weight of shape {tuple(w.shape)} ([N, K])")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"matmul: x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if impl not in (None, "jnp", "pallas"):
        raise ValueError(f"matmul: impl must be None, 'jnp' or 'pallas', got {impl!r}")
    if not isinstance(w, QTensor):
        return dense_matmul(x, jnp.asarray(w))
    if getattr(w, "activation", None) is not None:
        from jq import activations

        if quantize_activations:
            return activations.matmul(x, w)
        if activations.prepares(w):
            return activations.matmul(x, activations.without_quantization(w))
    if impl == "pallas" or (impl is None and _on_gpu()):
        reason = _kernel_refusal(x, w)
        if reason is None:
            import pallas_kernels

            return pallas_kernels.matmul(x, w)
        if impl == "pallas":
            raise ValueError(f"matmul: no kernel for {w!r} and x of {x.shape} {x.dtype}: {reason}")
    return _plain(x, w)


def dense_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` for a dense [N, K], summed in float32, in x's dtype.

    Written as a contraction over both last axes: XLA's one-row `x @ w.T` is several times slower on some versions.
    On the CPU 16-bit operands are widened, since its 16-bit dots are slower and round inside.
    """
    if x.dtype != w.dtype:
        w = exact.cast(w, x.dtype)
    out = x.dtype
    if not _on_gpu() and x.dtype in (jnp.bfloat16, jnp.float16):
        x, w = x.astype(jnp.float32), exact.cast(w, jnp.float32)
    # float32 means float32: the default precision on a GPU is TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out)


@jax.custom_vjp
def _plain(x: jax.Array, w: QTensor) -> jax.Array:
    rows = int(np.prod(x.shape[:-1], dtype=np.int64))
    if _on_gpu() and 0 < rows <= FUSED_ROWS:
        return _fused_rows(x, w)
    return dense_matmul(x, w.dequantize())


@jax.jit
def _fused_rows(x: jax.Array, w: QTensor) -> jax.Array:
    """Few rows as multiply and reduce, all in one fusion that reads the packed weight once."""
    flat = x.reshape(-1, x.shape[-1])
    separate = isinstance(w, Affine | Codebook | NarrowFloat) and not isinstance(w.codes, QTensor) and not w.layout
    rows = []
    for i, row in enumerate(flat):
        if i and separate:
            # XLA would have the rows share one dequantized weight and write it to memory. Behind a barrier each has
            # its own, which is fused. Other kinds are not elementwise in their codes: their work is not repeated.
            w = w.replace(codes=jax.lax.optimization_barrier(w.codes))
        rows.append(jnp.sum(w.dequantize(x.dtype).astype(jnp.float32) * row.astype(jnp.float32), axis=-1))
    return jnp.stack(rows).reshape(*x.shape[:-1], rows[0].shape[0]).astype(x.dtype)


def _forward(x: jax.Array, w: QTensor) -> tuple[jax.Array, QTensor]:
    return _plain(x, w), w


def _backward(w: QTensor, g: jax.Array) -> tuple[jax.Array, None]:
    dense = w.dequantize(g.dtype)
    return jax.lax.dot_general(g, dense, (((g.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(
        g.dtype
    ), None


_plain.defvjp(_forward, _backward)


@functools.cache
def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _kernel_refusal(x: jax.Array, w: QTensor) -> str | None:
    """None where a GPU kernel takes the pair, else the reason why not."""
    try:
        import pallas_kernels
    except ImportError as e:
        return f"pallas_kernels cannot be imported ({e})"
    return pallas_kernels.supports(w, x)
