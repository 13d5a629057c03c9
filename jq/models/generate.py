"""Text generation: prompts in, tokens or text out, whole or as a stream. The compiled parts are in `steps`."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jq.models import functional, generation_config, steps
from jq.models.sampling import Settings, Switches

STREAM_CHUNK = 4  # tokens a call while streaming
STOP_CHUNK = 16  # tokens between two looks for a stop string


@dataclasses.dataclass(frozen=True)
class Plan:
    """Options of one generation, defaults resolved."""

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]
    switches: Switches
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def settings(self, batch: int) -> Settings:
        eos = np.full(max(8, len(self.eos)), -1, np.int32)  # one shape for all usual lists
        eos[: len(self.eos)] = self.eos
        return Settings(
            seeds=jnp.asarray((self.seed + np.arange(batch)).astype(np.uint32)),
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(self.top_k),
            top_p=jnp.float32(self.top_p),
            min_p=jnp.float32(self.min_p),
            penalty=jnp.float32(self.repetition_penalty),
            eos=jnp.asarray(eos),
            pad=jnp.int32(self.pad),
        )


_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def plan(
    defaults: Mapping[str, Any],
    *,
    longest: int = 0,
    max_new_tokens: int | None,
    do_sample: bool | None,
    eos_token_id: int | Sequence[int] | None,
    stop: str | Sequence[str] | None,
    seed: int,
    options: Mapping[str, Any],
) -> Plan:
    """Merges a call's arguments with generation_config.json (`defaults`).

    `do_sample` decides between greedy and sampling; where the call does not say, naming a sampling option means
    sampling, and else the file decides. A temperature of 0 is greedy. `longest` is the length of the longest prompt, which
    the file's `max_length` counts in.

    Raises:
      ValueError: an option whose value makes no sense.
    """
    given = {k: v for k, v in options.items() if v is not None}
    try:
        for name, value in given.items():
            generation_config.check(name, value)
        if max_new_tokens is not None:
            generation_config.check("max_new_tokens", max_new_tokens)
        ends = generation_config.tokens(
            "eos_token_id", defaults.get("eos_token_id") if eos_token_id is None else eos_token_id
        )
        stops = generation_config.strings("stop", defaults.get("stop_strings") if stop is None else stop)
    except ValueError as e:
        raise ValueError(f"generate: {e}") from None
    if do_sample is None:
        do_sample = any(k in given for k in _SAMPLING) or bool(defaults.get("do_sample", False))
    values = {k: given.get(k, defaults.get(k)) for k in (*_SAMPLING, "repetition_penalty")}
    if values["top_k"] is None and do_sample:
        values["top_k"] = 50  # transformers' default
    if do_sample and values["temperature"] is not None and values["temperature"] <= 0:
        do_sample = False
    penalty = float(values["repetition_penalty"] or 1.0)
    pad = defaults.get("pad_token_id")
    top_p = values["top_p"]
    return Plan(
        max_new_tokens=_limit(defaults, longest, max_new_tokens),
        eos=ends,
        pad=int(pad if isinstance(pad, int) and pad >= 0 else ends[0] if ends else 0),
        stop=stops,
        switches=Switches(sample=bool(do_sample), penalty=penalty != 1.0),
        temperature=float(1.0 if values["temperature"] is None else values["temperature"]) if do_sample else 1.0,
        top_k=int(values["top_k"] or 0),
        top_p=float(1.0 if top_p is None else top_p),
        min_p=float(values["min_p"] or 0.0),
        repetition_penalty=penalty,
        seed=seed,
    )


def _limit(defaults: Mapping[str, Any], longest: int, asked: int | None) -> int:
    """New tokens to make: what the call asks for, else the file's max_new_tokens, else what its max_length leaves, else 256."""
    if asked is not None or "max_new_tokens" in defaults:
        return int(defaults["max_new_tokens"] if asked is None else asked)
    left = int(defaults.get("max_length", longest + 256)) - longest
    if left < 1:
        raise ValueError(
            f"generate: the prompt has {longest} tokens, generation_config.json allows {defaults['max_length']} in all "
            "(max_length); give max_new_tokens"
        )
    return left


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32[B, T] (T a bucket) and the first slot of each that is no padding, int32[B]."""
    if not rows or any(len(r) == 0 for r in rows):
        raise ValueError("generate: every prompt needs at least one token")
    length = steps.bucket(max(map(len, rows)))
    ids = np.full((len(rows), length), pad, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[length - len(tokens) :] = tokens
    return ids, np.array([length - len(r) for r in rows], np.int32)


def run(
    model: Any, rows: Sequence[Sequence[int]], plan: Plan, chunk: int | None = None
) -> Generator[np.ndarray, np.ndarray | None, None]:
    """Generates for a batch of token lists.

    Args:
      model: `jq.models.causal_lm.CausalLM`.
      rows: prompts as token ids.
      plan: options.
      chunk: tokens a call; None: all in one call.

    Yields:
      int32[B, n] of new tokens (n >= 1; ended rows give `plan.pad`). `send(bool[B])` ends rows from outside.
    """
    vocab = model.spec.vocab_size
    if any(not 0 <= t < vocab for row in rows for t in row):
        raise ValueError(f"generate: a token id lies outside the vocabulary of {vocab}")
    graph, state = functional.split(model)
    settings, so_far = plan.settings(len(rows)), [list(row) for row in rows]
    token, carry, place = _read(graph, state, so_far, plan, settings, vocab, 0)
    new = np.asarray(token)[:, None]
    stopped = yield new
    made, edge, longest = 1, model.spec.reread_at, max(map(len, rows))
    while made < plan.max_new_tokens:
        cache, seen, done = carry
        if stopped is not None:
            done = done | jnp.asarray(stopped)
        if bool(np.asarray(done).all()):
            return
        count = plan.max_new_tokens - made if chunk is None else min(chunk, plan.max_new_tokens - made)
        if edge is not None and longest + made <= edge + 1:
            for row, tokens in zip(so_far, new.tolist(), strict=True):
                row.extend(tokens)
            count = min(count, edge + 1 - longest - made)
        if count == 0:
            token, (cache, seen, ended), place = _read(graph, state, so_far, plan, settings, vocab, made)
            token = jnp.where(done, plan.pad, token)
            carry, n, new = (cache, seen, done | ended), 1, np.asarray(token)[:, None]
        else:
            out, n, carry = steps.decode(
                graph,
                state,
                place.slots,
                plan.switches,
                (cache, seen, done),
                token,
                jnp.int32(place.shift + made - 1),
                jnp.int32(made),
                jnp.int32(count),
                place.starts,
                settings,
            )
            n = int(n)
            new = np.asarray(out)[:, :n]
            token = out[:, n - 1]
        made += n
        stopped = yield new


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where tokens go in a cache: `slots` in all; new token i (from 0) takes slot `shift + i`; `starts` as in `steps`."""

    slots: int
    shift: int
    starts: Any


def _read(
    graph: Any, state: Any, rows: list[list[int]], plan: Plan, settings: Settings, vocab: int, made: int
) -> tuple[Any, Any, _Place]:
    """Reads rows (the prompts, and `made` new tokens of each) into a fresh cache: (next token, carry, place)."""
    ids, starts = left_padded(rows, plan.pad if plan.pad < vocab else 0)
    length = ids.shape[1]
    slots, on_device = steps.bucket(length + plan.max_new_tokens - made, 128), jnp.asarray(starts)
    token, carry = steps.prefill(graph, state, slots, plan.switches, jnp.asarray(ids), on_device, settings, made)
    return token, carry, _Place(slots, length - made, on_device)


class Rows:
    """The answers of a batch as they grow: cuts at end tokens and stop strings.

    Args:
      plan: options.
      batch: number of rows.
      decode: token ids -> text, needed for stop strings and text.
    """

    def __init__(self, plan: Plan, batch: int, decode: Any) -> None:
        self.plan, self.decode = plan, decode
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.ended = np.zeros(batch, bool)
        self.cut: list[str | None] = [None] * batch  # text up to a stop string

    def add(self, new: np.ndarray) -> None:
        """Appends int32[B, n]; nothing is added behind an end."""
        for b, row in enumerate(new.tolist()):
            for token in row:
                if self.ended[b]:
                    break
                self.tokens[b].append(token)
                self.ended[b] = token in self.plan.eos
            if self.plan.stop and self.cut[b] is None:
                self._look_for_stop(b)

    def text(self, b: int) -> str:
        cut = self.cut[b]
        return self.decode(self.tokens[b]) if cut is None else cut

    def _look_for_stop(self, b: int) -> None:
        text = self.decode(self.tokens[b])
        places = [text.find(s) for s in self.plan.stop if s in text]
        if places:
            self.cut[b] = text[: min(places)]
            self.ended[b] = True
            self._drop_tokens_behind_stop(b)

    def _drop_tokens_behind_stop(self, b: int) -> None:
        """Ends the tokens with the one that completes the stop string, as transformers does."""
        tokens = self.tokens[b]
        for n in range(len(tokens) - 1, 0, -1):
            if not any(s in self.decode(tokens[:n]) for s in self.plan.stop):
                self.tokens[b] = tokens[: n + 1]
                return
        self.tokens[b] = tokens[:1]
