"""`CausalLM`: what `jq.load` returns. A decoder with its output matrix, tokenizer, generation, and the way back to a State."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jq.models import decoder, functional, steps, tokenizer
from jq.models.generate import STOP_CHUNK, STREAM_CHUNK, Plan, Rows, plan, run
from jq.models.origin import Origin
from jq.models.spec import DecoderSpec
from jq.nn import Linear


class CausalLM(nnx.Module):
    """A causal language model over (quantized) weights; an ordinary NNX module.

    Attributes:
      model: the `Decoder`; `model.layers[0].self_attn.q_proj` is a `jq.nn.Linear`, names as in the checkpoint.
      lm_head: output matrix, None where it is tied to the embedding.
      spec: static description.
      config: config.json as a dict.
      tokenizer: loaded at first use.
    """

    def __init__(self, body: decoder.Decoder, lm_head: Linear | None, spec: DecoderSpec, origin: Origin) -> None:
        self.model = body
        self.lm_head = lm_head
        self.spec = spec
        self.origin = origin

    @property
    def config(self) -> dict[str, Any]:
        return self.origin.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json over the token ids of config.json."""
        return self.origin.generation_config

    @property
    def tokenizer(self) -> Any:
        return self.origin.tokenizer

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Logits of whole sequences.

        Args:
          input_ids: int[B, T] (or [T]: a batch of one).
          attention_mask: [B, T] of 0 and 1; padding must be on the left, or on the right where the logits of padded
            places are not used.

        Returns:
          float32[B, T, V]. Ids outside the vocabulary give NaN.

        Raises:
          TypeError: ids that are not integers, or of another shape.
          ValueError: a mask of another shape, or with padding between tokens.
        """
        ids = jnp.asarray(input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"model: input_ids must be integers [B, T] or [T], got {ids.dtype}{ids.shape}")
        ids = ids.astype(jnp.int32)
        starts = None if attention_mask is None else _starts(attention_mask, ids.shape)
        graph, state = functional.split(self)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((ids, state))):
            return steps.forward(self, ids, starts)  # inside a caller's jit or grad
        return steps.logits(graph, state, ids, starts)

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int | None = None,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        attention_mask: Any = None,
    ) -> Any:
        """Continues prompts.

        Args:
          prompts: a text, a conversation ([{"role": ..., "content": ...}]), token ids (a list or an array [T] or
            [B, T]), or a list of such. Rows of different length are padded on the left and do not see each other.
          max_new_tokens: default from generation_config.json (also from its max_length), else 256.
          do_sample: greedy or sampling; default from generation_config.json, or sampling where an option of it is given.
          temperature, top_k, top_p, min_p, repetition_penalty: as in transformers.
          eos_token_id: token or tokens that end a row.
          stop: strings that end a row; the text is cut before them. Default from generation_config.json (stop_strings).
          seed: of the random numbers; row b uses seed + b.
          attention_mask: of padded token ids [B, T], 0 for padding, which must be on the left.

        Returns:
          For text: the continuation, a str, or a list of them for a list of prompts. For token ids: prompt and
          continuation as transformers gives them, int32[B, T + new] (rows that end early are padded) for an array, a
          list of token lists for lists of different length.

        Raises:
          ValueError: an option whose value makes no sense; a mask with padding elsewhere, or beside texts.
        """
        rows, form = self._rows(prompts, attention_mask)
        chosen = self._plan(locals(), rows)
        answers = Rows(chosen, len(rows), self._decode)
        chunk = STOP_CHUNK if chosen.stop else None
        for _ in self._answers(rows, chosen, chunk, answers):
            pass
        return form.result(rows, answers, chosen, prompts)

    def stream(self, prompt: Any, max_new_tokens: int | None = None, **options: Any) -> Iterator[Any]:
        """Like `generate` for one prompt, as an iterator: pieces of text for text, token ids for token ids."""
        rows, form = self._rows(prompt, None)
        if len(rows) != 1:
            raise ValueError(f"stream: takes one prompt, got {len(rows)}; generate takes a list")
        named = dict.fromkeys(_OPTIONS) | {"seed": 0, "max_new_tokens": max_new_tokens} | options
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise TypeError(f"stream: unknown options {', '.join(sorted(unknown))}")
        chosen = self._plan(named, rows)
        answers = Rows(chosen, 1, self._decode)
        pieces, given = tokenizer.TextStream(chosen.stop), 0
        for last in self._answers(rows, chosen, STREAM_CHUNK, answers):
            if form.text:
                piece = pieces.push(answers.text(0), last)
                if piece:
                    yield piece
            else:
                yield from answers.tokens[0][given:]
                given = len(answers.tokens[0])

    def to_state(self) -> Any:
        """The State that `jq.save` writes: every stored tensor, quantized ones as QTensors, in their stored dtypes."""
        state, fused = self.origin.state_of(self), self.origin.fused
        return state if fused is None else fused.join(state)

    def _answers(self, rows: list[list[int]], chosen: Plan, chunk: int | None, answers: Rows) -> Iterator[bool]:
        """Runs the generation into `answers`; yields after each chunk whether it is over."""
        made = 0
        tokens = run(self, rows, chosen, chunk)
        try:
            new = next(tokens)
            while True:
                answers.add(new)
                made += new.shape[1]
                over = bool(answers.ended.all()) or made >= chosen.max_new_tokens
                yield over
                if over:
                    return
                new = tokens.send(answers.ended)
        except StopIteration:
            return

    def _plan(self, arguments: dict[str, Any], rows: list[list[int]]) -> Plan:
        keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return plan(
            self.generation_config,
            longest=max(map(len, rows), default=0),
            max_new_tokens=arguments["max_new_tokens"],
            do_sample=arguments["do_sample"],
            eos_token_id=arguments["eos_token_id"],
            stop=arguments["stop"],
            seed=arguments["seed"],
            options={k: arguments[k] for k in keys},
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _rows(self, prompts: Any, mask: Any) -> tuple[list[list[int]], _Form]:
        """Prompts as token lists, and the form in which the answer goes back."""
        if mask is not None:
            return _unpadded(prompts, mask)
        if isinstance(prompts, str) or tokenizer.is_chat(prompts):
            return [tokenizer.encode(self.tokenizer, prompts)], _Form(text=True, single=True)
        if (
            isinstance(prompts, list | tuple)
            and prompts
            and (isinstance(prompts[0], str) or tokenizer.is_chat(prompts[0]))
        ):
            return [tokenizer.encode(self.tokenizer, p) for p in prompts], _Form(text=True)
        if isinstance(prompts, list | tuple):
            if prompts and isinstance(prompts[0], int | np.integer):
                return [[int(t) for t in prompts]], _Form(single=True)
            rows = [[int(t) for t in row] for row in prompts]
            return rows, _Form(ragged=len({len(r) for r in rows}) > 1)
        ids = np.asarray(prompts)
        if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
            raise TypeError(f"generate: prompts must be text or token ids [T] or [B, T], got {ids.dtype}{ids.shape}")
        if ids.ndim == 1:
            return [ids.tolist()], _Form(single=True, array=True)
        return ids.tolist(), _Form(array=True)


_OPTIONS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
    "stop",
    "seed",
)


class _Form:
    """How an answer goes back: as text or tokens, one or many."""

    def __init__(self, *, text: bool = False, single: bool = False, ragged: bool = False, array: bool = False) -> None:
        self.text, self.single, self.ragged, self.array = text, single, ragged, array

    def result(self, rows: list[list[int]], answers: Rows, plan: Plan, prompts: Any) -> Any:
        if self.text:
            texts = [answers.text(b) for b in range(len(rows))]
            return texts[0] if self.single else texts
        if self.ragged:
            return [row + new for row, new in zip(rows, answers.tokens, strict=True)]
        width = max(len(t) for t in answers.tokens)
        padded = [t + [plan.pad] * (width - len(t)) for t in answers.tokens]
        before = np.atleast_2d(np.asarray(prompts, np.int32)) if self.array else np.asarray(rows, np.int32)
        full = np.concatenate([before, np.asarray(padded, np.int32)], axis=1)
        return full[0] if self.single else full


def _unpadded(prompts: Any, mask: Any) -> tuple[list[list[int]], _Form]:
    """The rows of padded token ids without their padding.

    Raises:
      ValueError: texts, a mask of another shape, or padding that is not on the left.
    """
    try:
        ids, found = np.asarray(prompts), np.asarray(mask) > 0
    except (TypeError, ValueError):  # rows of different length
        ids, found = np.zeros(0), np.zeros(0, bool)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or found.shape != ids.shape:
        raise ValueError("generate: attention_mask goes with token ids of its own shape [B, T] or [T]")
    ids, found = np.atleast_2d(ids), np.atleast_2d(found)
    if not found[:, -1:].all() or (found[:, :-1] > found[:, 1:]).any():
        raise ValueError(
            "generate: attention_mask has padding on the right or between tokens, and new tokens would follow it; pad on the "
            "left (tokenizer.padding_side), or give token lists of different length"
        )
    rows = [row[kept].tolist() for row, kept in zip(ids, found, strict=True)]
    return rows, _Form(array=True, single=np.ndim(prompts) == 1)


def _starts(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """First slot of each row that is no padding; right padding needs no mask, since attention is causal."""
    found = jnp.asarray(mask) > 0
    found = found[None] if found.ndim == 1 else found
    if found.shape != shape:
        raise ValueError(f"model: attention_mask of shape {found.shape} beside input_ids of {shape}")
    if not isinstance(found, jax.core.Tracer):
        steps = np.diff(np.asarray(found).astype(np.int8), axis=1, prepend=0)
        if (np.count_nonzero(steps > 0, axis=1) != 1).any():
            raise ValueError("model: attention_mask has padding between tokens, or a row of nothing else")
    return jnp.argmax(found, axis=1).astype(jnp.int32)
