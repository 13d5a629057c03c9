"""`jq.perplexity`: windows, means, and what it refuses."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import jq
from jq.report.perplexity import bundled_text, tokens_of


def bigram(table: np.ndarray):
    """A model whose logits depend on the current token alone: table [V, V]."""
    return lambda ids: jnp.asarray(table)[ids]


def slow_perplexity(table: np.ndarray, ids: list[int], window: int) -> float:
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        row = ids[start : start + window]
        for here, after in itertools.pairwise(row):
            scores = table[here].astype(np.float64)
            losses.append(np.log(np.exp(scores).sum()) - scores[after])
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("tokens, window", [(40, 10), (45, 10), (7, 7), (20, 2)])
def test_agrees_with_a_plain_loop(tokens, window):
    rng = np.random.default_rng(tokens)
    table = rng.standard_normal((13, 13)).astype(np.float32) * 2
    ids = rng.integers(0, 13, tokens).tolist()
    want = slow_perplexity(table, ids, window)
    assert jq.perplexity(bigram(table), ids, window=window) == pytest.approx(want, rel=1e-5)


def test_an_incomplete_last_window_is_left_out_unless_it_is_the_only_one():
    table = np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    ids = [0, 1, 2, 3, 4, 0, 1]
    assert jq.perplexity(bigram(table), ids, window=5) == jq.perplexity(bigram(table), ids[:5], window=5)
    assert jq.perplexity(bigram(table), ids, window=100) == pytest.approx(slow_perplexity(table, ids, 7), rel=1e-5)


def test_windows_that_are_already_cut():
    table = np.random.default_rng(1).standard_normal((5, 5)).astype(np.float32)
    ids = np.arange(20) % 5
    assert jq.perplexity(bigram(table), ids.reshape(4, 5)) == jq.perplexity(bigram(table), ids, window=5)


def test_bfloat16_logits_are_summed_in_float32():
    ids = np.arange(400) % 7
    uniform = lambda ids: jnp.zeros((*ids.shape, 7), jnp.bfloat16)
    assert jq.perplexity(uniform, ids, window=100) == pytest.approx(7.0, rel=1e-6)


def test_progress_is_told():
    seen = []
    uniform = lambda ids: jnp.zeros((*ids.shape, 7))
    from jq.report.perplexity import perplexity

    perplexity(uniform, list(range(7)) * 2, window=7, advance=lambda *a: seen.append(a))
    assert seen == [(1, 2, "perplexity 7.000"), (2, 2, "perplexity 7.000")]


def test_overflow_is_infinite_and_nan_stays():
    certain = lambda ids: jnp.where(jnp.arange(3) == 0, 0.0, -1e6) * jnp.ones((*ids.shape, 3))
    assert jq.perplexity(certain, [1, 1, 1, 1]) == math.inf
    broken = lambda ids: jnp.full((*ids.shape, 3), jnp.nan)
    assert math.isnan(jq.perplexity(broken, [1, 1, 1]))


@pytest.mark.parametrize(
    "ids, window, message",
    [
        ([1], 10, "1 tokens"),
        ([1, 2], 1, "windows of 1"),
        ([[[1]]], 4, "shape"),
        ([0.5, 1.5], 4, "integers"),
        ([], 4, "integers|0 tokens"),
    ],
)
def test_refuses(ids, window, message):
    with pytest.raises(ValueError, match=message):
        jq.perplexity(lambda x: x, ids, window=window)


def test_tokens_take_no_special_ones():
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert tokens_of(tok, "a b a").tolist() == [0, 1, 0]


def test_the_bundled_text_has_its_notice():
    from importlib import resources

    text = bundled_text()
    assert text.startswith(" \n = Robert Boulter = \n")
    assert "Creative Commons" in (resources.files("jq.report") / "texts" / "NOTICE.txt").read_text()


@pytest.mark.parametrize("bad", [7, -1])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match="outside the vocabulary of 7"):
        jq.perplexity(lambda ids: jnp.zeros((*ids.shape, 7)), [1, 2, bad, 3], window=4)
