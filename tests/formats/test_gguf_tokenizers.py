"""Unigram and WordPiece vocabularies of GGUF: the same ids as the tokenizer that the metadata was written from."""

from __future__ import annotations

from typing import Any

import pytest

from jq.errors import CheckpointError
from jq.formats.gguf_tokenizer import tokenizer_files

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["hello world", "  two  blanks ", "unseen zebra!", "hello, World", ""]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581hello", -2.0), ("\u2581world", -2.5), ("\u2581", -3.0)]
PIECES += [(c, -4.0 - i / 10) for i, c in enumerate("abcdefghijklmnopqrstuvwxyzW,!")] + [("hel", -3.5), ("lo", -3.6)]


def built(metadata: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(tokenizer_files(metadata)["tokenizer.json"].decode())


def unigram() -> dict[str, Any]:
    return {
        "general.architecture": "t5",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [t for t, _ in PIECES],
        "tokenizer.ggml.scores": [s for _, s in PIECES],
        "tokenizer.ggml.token_type": [3, 3, 2, *[1] * (len(PIECES) - 3)],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_unigram() -> None:
    original = tokenizers.Tokenizer(tokenizers.models.Unigram(PIECES, 2, False))
    original.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Strip(), tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    original.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made = built(unigram())
    for text in TEXTS:
        assert made.encode(text).ids == [*original.encode(text).ids, 1], text
    assert made.decode(made.encode("hello world").ids) == "hello world"


def test_unigram_damage() -> None:
    with pytest.raises(CheckpointError, match="one score for each"):
        tokenizer_files({**unigram(), "tokenizer.ggml.scores": [0.0]})
    with pytest.raises(CheckpointError, match="unknown_token_id is 99"):
        tokenizer_files({**unigram(), "tokenizer.ggml.unknown_token_id": 99})
    with pytest.raises(CheckpointError, match="precompiled_charsmap is damaged"):
        tokenizer_files({**unigram(), "tokenizer.ggml.precompiled_charsmap": [1, 2, 3]})


def test_wordpiece() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s", "un", "##seen", ",", "!", "z", "##e", "##bra"]
    vocabulary = {w: i for i, w in enumerate(words)}
    original = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    original.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    original.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # As llama.cpp's converter writes them: specials as they are, first pieces marked, others bare.
    stored = [w if w[0] == "[" else w[2:] if w.startswith("##") else f"\u2581{w}" for w in words]
    metadata = {
        "general.architecture": "bert",
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": stored,
        "tokenizer.ggml.token_type": [3, 3, 3, 3, *[1] * (len(words) - 4)],
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    made = built(metadata)
    for text in [*TEXTS, "Hellos, worlds"]:
        assert made.encode(text).ids == [2, *original.encode(text).ids, 3], text
