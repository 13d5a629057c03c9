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
      k, v: [B, kv_heads, S, head_dim], or [B * kv_heads, S, head_dim] where T is 1; heads is a multiple of kv_heads.
      mask: bool[B or 1, 1, T, S].
      sinks: float[heads], an extra logit for each head that takes weight and gives nothing.

    Returns:
      [B, T, heads, head_dim] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1] if k.ndim == 4 else k.shape[0] // batch
    groups = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, groups, dim)
    scores = _scores(grouped, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, -1, groups, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    return _mix(weights.astype(q.dtype), v).reshape(batch, length, heads, dim)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, n, g, D] by k [B, n, S, D] or [B * n, S, D]: float32[B, n, g, T, S]."""
    if k.ndim == 3:
        batch, _, n, g, dim = q.shape
        both = (((2,), (2,)), ((0,), (0,)))
        scores = jax.lax.dot_general(q.reshape(-1, g, dim), k, both, precision=_precision(q))
        return scores.reshape(batch, n, g, 1, -1)
    if _by_reduction(q.shape[1]):
        one = q[:, 0, :, :, None, None].astype(jnp.float32)
        return jnp.sum(one * k[:, :, None, None].astype(jnp.float32), axis=-1)
    return jnp.einsum("btngd,bnsd->bngts", q, k, precision=_precision(q), preferred_element_type=jnp.float32)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [B, n, g, T, S] by v [B, n, S, D] or [B * n, S, D]: [B, T, n, g, D] in the weights' dtype."""
    if v.ndim == 3:
        batch, n, g, _, slots = weights.shape
        both = (((2,), (1,)), ((0,), (0,)))
        mixed = jax.lax.dot_general(weights.reshape(-1, g, slots), v, both, precision=_precision(weights))
        return mixed.reshape(batch, 1, n, g, -1)
    if _by_reduction(weights.shape[3]):
        terms = weights[:, :, :, 0, :, None].astype(jnp.float32) * v[:, :, None].astype(jnp.float32)
        return jnp.sum(terms, axis=-2).astype(weights.dtype)[:, None]
    return jnp.einsum("bngts,bnsd->btngd", weights, v, precision=_precision(weights))


def _by_reduction(length: int) -> bool:
    # For a dot with two batch axes XLA's CPU backend copies the whole cache of every layer at every token; a multiply
    # and reduce reads it where it lies. Faster still is a float32 cache with one batch axis: `kv_cache.merged`.
    return length == 1 and jax.default_backend() == "cpu"


def _precision(x: jax.Array) -> Any:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
