"""config.json with values that make no sense: an error that names the directory and the key, before any weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny import tiny

import jq
from jq.errors import CheckpointError, JqError, UnsupportedError
from jq.models import spec_of, table

GOOD = tiny()[1] | {"model_type": "mistral", "sliding_window": 8}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", ["four", 0, -7, True, [], {"a": 1}, 1.5, math.nan, math.inf, 2**70, ""], ids=repr)
def test_sizes(key: str, value) -> None:
    with pytest.raises(CheckpointError, match=rf"DIR: config\.json: {key} is "):
        spec_of({**GOOD, key: value}, "DIR")


WRONG = {
    "tie_word_embeddings": ["yes", 2, [], {}],
    "attention_bias": ["false", -1],
    "rms_norm_eps": ["1e-5", -1, math.nan, True, []],
    "sliding_window": ["8", -8, 1.5, [8], 2**40],
    "layer_types": ["full_attention", ["full_attention"], 3],
    "rope_parameters": [
        "default",
        [1],
        {"rope_theta": "x"},
        {"rope_theta": -5.0},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "dynamic", "factor": -2.0},
        {"rope_type": "yarn", "factor": "a"},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        {"rope_type": "longrope", "short_factor": [1.0, 2.0]},
        {"rope_type": ["default"]},
        {"partial_rotary_factor": 0.4},
        {"partial_rotary_factor": "x"},
        {"partial_rotary_factor": 3.0},
    ],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values], ids=repr)
def test_other_values(key: str, value) -> None:
    with pytest.raises(CheckpointError, match=r"DIR: config\.json: "):
        spec_of({**GOOD, key: value}, "DIR")


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("hidden_act", "mish", "silu"),
        ("hidden_act", 3, "silu"),
        ("layer_types", ["full_attention", "chunked_attention"], "sliding_attention"),
        ("rope_parameters", {"rope_type": "spiral"}, "yarn"),
        ("model_type", "nonsense", "llama"),
        ("model_type", ["llama"], "llama"),
    ],
)
def test_what_is_not_known_lists_what_is(key: str, value, known: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"DIR: .*{known}"):
        spec_of({**GOOD, key: value}, "DIR")


def test_nothing_is_read_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, "head_dim": "four"}))
    jq.safetensors_file.write(tmp_path / "model.safetensors", [], {})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: config\.json: head_dim is 'four'"):
        jq.load(tmp_path)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
KEYS = (
    *GOOD,
    *WRONG,
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "hidden_act",
    "num_local_experts",
    "num_experts_per_tok",
    "no_rope_layers",
)
KEYS += (
    "embedding_multiplier",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)


@settings(deadline=None, max_examples=300)
@given(
    model_type=st.sampled_from(sorted(table())),
    changed=st.dictionaries(st.sampled_from(KEYS[1:]), anything, min_size=1, max_size=3),
)
def test_any_values_give_a_spec_or_an_error_of_ours(model_type: str, changed: dict) -> None:
    try:
        spec = spec_of({**GOOD, "model_type": model_type, **changed}, "DIR")
    except JqError as e:
        assert str(e).startswith("DIR: ")
    else:
        hash(spec)  # static: the key of what is compiled
