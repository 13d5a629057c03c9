"""Where a decode step runs a GPU kernel that does more than one product, and the plain form wherever none applies.

The kernels are `pallas_kernels.fused` and `.dense` (products of few rows, a norm or gate made inside), `.norm` (those
alone) and `.attention` (one token over its cache). They serve steps of one token a row; nothing differentiates through
those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq.models import kv_cache
from jq.nn import Embedding, FusedLinear, Linear, RMSNorm
from jq.qtensor import QTensor

# Activations that the fused kernel computes, by the name in config.json.
GATES = {"silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def plus(x: jax.Array, delta: jax.Array | None) -> jax.Array:
    return x if delta is None else x + delta


def normed(
    norm: RMSNorm | None, x: jax.Array, delta: jax.Array | None, step: bool, packed: bool
) -> tuple[jax.Array, jax.Array]:
    """(norm(x + delta), x + delta) of x [B, T, K]; norm None: none, delta None: nothing to add.

    Args:
      step: one token a row is decoded.
      packed: the model computes from packed weights.
    """
    if step and norm is not None and delta is not None and _usable(packed):
        from pallas_kernels import norm as kernel
        from pallas_kernels.prologue import Norm

        width = x.shape[-1]
        if kernel.refusal(x.dtype, width) is None:
            weight = norm.weight.get_value().astype(x.dtype)
            flat = x.reshape(-1, width), delta.reshape(-1, width), weight
            y, total = kernel.add_norm(*flat, prologue=Norm(norm.eps, norm.offset))
            return y.reshape(x.shape), total.reshape(x.shape)
    x = plus(x, delta)
    return (x if norm is None else norm(x)), x


def norm_product(
    norm: RMSNorm | None, linear: Linear | FusedLinear, x: jax.Array, delta: jax.Array | None, step: bool
) -> tuple[jax.Array, jax.Array]:
    """(linear(norm(x + delta)), x + delta); see `normed`."""
    if step and norm is not None:
        from pallas_kernels.prologue import Norm

        prologue = Norm(norm.eps, norm.offset, delta is not None)
        made = _launch(linear.weight.get_value(), linear.bias, prologue, x, delta, norm.weight.get_value())
        if made is not None:
            return made[0], made[1] if len(made) > 1 else x
    h, x = normed(norm, x, delta, step, isinstance(linear.weight.get_value(), QTensor))
    return product(linear, h, step), x


def norm_gate(
    norm: RMSNorm | None, linear: Linear | FusedLinear, x: jax.Array, delta: jax.Array | None, name: str, step: bool
) -> tuple[jax.Array, jax.Array] | None:
    """(activation(gate) * up of [gate | up] = linear(norm(x + delta)), x + delta) by one kernel, None where none does."""
    weight = linear.weight.get_value()
    if not step or norm is None or name not in GATES or not isinstance(weight, QTensor):
        return None
    from pallas_kernels.prologue import Gate, Norm

    prologue = Norm(norm.eps, norm.offset, delta is not None)
    made = _launch(weight, linear.bias, prologue, x, delta, norm.weight.get_value(), Gate(GATES[name]))
    return None if made is None else (made[0], made[1] if len(made) > 1 else x)


def gated_product(
    linear: Linear, gate_up: jax.Array, name: str, activation: Callable[[jax.Array], jax.Array], step: bool
) -> jax.Array:
    """linear(activation(gate) * up) of gate_up [B, T, 2 K], gate first; `name` is config.json's of the activation."""
    width = gate_up.shape[-1] // 2
    if step and name in GATES and _usable(isinstance(linear.weight.get_value(), QTensor)):
        from pallas_kernels import norm as kernel
        from pallas_kernels.prologue import Gate

        prologue = Gate(GATES[name])
        made = _launch(linear.weight.get_value(), linear.bias, prologue, gate_up)
        if made is not None:
            return made[0]
        if kernel.refusal(gate_up.dtype, width) is None:
            h = kernel.gate(gate_up.reshape(-1, 2 * width), prologue=prologue)
            return product(linear, h.reshape(*gate_up.shape[:-1], width), step)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return linear(activation(gate.astype(jnp.float32)).astype(up.dtype) * up)


def product(linear: Linear | FusedLinear, x: jax.Array, step: bool) -> jax.Array:
    """linear(x)."""
    if step and not isinstance(linear.weight.get_value(), QTensor):
        from pallas_kernels.prologue import Plain

        made = _launch(linear.weight.get_value(), linear.bias, Plain(), x)
        if made is not None:
            return made[0]
    return linear(x)


def tied_product(table: Embedding, x: jax.Array, step: bool) -> jax.Array:
    """table.attend(x)."""
    if step:
        from pallas_kernels.prologue import Plain

        made = _launch(table.weight.get_value(), None, Plain(), x)
        if made is not None:
            return made[0]
    return table.attend(x)


def attention(
    parts: tuple[jax.Array, ...],
    cache: tuple[kv_cache.Buffer, kv_cache.Buffer],
    rope: tuple[jax.Array, jax.Array] | None,
    slot: Any,
    starts: jax.Array | None,
    sinks: jax.Array | None,
    packed: bool,
    **heads: Any,
) -> tuple[jax.Array, tuple[kv_cache.Buffer, kv_cache.Buffer]] | None:
    """Attention of one token a row by the kernel, None where it does not apply.

    Args:
      parts: q, k and v before rope, [B, 1, width]: three arrays, or one of all.
      rope: cos and sin, float32[B or 1, 1, half], or None.
      packed: the layer computes from packed weights.
      heads: fields of `pallas_kernels.attention.Heads`.

    Returns:
      ([B, 1, heads * head_dim], cache with the new token at `slot`).
    """
    if not _usable(packed) or any(b.scales is not None for b in cache):
        return None
    from pallas_kernels import attention as kernel

    spec, (keys, values) = kernel.Heads(**heads), (b.codes for b in cache)
    rotated = None if rope is None else 2 * rope[0].shape[-1]
    if kernel.refusal(spec, parts[0].dtype, keys.dtype, rotated) is not None:
        return None
    batch = keys.shape[0]
    flat = tuple(p.reshape(batch, -1) for p in parts)
    if rope is not None:
        rope = tuple(jnp.broadcast_to(a[:, 0], (batch, a.shape[-1])) for a in rope)  # type: ignore[assignment]
    out, keys, values = kernel.decode_attention(flat, keys, values, rope, slot, starts, sinks, spec=spec)
    return out[:, None], (kv_cache.Buffer(keys), kv_cache.Buffer(values))


def _on_gpu() -> bool:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if jax.default_backend() != "gpu" or getattr(chosen, "platform", chosen) not in (None, "gpu", "cuda"):
        return False
    from pallas_kernels import api

    return api.device_reason() is None


def _usable(packed: bool) -> bool:
    # Kernels run on one device. Packed weights are on one already; dense ones may lie spread over all.
    return _on_gpu() and (packed or len(jax.devices()) == 1)


def _launch(
    weight: Any,
    bias: Any,
    prologue: Any,
    a: jax.Array,
    b: jax.Array | None = None,
    norm: jax.Array | None = None,
    epilogue: Any = None,
) -> tuple[jax.Array, ...] | None:
    """One kernel that makes x out of a (and b) [..., width] and multiplies, None where none does.

    Returns:
      (product [..., N],), and a + b behind it for a norm that adds.
    """
    packed = isinstance(weight, QTensor)
    if not _usable(packed) or str(a.dtype) not in ("bfloat16", "float16"):
        return None
    from pallas_kernels import dense, fused

    n, k = weight.shape
    rows = a.reshape(-1, a.shape[-1])
    inputs = (
        None if b is None else b.reshape(rows.shape),
        None if norm is None else norm.astype(a.dtype),
        None if bias is None else bias.get_value().astype(jnp.float32),
    )
    if packed:
        kernel_weight = _view(weight)
        choose = fused.choice_for if epilogue is None else fused.gated_choice
        choice = None if kernel_weight is None else choose(prologue, rows.shape[0], kernel_weight)
        if choice is None:
            return None
        static = {"prologue": prologue, "epilogue": epilogue, "config": choice.config}
        out = fused.matmul(rows, kernel_weight, *inputs, **static)
    else:
        plan = dense.plan_for(prologue, rows.shape[0], n, k, a.dtype) if weight.dtype == a.dtype else None
        if plan is None:
            return None
        out = dense.matmul(rows, weight, *inputs, prologue=prologue, plan=plan)
    return tuple(y.reshape(*a.shape[:-1], -1) for y in out)


def _view(weight: QTensor) -> Any:
    """The kernel's view of a weight, None where no kernel takes it."""
    import pallas_kernels
    from pallas_kernels import tensors

    if getattr(weight, "activation", None) is not None or pallas_kernels.supports(weight) is not None:
        return None
    return tensors.packed(weight.replace(extras={}, source=None))
