"""Generation: padding, sampling, stops, streams, and that nothing compiles twice."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny import random_ids, tiny, write

import jq
from jq.models import steps
from jq.models.sampling import filtered


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tensors, config = tiny()
    config |= {"eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
    return write(tmp_path_factory.mktemp("llama"), tensors, config)


@pytest.fixture(scope="module")
def model(folder: Path):
    return jq.load(folder)


def test_rows_of_different_length_do_not_see_each_other(model) -> None:
    rows = [random_ids((1, n), seed=n)[0].tolist() for n in (3, 20, 11)]
    together = model.generate(rows, 10)
    for row, got in zip(rows, together):
        assert got == model.generate(row, 10).tolist()


def test_nothing_compiles_from_token_to_token_or_prompt_to_prompt(model) -> None:
    model.generate(random_ids((1, 20)), 20)
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    for length, count in ((17, 1), (18, 9), (25, 40), (32, 33)):
        model.generate(random_ids((1, length), seed=length), count)
    list(model.stream(random_ids((1, 21))[0].tolist(), 30))
    model.generate(random_ids((1, 30)), 12, eos_token_id=[5, 7])
    assert (steps.prefill._cache_size(), steps.decode._cache_size()) == before


def test_sampling_values_compile_nothing(model) -> None:
    ids = random_ids((3, 9))
    model.generate(ids, 8, temperature=0.7)
    before = steps.decode._cache_size()
    model.generate(ids, 8, temperature=1.3, top_k=4, seed=3)
    model.generate(ids, 8, top_p=0.5, min_p=0.1)
    assert steps.decode._cache_size() == before


def test_models_of_equal_structure_share_compilations(folder: Path, model) -> None:
    ids = random_ids((1, 20))
    model.generate(ids, 5)
    before = steps.decode._cache_size()
    jq.load(folder).generate(ids, 5)
    assert steps.decode._cache_size() == before


def test_cache_is_donated(model) -> None:
    from jq.models import functional
    from jq.models.generate import plan

    graph, state = functional.split(model)
    chosen = plan({}, max_new_tokens=4, do_sample=None, eos_token_id=None, stop=None, seed=0, options={})
    settings, starts = chosen.settings(1), jnp.zeros(1, jnp.int32)
    ids = jnp.asarray(random_ids((1, 16)))
    token, carry = steps.prefill(graph, state, 128, chosen.switches, ids, starts, settings)
    buffer = carry[0][0][0].codes
    place = buffer.unsafe_buffer_pointer()
    count = jnp.int32(3)
    _, _, after = steps.decode(
        graph, state, 128, chosen.switches, carry, token, jnp.int32(16), jnp.int32(1), count, starts, settings
    )
    assert buffer.is_deleted()
    assert after[0][0][0].codes.unsafe_buffer_pointer() == place


def test_compiled_loop_copies_no_weights(model) -> None:
    """No copy of the size of a weight matrix or of a layer's cache inside the decode program."""
    import re

    from jq.models import functional
    from jq.models.generate import plan

    graph, state = functional.split(model)
    chosen = plan({}, max_new_tokens=4, do_sample=None, eos_token_id=None, stop=None, seed=0, options={})
    settings, starts = chosen.settings(1), jnp.zeros(1, jnp.int32)
    args = (graph, state, 128, chosen.switches)
    token, carry = steps.prefill(*args, jnp.asarray(random_ids((1, 16))), starts, settings)
    lowered = steps.decode.lower(*args, carry, token, jnp.int32(16), jnp.int32(1), jnp.int32(3), starts, settings)
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", lowered.compile().as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < 16 * 32 for shape in copies)


def test_end_tokens_end_rows(model) -> None:
    ids = random_ids((3, 20))
    free = model.generate(ids, 12, eos_token_id=-5)
    end = int(free[0, 20 + 4])
    got = model.generate(ids, 12, eos_token_id=[end, 100000])
    first = free[0, 20:].tolist().index(end)
    assert got[0, 20 : 20 + first + 1].tolist() == free[0, 20 : 20 + first + 1].tolist()
    assert set(got[0, 20 + first + 1 :].tolist()) <= {0}


def test_repetition_penalty_equals_transformers(folder: Path, model) -> None:
    from models import peer

    theirs = peer.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = random_ids((2, 10))
    want = peer.greedy(theirs, ids, 16, repetition_penalty=1.7)
    np.testing.assert_array_equal(model.generate(ids, 16, repetition_penalty=1.7, do_sample=False), want)


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1}]
)
def test_filters_equal_transformers(options: dict) -> None:
    from models import peer
    from transformers.generation import logits_process as lp

    logits = np.random.default_rng(0).normal(0, 2, (4, 50)).astype(np.float32)
    want = peer.torch.tensor(logits)
    if "top_k" in options:
        want = lp.TopKLogitsWarper(options["top_k"])(None, want)
    if "top_p" in options:
        want = lp.TopPLogitsWarper(options["top_p"])(None, want)
    if "min_p" in options:
        want = lp.MinPLogitsWarper(options["min_p"])(None, want)
    got = filtered(
        jnp.asarray(logits),
        jnp.int32(options.get("top_k", 0)),
        jnp.float32(options.get("top_p", 1.0)),
        jnp.float32(options.get("min_p", 0.0)),
    )
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want.numpy()))


def test_samples_follow_the_distribution() -> None:
    from jq.models.sampling import Settings, Switches, pick

    shares = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    batch = 4000
    settings = Settings(
        seeds=jnp.arange(batch, dtype=jnp.uint32),
        temperature=jnp.float32(1),
        top_k=jnp.int32(3),
        top_p=jnp.float32(1),
        min_p=jnp.float32(0),
        penalty=jnp.float32(1),
        eos=jnp.full(8, -1),
        pad=jnp.int32(0),
    )
    logits = jnp.broadcast_to(jnp.log(shares), (batch, 4))
    picked = np.asarray(jax.jit(pick, static_argnums=4)(logits, None, settings, 0, Switches(sample=True)))
    found = np.bincount(picked, minlength=4) / batch
    np.testing.assert_allclose(found, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)


def test_seeds_repeat_and_rows_are_independent_of_the_batch(model) -> None:
    ids = random_ids((3, 9))
    a = model.generate(ids, 10, temperature=1.5, seed=11)
    np.testing.assert_array_equal(a, model.generate(ids, 10, temperature=1.5, seed=11))
    assert (a != model.generate(ids, 10, temperature=1.5, seed=12)).any()
    np.testing.assert_array_equal(a[1], model.generate(ids[1], 10, temperature=1.5, seed=12))


def test_temperature_zero_is_greedy(model) -> None:
    ids = random_ids((1, 9))
    np.testing.assert_array_equal(model.generate(ids, 6, temperature=0), model.generate(ids, 6, do_sample=False))


def test_stream_gives_the_same_tokens(model) -> None:
    ids = random_ids((1, 9))[0].tolist()
    whole = model.generate(ids, 21)
    assert ids + list(model.stream(ids, 21)) == whole.tolist()


@pytest.mark.parametrize("kv_cache", ["bfloat16", "int8", "float8_e4m3"])
def test_narrow_caches_are_close_and_agree_with_the_forward_pass(folder: Path, model, kv_cache: str) -> None:
    narrow = jq.load(folder, kv_cache=kv_cache)
    tokens = narrow.generate(random_ids((2, 16)), 8)
    want, got = np.asarray(model(tokens)), np.asarray(narrow(tokens))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < (0.1 if kv_cache == "float8_e4m3" else 0.02)
    # the cache holds what the forward pass computes with
    np.testing.assert_array_equal(got[:, 15:-1].argmax(-1), tokens[:, 16:])


def test_refuses_tokens_outside_the_vocabulary(model) -> None:
    with pytest.raises(ValueError, match="vocabulary of 48"):
        model.generate([[5, 48]], 4)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[5], []], 4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate([5], 0)


def test_no_tokenizer_is_said(model) -> None:
    with pytest.raises(jq.errors.UnsupportedError, match="no tokenizer files"):
        model.generate("text", 4)


def test_generation_config_gives_defaults(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 5, "eos_token_id": [2, 9]})
    )
    ids = random_ids((1, 8))
    loaded = jq.load(copy)
    plain = jq.load(folder)
    assert loaded.generate(ids).shape[1] <= 13
    want = plain.generate(ids, 5, temperature=0.5, top_k=3, eos_token_id=[2, 9])
    np.testing.assert_array_equal(loaded.generate(ids), want)
    np.testing.assert_array_equal(loaded.generate(ids, do_sample=False), plain.generate(ids, 5, eos_token_id=[2, 9]))
