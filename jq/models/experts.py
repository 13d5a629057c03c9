"""Mixture-of-experts MLPs: a router, experts that are ordinary MLPs, and optionally one that every token passes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jq.models.reader import Reader
from jq.models.spec import DecoderSpec
from jq.nn import Linear


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
        spec = self.experts_spec
        logits = getattr(self, self.router_name)(x).astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1) if spec.softmax_first else logits
        top, index = jax.lax.top_k(scores, spec.top)
        if not spec.softmax_first:
            top = jax.nn.softmax(top, axis=-1)
        elif spec.normalize:
            top = top / jnp.sum(top, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(index, spec.count, dtype=jnp.float32)  # [B, T, top, experts]
        return jnp.sum(chosen * top[..., None], axis=-2)
