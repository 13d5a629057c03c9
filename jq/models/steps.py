"""The compiled functions of a model: whole-sequence logits, prefill, and the decode loop on the device.

Each is one `jax.jit` over (graph definition, state): models of equal structure share compilations, and quantized
weights are arguments, never constants. Shapes are bucketed, so that prompts of like length share them too.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jq.models import decoder, functional, kv_cache, sampling
from jq.models.sampling import Settings, Switches


def bucket(length: int, smallest: int = 16) -> int:
    """Padded length: the next of 16, 32, 64, 128, then four sizes to each doubling (160, 192, 224, 256, 320, ...)."""
    size = smallest
    while size < length and size < 128:
        size *= 2
    while size < length:
        size += (1 << (size.bit_length() - 1)) // 4
    return size


@functools.partial(jax.jit, static_argnums=0)
def logits(graph: Any, state: Any, ids: jax.Array, starts: jax.Array | None) -> jax.Array:
    """Logits float32[B, T, V] of ids int32[B, T]; starts int32[B] is the first slot of each row that is no padding."""
    return forward(functional.join(graph, state), ids, starts)


def forward(model: Any, ids: jax.Array, starts: jax.Array | None) -> jax.Array:
    hidden, _ = model.model(ids, _positions(ids.shape[1], starts), starts)
    return decoder.head(model.model, model.lm_head, hidden)


def _positions(length: int, starts: jax.Array | None) -> jax.Array:
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    return slots if starts is None else jnp.maximum(slots - starts[:, None], 0)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def prefill(
    graph: Any,
    state: Any,
    slots: int,
    switches: Switches,
    ids: jax.Array,
    starts: jax.Array,
    settings: Settings,
    step: Any = 0,
) -> tuple[jax.Array, Any]:
    """Reads the prompts into a fresh cache and picks the first token.

    Args:
      slots: cache length, static.
      ids: int32[B, T], padded on the left.
      starts: int32[B].
      step: number of the token that is made here (random numbers).

    Returns:
      (first token int32[B], carry of `decode`).
    """
    model = functional.join(graph, state)
    cache = model.model.empty_cache(ids.shape[0], slots)
    hidden, cache = model.model(ids, _positions(ids.shape[1], starts), starts, cache)
    last = decoder.head(model.model, model.lm_head, hidden[:, -1])
    seen = None
    if switches.penalty:
        valid = jnp.arange(ids.shape[1])[None] >= starts[:, None]
        rows = jnp.arange(ids.shape[0])[:, None]
        seen = jnp.zeros((ids.shape[0], last.shape[-1]), bool).at[rows, ids].max(valid)
    token = sampling.pick(last, seen, settings, step, switches)
    done = jnp.any(token[:, None] == settings.eos[None], axis=-1)
    return token, (cache, sampling.mark(seen, token), done)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), donate_argnums=4)
def decode(
    graph: Any,
    state: Any,
    room: int,
    switches: Switches,
    carry: Any,
    token: jax.Array,
    slot: jax.Array,
    step: jax.Array,
    count: jax.Array,
    starts: jax.Array,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, Any]:
    """Up to `count` more tokens in one loop on the device; stops when all rows have ended.

    Args:
      room: width of the output, static; at least `count`.
      carry: (cache, seen, done), donated.
      token: int32[B], the newest token, not yet in the cache.
      slot: int32 scalar, cache slot that it takes.
      step: int32 scalar, number of the first token that is made here (random numbers).
      count: int32 scalar.

    Returns:
      (tokens int32[B, room] of which the first `made` count, made, carry).
    """
    model = functional.join(graph, state)
    cache, seen, done = carry

    def unfinished(c: Any) -> jax.Array:
        return (c[0] < count) & ~jnp.all(c[4])

    def body(c: Any) -> Any:
        i, token, cache, seen, done, out = c
        at = slot + i
        positions = jnp.maximum(at - starts, 0)[:, None]
        hidden, cache = model.model(token[:, None], positions, starts, cache, at)
        scores = decoder.head(model.model, model.lm_head, hidden, step=True)[:, 0]
        token = sampling.pick(scores, seen, settings, step + i, switches)
        token = jnp.where(done, settings.pad, token)
        ended = jnp.any(token[:, None] == settings.eos[None], axis=-1)
        return i + 1, token, cache, sampling.mark(seen, token), done | ended, out.at[:, i].set(token)

    out = jnp.full((token.shape[0], room), settings.pad, jnp.int32)
    start = (jnp.int32(0), token, kv_cache.merged(cache), seen, done, out)
    made, _, cache, seen, done, out = jax.lax.while_loop(unfinished, body, start)
    return out, made, (kv_cache.apart(cache, token.shape[0]), seen, done)
