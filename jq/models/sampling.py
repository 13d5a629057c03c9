"""Choice of the next token from logits: greedy, or transformers' chain of penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

OFF = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Switches:
    """What is compiled in: static, so that greedy decoding sorts nothing."""

    sample: bool = False
    penalty: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Run-time values: changing them compiles nothing.

    Fields:
      seeds: uint32[B], one for each row, so that a row's tokens do not depend on the rest of the batch.
      temperature, top_p, min_p, penalty: float32 scalars (1, 1, 0, 1 do nothing).
      top_k: int32 scalar, 0 for all.
      eos: int32[E], tokens that end a row (-1 pads).
      pad: int32 scalar, what ended rows give.
    """

    seeds: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    eos: jax.Array
    pad: jax.Array


def pick(logits: jax.Array, seen: jax.Array | None, settings: Settings, step: Any, switches: Switches) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32[B, V].
      seen: bool[B, V], tokens of the prompt and of the answer so far; needed for the penalty only.
      settings, switches: see there.
      step: number of the token, which makes its random numbers.

    Returns:
      int32[B].
    """
    if switches.penalty:
        assert seen is not None
        punished = jnp.where(logits < 0, logits * settings.penalty, logits / settings.penalty)
        logits = jnp.where(seen, punished, logits)
    if not switches.sample:
        return _largest(logits)
    logits = filtered(logits / settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(settings.seeds)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _largest(logits: jax.Array) -> jax.Array:
    """First place of the largest value (of a NaN, where there is one) of each row: int32[B]."""
    if jax.default_backend() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # XLA's CPU backend vectorises a maximum and a minimum, but not an argmax (0.24 ms for 49,152 tokens).
    found = (logits == jnp.max(logits, axis=-1, keepdims=True)) | jnp.isnan(logits)
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(found, places, logits.shape[-1]), axis=-1)


def filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Logits with every token that top-k, then top-p, then min-p drops at -inf: float32[B, V].

    Ties at the border of top-k stay, as in transformers.
    """
    vocab = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1)[..., ::-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab) - 1
    border = jnp.take_along_axis(ranked, jnp.full((*logits.shape[:-1], 1), last), axis=-1)
    logits = jnp.where(logits < border, OFF, logits)
    ranked = jnp.where(ranked < border, OFF, ranked)
    # Nucleus: the fewest tokens whose probabilities reach top_p; the one that crosses the border stays.
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    kept = (before < top_p) | (jnp.arange(vocab) == 0)
    border = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < border, OFF, logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    best = jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < min_p * best, OFF, logits)


def mark(seen: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """`seen` with one more token a row."""
    return None if seen is None else seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
