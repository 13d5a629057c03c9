"""Mixture-of-experts MLPs: a router, experts that are ordinary MLPs, and optionally one that every token passes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jq import activations
from jq.models.reader import Reader
from jq.models.spec import DecoderSpec, Experts
from jq.nn import Linear, product
from jq.qtensor import QTensor


class ExpertMLP(nnx.Module):
    """sum over the chosen experts of weight * expert(x).

    Experts that no token of the call chose are skipped at run time (`lax.cond`), so a single token computes `top`
    experts; a long prompt computes each expert on all tokens.

    Args:
      read: source of the tensors.
      path: module path in the checkpoint.
      spec: of the decoder.
      mlp: class of an expert (`jq.models.decoder.MLP`).
    """

    def __init__(self, read: Reader, path: str, spec: DecoderSpec, mlp: Any) -> None:
        experts = spec.experts
        assert experts is not None
        self.experts_spec = experts
        _, router, *names = experts.names
        self.router_name = router
        setattr(self, router, read.linear(f"{path}.{router}", (experts.count, spec.hidden_size)))
        self.experts = nnx.List(
            [mlp(read, f"{path}.experts.{i}", spec, experts.width, tuple(names)) for i in range(experts.count)]
        )
        self.shared_expert = mlp(read, f"{path}.shared_expert", spec, experts.shared) if experts.shared else None
        self.shared_expert_gate: Linear | None = (
            read.linear(f"{path}.shared_expert_gate", (1, spec.hidden_size)) if experts.shared else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, T, hidden] -> the same shape."""
        weights = self._weights(x)  # [B, T, experts]
        out = jnp.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = weights[..., i : i + 1].astype(x.dtype)
            out = jax.lax.cond(
                jnp.any(share != 0),
                lambda out, share, expert=expert: out + expert(x) * share,
                lambda out, share: out,
                out,
                share,
            )
        if self.shared_expert is not None:
            assert self.shared_expert_gate is not None
            gate = jax.nn.sigmoid(self.shared_expert_gate(x).astype(jnp.float32)).astype(x.dtype)
            out = out + gate * self.shared_expert(x)
        return out

    def _weights(self, x: jax.Array) -> jax.Array:
        """Share of each expert for each token, zero for those not chosen: float32[B, T, experts]."""
        top, index = route(getattr(self, self.router_name)(x), self.experts_spec)
        return spread(top, index, self.experts_spec.count)


class StackedExperts(nnx.Module):
    """The parameters of gpt-oss' experts, under their names in the checkpoint.

    gate_up_proj: QTensor [E, 2 * width, hidden] or array [E, hidden, 2 * width]; down_proj: QTensor [E, hidden, width]
    or array [E, width, hidden].
    """

    def __init__(self, read: Reader, path: str, spec: DecoderSpec) -> None:
        experts = spec.experts
        assert experts is not None
        count, hidden, width = experts.count, spec.hidden_size, experts.width
        self.gate_up_proj, self.gate_up_proj_packed = read.stack(f"{path}.gate_up_proj", (count, 2 * width, hidden))
        self.gate_up_proj_bias = nnx.Param(read.array(f"{path}.gate_up_proj_bias", (count, 2 * width)))
        self.down_proj, self.down_proj_packed = read.stack(f"{path}.down_proj", (count, hidden, width))
        self.down_proj_bias = nnx.Param(read.array(f"{path}.down_proj_bias", (count, hidden)))


class StackedExpertMLP(nnx.Module):
    """gpt-oss' MLP: a router and stacked experts.

    Few tokens gather the weights of the experts that they chose; many go through all experts one after the other.
    """

    def __init__(self, read: Reader, path: str, spec: DecoderSpec) -> None:
        experts = spec.experts
        assert experts is not None
        self.spec = experts
        self.router = read.linear(f"{path}.router", (experts.count, spec.hidden_size), True)
        self.experts = StackedExperts(read, f"{path}.experts", spec)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, T, hidden] -> the same shape."""
        top, index = route(self.router(x), self.spec)
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] * self.spec.top <= self.spec.count:
            out = self._gathered(rows, top.reshape(len(rows), -1), index.reshape(len(rows), -1))
        else:
            out = self._through_all(rows, spread(top, index, self.spec.count).reshape(len(rows), -1))
        return out.reshape(x.shape)

    def _gathered(self, rows: jax.Array, top: jax.Array, index: jax.Array) -> jax.Array:
        """rows [M, hidden] by the experts index [M, top]."""
        wide, chosen = jnp.repeat(rows, self.spec.top, axis=0), index.reshape(-1)
        if in_kernels_order(self.experts.gate_up_proj.get_value()):  # the stack is read in place, expert by expert
            out = jnp.concatenate([self._expert(wide[s : s + 1], chosen[s]) for s in range(len(wide))])
        else:
            out = jax.vmap(self._expert)(wide[:, None], chosen)[:, 0]
        return jnp.sum(out.reshape(*top.shape, -1) * top[..., None].astype(rows.dtype), axis=1)

    def _through_all(self, rows: jax.Array, shares: jax.Array) -> jax.Array:
        """rows [M, hidden] by every expert, weighted with shares [M, experts]."""

        def add(i: Any, total: jax.Array) -> jax.Array:
            return total + self._expert(rows, i) * shares[:, i, None].astype(rows.dtype)

        return jax.lax.fori_loop(0, self.spec.count, add, jnp.zeros_like(rows))

    def _expert(self, rows: jax.Array, i: Any) -> jax.Array:
        p = self.experts
        both = stacked_product(rows, p.gate_up_proj.get_value(), i) + p.gate_up_proj_bias.get_value()[i]
        gate, up = both[..., ::2], both[..., 1::2]
        gate = jnp.minimum(gate, self.spec.limit).astype(jnp.float32)
        up = jnp.clip(up, -self.spec.limit, self.spec.limit)
        hidden = (up + 1) * (gate * jax.nn.sigmoid(gate * self.spec.alpha)).astype(up.dtype)
        return stacked_product(hidden, p.down_proj.get_value(), i) + p.down_proj_bias.get_value()[i]


def in_kernels_order(weight: Any) -> bool:
    return isinstance(weight, QTensor) and bool(getattr(weight, "layout", ""))


def stacked_product(x: jax.Array, weight: Any, i: Any) -> jax.Array:
    """x [M, K] times expert i of a stack: QTensor [E, N, K] or array [E, K, N]."""
    if in_kernels_order(weight):
        import pallas_kernels

        return pallas_kernels.matmul(x, weight, layer=i)
    if isinstance(weight, QTensor):
        one = weight[i]
        return activations.matmul(x, one) if one.activation is not None else product(x, one.dequantize(x.dtype))
    return product(x, weight[i].T)


def route(logits: jax.Array, spec: Experts) -> tuple[jax.Array, jax.Array]:
    """Weights float32[..., top] and indices int32[..., top] of the chosen experts."""
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if spec.softmax_first else logits
    top, index = jax.lax.top_k(scores, spec.top)
    if not spec.softmax_first:
        top = jax.nn.softmax(top, axis=-1)
    elif spec.normalize:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    return top, index


def spread(top: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """Share of each expert, zero for those not chosen: float32[..., count]."""
    return jnp.sum(jax.nn.one_hot(index, count, dtype=jnp.float32) * top[..., None], axis=-2)
