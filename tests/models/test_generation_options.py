"""Options of generation: wrong ones are named, those of generation_config.json are defaults, stop strings end text."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import CheckpointError, JqWarning
from jq.models.tokenizer import TextStream


@pytest.fixture(scope="module")
def model(tiny):
    return jq.load(tiny)


def configured(source: Path, target: Path, raw: str) -> Path:
    shutil.copytree(source, target)
    (target / "generation_config.json").write_text(raw)
    return target


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", [1.0]),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
    ],
)
def test_wrong_options_are_named(model, tiny, tmp_path, name: str, value) -> None:
    options = {"max_new_tokens": 2} | {name: value}
    with pytest.raises(ValueError, match=rf"generate: {name} must be "):
        model.generate([5, 6], **options)
    key = "stop_strings" if name == "stop" else name
    loaded = jq.load(configured(tiny, tmp_path / "m", json.dumps({key: value})))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} must be "):
        loaded.generate([5, 6])


@pytest.mark.parametrize("raw", ["{", "[1]", '{"top_k": 1, "top_k": 2}'])
def test_a_damaged_file_names_itself(tiny, tmp_path, raw: str) -> None:
    loaded = jq.load(configured(tiny, tmp_path / "m", raw))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        loaded.generate([5, 6], 2)


def test_max_length_counts_the_prompt(tiny, tmp_path) -> None:
    loaded = jq.load(configured(tiny, tmp_path / "m", json.dumps({"max_length": 12, "eos_token_id": []})))
    assert loaded.generate([5, 6, 7]).shape == (12,)
    assert loaded.generate([5, 6, 7], 2).shape == (5,)
    with pytest.raises(ValueError, match="prompt has 12 tokens"):
        loaded.generate([5] * 12)


def test_what_is_not_done_is_said(tiny, tmp_path) -> None:
    loaded = jq.load(
        configured(tiny, tmp_path / "m", json.dumps({"num_beams": 4, "typical_p": 1.0, "max_new_tokens": 2}))
    )
    with pytest.warns(JqWarning, match="num_beams = 4 is not done here"):
        loaded.generate([5, 6])


def test_stop_strings_of_the_file(model, tiny, tmp_path) -> None:
    whole = model.generate("The light", 24, do_sample=False)
    stop = whole[7:9]
    loaded = jq.load(configured(tiny, tmp_path / "m", json.dumps({"stop_strings": [stop], "max_new_tokens": 24})))
    assert loaded.generate("The light") == whole[: whole.index(stop)]


def test_streams_never_show_a_part_of_a_stop_string(model) -> None:
    whole = model.generate("The light", 24, do_sample=False)
    for start in range(1, 16, 2):
        stop = whole[start : start + 4]
        want = model.generate("The light", 24, do_sample=False, stop=stop)
        assert want == whole[: whole.index(stop)]
        assert "".join(model.stream("The light", 24, do_sample=False, stop=[stop, "never there"])) == want


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.text("abc\ufffd", max_size=3), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    stream, shown, text = TextStream(stops), "", ""
    whole = "".join(pieces)
    found = [whole.find(s) for s in stops if s in whole]
    want = whole[: min(found)] if found else whole
    for piece in pieces:
        text += piece
        if any(s in text for s in stops):
            break
        shown += stream.push(text, False)
        assert want.startswith(shown)
    shown += stream.push(text[: len(want)], True)
    assert shown == want


def test_stop_strings_end_tokens_as_in_transformers(model, tiny, tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="transformers' own models need torch (extra `test`)")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ids = [5, 60, 70, 80]
    made = [model.tokenizer.decode([int(t)]) for t in model.generate(ids, 40, do_sample=False)[4:]]
    pairs = [a + b for a, b in itertools.pairwise(made) if (a + b).isascii() and (a + b).isprintable()]
    singles = [c for c in made if c.isascii() and c.isprintable()]
    for stop in (pairs[-1], singles[-1], [singles[1], pairs[1]], ["not made", pairs[0]]):
        want = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=40,
            do_sample=False,
            stop_strings=stop,
            tokenizer=tokenizer,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(model.generate(ids, 40, do_sample=False, stop=stop), want[0].numpy())


def test_a_padded_batch_with_a_penalty_and_end_tokens_equals_transformers(model, tiny) -> None:
    torch = pytest.importorskip("torch", reason="transformers' own models need torch (extra `test`)")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 256, n).tolist() for n in (3, 11, 7)]
    first = model.generate(rows[1], 12, do_sample=False, repetition_penalty=1.4)
    ends = [int(first[-4]), 2]
    got = model.generate(rows, 12, do_sample=False, repetition_penalty=1.4, eos_token_id=ends)
    padded = torch.tensor([[0] * (11 - len(r)) + r for r in rows])
    want = theirs.generate(
        padded,
        attention_mask=(torch.arange(11) >= torch.tensor([[11 - len(r)] for r in rows])).long(),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=ends,
        pad_token_id=0,
    ).numpy()
    for row, tokens, expected in zip(rows, got, want, strict=True):
        new = expected[11:].tolist()
        end = next((i + 1 for i, t in enumerate(new) if t in ends), len(new))
        assert tokens == row + new[:end]
