"""Perplexity on non-overlapping windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Advance = Callable[[int, int, str], None]


@jax.jit
def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log likelihoods, float32[B, T]: logits [B, T, V], targets int32[B, T]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def perplexity(
    model: Any, ids: Sequence[int] | np.ndarray | jax.Array, *, window: int = 1024, advance: Advance | None = None
) -> float:
    """exp of the mean negative log likelihood of a text's tokens.

    The tokens are cut from the start into windows of `window`, without overlap; no token is added. A window predicts its
    tokens 2..window. A last window that is not full is left out, unless it is the only one. Losses are float32, their
    mean float64: the recipe behind all perplexities in this project's documents.

    Args:
      model: callable, int32[B, T] -> logits [B, T, V].
      ids: token ids [tokens], or [windows, T] already cut (`window` is then ignored).
      window: tokens a window.
      advance: called with (windows done, windows, perplexity so far as text).

    Raises:
      ValueError: fewer than two tokens, a window below 2, ids outside the vocabulary.

    Example:
      >>> uniform = lambda ids: jnp.zeros((*ids.shape, 7))
      >>> round(perplexity(uniform, list(range(5)) * 4, window=10), 3)
      7.0
    """
    windows = _windows(np.asarray(ids), window)
    total, count = 0.0, 0
    for i, row in enumerate(windows):
        tokens = jnp.asarray(row[None], jnp.int32)
        logits = model(tokens)
        if row.min() < 0 or row.max() >= logits.shape[-1]:
            raise ValueError(f"perplexity: a token id lies outside the vocabulary of {logits.shape[-1]}")
        losses = np.asarray(_losses(logits[:, :-1], tokens[:, 1:]), np.float64)
        total += float(losses.sum())
        count += losses.size
        if advance is not None:
            advance(i + 1, len(windows), f"perplexity {_exp(total / count):.3f}")
    return _exp(total / count)


def _exp(mean: float) -> float:
    """exp that gives infinity where a float64 overflows; NaN stays NaN."""
    return math.inf if mean > 700 else math.exp(mean)


def _windows(ids: np.ndarray, window: int) -> np.ndarray:
    if ids.dtype.kind not in "iu":
        raise ValueError(f"perplexity: ids must be integers, got {ids.dtype}")
    if ids.ndim == 2:
        windows = ids
    elif ids.ndim == 1:
        window = min(window, len(ids))
        if window < 2:
            raise ValueError(f"perplexity: {len(ids)} tokens in windows of {window}; at least two are needed")
        windows = ids[: len(ids) // window * window].reshape(-1, window)
    else:
        raise ValueError(f"perplexity: ids must be [tokens] or [windows, tokens], got shape {ids.shape}")
    if windows.shape[1] < 2 or not len(windows):
        raise ValueError(f"perplexity: windows of shape {windows.shape}; at least two tokens are needed")
    return windows


def bundled_text() -> str:
    """The text that `jaxq demo` and `jaxq eval` use by default: the start of WikiText-2's raw test split."""
    return (resources.files("jq.report") / "texts" / "wikitext2-test-start.txt").read_text("utf-8")


def tokens_of(tokenizer: Any, text: str) -> np.ndarray:
    """int32[tokens]: the text in one call, without special tokens.

    Args:
      tokenizer: of transformers, or a `tokenizers.Tokenizer`.
      text: any length.
    """
    if hasattr(tokenizer, "get_vocab_size"):  # the tokenizers library's own class
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def of_path(
    path: str, *, windows: int, window: int = 1024, text: str | None = None, advance: Advance | None = None
) -> float:
    """Perplexity of a checkpoint on the first `windows` windows of a text (None: the bundled one)."""
    import jq

    model = jq.load(path)
    ids = tokens_of(model.tokenizer, bundled_text() if text is None else text)[: windows * window]
    return perplexity(model, ids, window=window, advance=advance)
