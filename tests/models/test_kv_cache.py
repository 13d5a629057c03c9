"""Key/value caches in their own width: bytes, and generation that computes with what the whole sequence computes with."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from models.tiny import CACHES, random_ids, with_cache

import jq
from jq.models import kv_cache, steps
from jq.models.generate import STREAM_CHUNK, plan, run

# bytes of a token's 32 keys of one head in float32: codes, then scales and zero points
BYTES = {
    "int8": 32,
    "int8-asym": 32,
    "int8-asym-head": 32,
    "int6-asym": 24,
    "int4": 16,
    "fp8": 32,
    "fp8-groups": 32 + 2 * 4,
    "mxfp4": 16 + 1,
    "nvfp4": 16 + 2,
}
NAMES = {"float32": 128, "bfloat16": 64, "int8": 32 + 4, "float8_e4m3": 32 + 4, "int4": 16 + 4 + 1, "mxfp4": 16 + 1}

WINDOW = {"model_type": "mistral", "sliding_window": 12, "num_hidden_layers": 1}


def nbytes(model, batch: int, slots: int) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(model.model.empty_cache(batch, slots)))


@pytest.mark.parametrize("scheme", CACHES)
def test_schemes_of_checkpoints(tmp_path: Path, scheme: str) -> None:
    folder = with_cache(tmp_path, CACHES[scheme])
    model, plain = jq.load(folder), jq.load(folder, kv_cache="float32")
    assert nbytes(model, 3, 128) == 2 * 2 * 3 * 128 * BYTES[scheme]
    assert nbytes(plain, 3, 128) == 2 * 2 * 3 * 128 * NAMES["float32"]
    ids, whole = agrees_with_whole_sequences(model)
    assert not np.array_equal(whole, plain(ids))


@pytest.mark.parametrize("name", NAMES)
def test_named_caches(tmp_path: Path, name: str) -> None:
    model = jq.load(with_cache(tmp_path, CACHES["int4"], **WINDOW), kv_cache=name)
    assert nbytes(model, 3, 128) == 2 * 3 * 128 * NAMES[name]
    agrees_with_whole_sequences(model)


def agrees_with_whole_sequences(model) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different length, longer than any window here, token by token, in one call and in pieces.

    Returns:
      The rows with what came after them, padded on the right to one shape, and the logits of these whole sequences.
    """
    rows = [random_ids((1, n), seed=n)[0].tolist() for n in (3, 20, 1)]
    together = model.generate(rows, 24, eos_token_id=-1)
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    model.generate([r[::-1] for r in rows], 30, eos_token_id=-1)
    # as `stream` makes tokens, which takes one row and would compile for it
    chosen = plan({}, max_new_tokens=24, do_sample=False, eos_token_id=-1, stop=None, seed=0, options={})
    pieces = np.concatenate(list(run(model, rows, chosen, STREAM_CHUNK)), axis=1)
    assert (steps.prefill._cache_size(), steps.decode._cache_size()) == before
    assert [row + new for row, new in zip(rows, pieces.tolist(), strict=True)] == together
    ids = np.zeros((len(rows), max(map(len, together))), np.int32)
    for padded, tokens in zip(ids, together, strict=True):
        padded[: len(tokens)] = tokens  # no place sees what is behind it
    whole = np.asarray(model(ids))
    for row, tokens, scores in zip(rows, together, whole, strict=True):
        assert len(tokens) == len(row) + 24
        assert tokens[len(row) :] == scores[len(row) - 1 : len(tokens) - 1].argmax(-1).tolist()
    return ids, whole


@pytest.mark.parametrize(
    "scheme, name, options", [("int8-asym-head", None, {}), ("nvfp4", None, {}), ("int4", "int4", WINDOW)]
)
def test_rows_alone(tmp_path: Path, scheme: str, name: str | None, options: dict) -> None:
    """Static scales with zero points, scales of groups, scales of tokens; models and rows of the shapes above."""
    model = jq.load(with_cache(tmp_path, CACHES[scheme], **options), kv_cache=name)
    rows = random_ids((3, 20)).tolist()
    together = model.generate(rows, 24, eos_token_id=-1)
    assert [*rows[0], *model.stream(rows[0], 24, eos_token_id=-1)] == together[0].tolist()


def test_what_a_cache_cannot_be(tmp_path: Path) -> None:
    folder = with_cache(tmp_path, None)
    for bad in ("int5", "nvfp4", 7):
        with pytest.raises(jq.errors.UnsupportedError, match=r"known: float32, bfloat16, .*, int4, mxfp4"):
            jq.load(folder, kv_cache=bad)
    with pytest.raises(jq.errors.UnsupportedError, match=r"groups of 32, which do not divide .* head_dim of 8"):
        kv_cache.form_of("int4", 8)
    assert kv_cache.form_of("fp8", 8) == kv_cache.form_of(np.dtype("float8_e4m3fn"), 8) == "float8_e4m3"


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    state = jq.load_state(with_cache(tmp_path, CACHES["fp8"]))
    name = "model.layers.1.self_attn.v_scale"
    for config in (state.config["quantization_config"], {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}):
        for value in (np.nan, 0.0):
            damaged = jq.State(
                {**state, name: np.full(1, value, np.float32)}, {**state.config, "quantization_config": config}
            )
            with pytest.raises(jq.errors.FormatError, match=f"{name}: is 0 or no number"):
                jq.load(damaged)
            assert np.isfinite(jq.load(damaged, quantize_activations=False)(random_ids((1, 5)))).all()


def test_saving_keeps_the_scales(tmp_path: Path) -> None:
    for scheme in ("int8", "int8-asym"):
        folder = with_cache(tmp_path / scheme, CACHES[scheme])
        jq.save(jq.load(folder), tmp_path / f"{scheme}-again")
        first, second = (jq.load_state(f) for f in (folder, tmp_path / f"{scheme}-again"))
        assert set(first) == set(second)
        for name in first:
            np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]))
        assert json.loads((tmp_path / f"{scheme}-again" / "config.json").read_text())["quantization_config"]
