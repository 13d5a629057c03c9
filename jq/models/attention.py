"""Grouped-query attention with causal, sliding-window and padding masks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def causal_mask(queries: jax.Array, keys: jax.Array, starts: jax.Array | None, window: int | None) -> jax.Array:
    """Which key slots each query slot sees: bool[B or 1, 1, T, S].

    Args:
      queries: int32[T] slots of the queries.
      keys: int32[S] slots of the keys.
      starts: int32[B], first slot of each row that is no padding; None: all.
      window: i - window < j <= i, None for all j <= i.
    """
    i, j = queries[:, None], keys[None, :]
    mask = j <= i
    if window is not None:
        mask &= j > i - window
    mask = mask[None]
    if starts is not None:
        mask = mask & (keys[None, None, :] >= starts[:, None, None])
    return mask[:, None]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T * scale) v with the softmax in float32.

    Args:
      q: [B, T, heads, head_dim].
      k, v: [B, kv_heads, S, head_dim]; heads is a multiple of kv_heads.
      mask: bool[B or 1, 1, T, S].
      sinks: float[heads], an extra logit for each head that takes weight and gives nothing.

    Returns:
      [B, T, heads, head_dim] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    precision: Any = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(batch, length, k.shape[1], groups, dim)
    scores = jnp.einsum("btngd,bnsd->bngts", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, -1, groups, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bngts,bnsd->btngd", weights.astype(q.dtype), v, precision=precision)
    return out.reshape(batch, length, heads, dim)
