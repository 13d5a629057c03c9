"""`matmul` over packed weights and QTensors: choice of the kernel, jit, vmap, gradient."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.form import Packed
from pallas_kernels.select import ARCHITECTURES, KERNELS, Choice, choose, device_key

Array = Any
_log = logging.getLogger(__name__)


@functools.cache
def device_reason() -> str | None:
    """Why the default device runs no kernel, or None."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}: the kernels need 0.11"
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the default device is {device.platform}"
    capability = str(getattr(device, "compute_capability", "?"))
    if capability not in ARCHITECTURES:
        reason = f"compute capability {capability}: kernels are there for {', '.join(ARCHITECTURES)}"
        _log.warning("pallas_kernels: %s; plain JAX runs instead", reason)
        return reason
    return None


def supports(w: Any, x: Any = None) -> str | None:
    """None where a kernel multiplies x [..., K] with the QTensor w, else the reason why not.

    Args:
      x: array or shape struct; None asks for the weight and the device alone.
    """
    from pallas_kernels import tensors

    if reason := device_reason():
        return reason
    if not getattr(w, "layout", ""):
        return tensors.refusal(w) or "the weight is not in a kernel's order; pallas_kernels.prepare makes it so"
    if reason := tensors.refusal(w):
        return reason
    if x is not None:
        if str(x.dtype) not in ("bfloat16", "float16"):
            return f"x of {x.dtype}; kernels take bfloat16 and float16"
        if x.size == 0:
            return "x is empty"
    return None


def matmul(x: jax.Array, w: Any, *, bias: jax.Array | None = None, layer: Array | None = None) -> jax.Array:
    """`x @ w.T (+ bias)` by a GPU kernel.

    Args:
      x: bfloat16 or float16 [..., K].
      w: a prepared QTensor (`prepare`) [N, K], or [L, N, K] with `layer`; or a `Packed`.
      bias: [N], added in float32.
      layer: integer scalar, the slice of a stack; nothing is copied.

    Returns:
      [..., N] in x's dtype, summed in float32. Differentiable with respect to x (and bias); vmap runs one by one.
    """
    if not isinstance(w, Packed):
        from pallas_kernels import tensors

        w = tensors.prepare(w).replace(extras={}, activation=None, source=None)
    n, k = w.shape[-2:]
    if x.shape[-1] != k:
        raise ValueError(f"pallas_kernels.matmul: x of {x.shape} does not fit a weight of {tuple(w.shape)}")
    index = None if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    bias = None if bias is None else bias.astype(jnp.float32)
    axes = frozenset[str]().union(*(_axes(leaf) for leaf in jax.tree.leaves((x, w, bias, index))))
    y = _matmul(_along(x.reshape(-1, k), axes), w, None if bias is None else _along(bias, axes), index)
    return y.reshape(*x.shape[:-1], n)


def _axes(array: Any) -> frozenset[str]:
    """Axes of a `shard_map` along which an array differs."""
    return jax.typeof(array).manual_axis_type.varying


def _along(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array as one that differs along these axes: its gradient is then summed over those along which it did not."""
    missing = tuple(sorted(axes - _axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


@jax.custom_vjp
def _matmul(x: jax.Array, w: Any, bias: jax.Array | None, layer: jax.Array | None) -> jax.Array:
    return _batched(x, w, bias, layer)


def _forward(x: jax.Array, w: Any, bias: Any, layer: Any) -> tuple[jax.Array, Any]:
    return _batched(x, w, bias, layer), (w, bias, layer)


def _backward(saved: Any, g: jax.Array) -> tuple[Any, ...]:
    w, bias, layer = saved
    packed = w if isinstance(w, Packed) else _view(w)
    if layer is not None:
        packed = jax.tree.map(lambda a: a[layer[0]], packed)
    dense = reference.dense(packed).astype(g.dtype)
    dx = jax.lax.dot_general(g, dense, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(g.dtype), None, None if bias is None else g.astype(jnp.float32).sum(0), None


_matmul.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _batched(x: jax.Array, w: Any, bias: jax.Array | None, layer: jax.Array | None) -> jax.Array:
    packed = w if isinstance(w, Packed) else _view(w)
    m, (n, k) = len(x), (size + -size % 8 for size in packed.shape)  # as `launch` pads them
    device = jax.devices()[0]
    cores = getattr(device, "core_count", None) or 132
    gathered = packed.perm is not None and m == 1
    choice = choose(m, n, k, packed.form, device_key(device.device_kind), cores, gathered)
    return _along(launch(x, packed, choice, bias, layer), _axes(x))  # a kernel's result has no axes of its own


def _view(w: Any) -> Packed:
    from pallas_kernels import tensors

    return tensors.packed(w)


@_batched.def_vmap
def _batched_rule(size: int, batched: Any, *args: Any) -> tuple[jax.Array, bool]:
    """Experts and other stacks: one launch after the other."""
    leaves, treedef = jax.tree.flatten(args)
    marks = jax.tree.leaves(batched)

    def one(i: jax.Array) -> jax.Array:
        picked = [jax.lax.dynamic_index_in_dim(a, i, keepdims=False) if b else a for a, b in zip(leaves, marks)]
        return _batched(*jax.tree.unflatten(treedef, picked))

    return jax.lax.map(one, jnp.arange(size)), True


@functools.partial(jax.jit, static_argnames="choice")
def launch(
    x: jax.Array, w: Packed, choice: Choice, bias: jax.Array | None = None, layer: jax.Array | None = None
) -> jax.Array:
    """One kernel on x [M, K]. A jit of its own, so that equal calls in a program compile once.

    K and N that are no multiple of 8 are padded here; the kernels' copies need rows of whole 16 bytes.
    """
    n, k = w.shape
    if k % 8:
        x = jnp.pad(x, ((0, 0), (0, -k % 8)))
        if w.perm is not None:
            tail = jnp.broadcast_to(jnp.arange(k, k + -k % 8, dtype=jnp.int32), (*w.perm.shape[:-1], -k % 8))
            w = w.replace(perm=jnp.concatenate([w.perm, tail], -1))
    if w.perm is not None and (choice.kernel != "stream" or x.shape[0] > 1):
        x = jnp.take(x, w.perm if layer is None else w.perm[layer[0]], axis=1)
        w = w.replace(perm=None)
    w = w.replace(shape=(n + -n % 8, k + -k % 8))
    if bias is not None and n % 8:
        bias = jnp.pad(bias, (0, -n % 8))
    y = KERNELS[choice.kernel].matmul(x, w, choice.config, bias, layer)
    return y[:, :n] if n % 8 else y
