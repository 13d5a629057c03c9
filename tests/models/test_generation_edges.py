"""Generation where something changes on the way, against transformers' own models: windows, buckets, ropes that switch."""

from __future__ import annotations

import numpy as np
import pytest
from models import peer
from models.peer import random_ids
from models.tiny import tiny, write

import jq

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
# one layer where layers are alike: less to compile (layers of every family: test_families.py)
ONE = {"num_hidden_layers": 1}
CASES = {
    "mistral-window": ("mistral", {"sliding_window": 7, **ONE}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16, **ONE}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 64, "original_max_position_embeddings": 16, **ONE},
    ),
}
# lengths of the rows, new tokens: over the window, of one token, over the rope's first length, to the edge of a bucket;
# three rows each, since every number of rows compiles anew
ROWS = [((3, 20, 11), 12), ((1, 1, 1), 24), ((1, 16, 9), 17), ((16, 2, 7), 112), ((17, 17, 4), 111), ((15, 1, 15), 2)]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(directory, transformers' model afresh: ropes that grow keep their state from call to call)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = peer.build(folder, CASES[request.param][0], **CASES[request.param][1])
    load = type(theirs).from_pretrained
    return folder, lambda: load(folder, dtype=peer.torch.float32, attn_implementation="eager").eval()


def padded(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    for b, n in enumerate(lengths):
        ids[b, max(lengths) - n :] = random_ids((1, n), seed=n + b)[0]
    return ids, (np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize("lengths, count", ROWS)
def test_tokens_equal_transformers(pair, lengths: tuple[int, ...], count: int) -> None:
    folder, theirs = pair
    (ids, mask), model = padded(lengths), jq.load(folder)
    given = {"attention_mask": peer.torch.tensor(mask)}
    want = peer.greedy(theirs(), ids, count, **given, eos_token_id=None)
    np.testing.assert_array_equal(model.generate(ids, count, attention_mask=mask, eos_token_id=-1), want)
    if (lengths, count) == ROWS[4]:
        return  # the one longer cache: programs of its own, and nothing of a penalty depends on it
    want = peer.greedy(theirs(), ids, count, **given, eos_token_id=None, repetition_penalty=1.4)
    got = model.generate(ids, count, attention_mask=mask, eos_token_id=-1, repetition_penalty=1.4)
    np.testing.assert_array_equal(got, want)


def test_masks_beside_lists_are_used(pair) -> None:
    """As a tokenizer gives them: lists of lists."""
    folder, theirs = pair
    (ids, mask), model = padded((4, 9, 2)), jq.load(folder)
    want = peer.greedy(theirs(), ids, 5, attention_mask=peer.torch.tensor(mask), eos_token_id=None)
    got = model.generate(ids.tolist(), 5, attention_mask=mask.tolist(), eos_token_id=-1)
    np.testing.assert_array_equal(got, want)
    one = model.generate(ids[0], 5, attention_mask=mask[0], eos_token_id=-1)
    np.testing.assert_array_equal(one, want[0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "padding on the right or between tokens"),
        ([[1, 0, 1], [1, 1, 1]], "padding on the right or between tokens"),
        ([[0, 0, 0], [1, 1, 1]], "padding on the right or between tokens"),
        ([[1, 1], [1, 1]], "of its own shape"),
        ([1, 1, 1], "of its own shape"),
    ],
)
def test_masks_that_would_be_left_out_are_refused(mask: list, message: str, tmp_path) -> None:
    tensors, config = tiny()
    model = jq.load(write(tmp_path, tensors, config))
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    for prompts in (ids, ids.tolist()):
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, 2, attention_mask=mask)
    for prompts in ("text", ["a", "b"], [[1, 2, 3], [4]]):
        with pytest.raises(ValueError, match="of its own shape"):
            model.generate(prompts, 2, attention_mask=[[1, 1, 1], [1, 1, 1]])
    if mask[0] == [1, 1, 0]:  # the logits of padded places are nobody's, the others are right
        whole, cut = model(ids, attention_mask=mask), model(ids[:1, :2])
        np.testing.assert_allclose(whole[:1, :2], cut, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="model: attention_mask"):
            model(ids, attention_mask=mask)


def test_rows_that_end_early(pair) -> None:
    folder, theirs = pair
    (ids, mask), model = padded((9, 16, 3)), jq.load(folder)
    free = model.generate(ids, 12, attention_mask=mask, eos_token_id=-1)
    for end in (int(free[0, 16]), int(free[1, 18])):  # at the first token, and later
        given = {"attention_mask": peer.torch.tensor(mask), "eos_token_id": end, "pad_token_id": 0}
        want = peer.greedy(theirs(), ids, 12, **given)
        np.testing.assert_array_equal(model.generate(ids, 12, attention_mask=mask, eos_token_id=end), want)


def test_streams_and_seeds(pair) -> None:
    folder, _ = pair
    model, ids = jq.load(folder), random_ids((3, 13))
    for options in ({"do_sample": False}, {"temperature": 1.3, "seed": 5}):
        whole = model.generate(ids, 14, eos_token_id=-1, **options)
        row = ids[0].tolist()
        assert row + list(model.stream(row, 14, eos_token_id=-1, **options)) == whole[0].tolist()
        alone = model.generate(ids[1], 14, eos_token_id=-1, **{**options, "seed": options.get("seed", 0) + 1})
        np.testing.assert_array_equal(alone, whole[1])
