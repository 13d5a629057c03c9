"""Vocabularies of GGUF beside GPT-2's: the same ids as the tokenizer that the metadata was written from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jq.errors import CheckpointError, JqWarning
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


def longest(text: bytes, pieces: list[bytes]) -> list[int]:
    """RWKV's rule, slow and obvious: the longest piece that the rest begins with."""
    ids = []
    while text:
        best = max((p for p in pieces if p and text.startswith(p)), key=len)
        ids.append(pieces.index(best))
        text = text[len(best) :]
    return ids


def rwkv() -> tuple[dict[str, Any], list[bytes]]:
    """Tokens as llama.cpp's converter spells them: Python's repr of the bytes."""
    words = [b"he", b"hello", b"lo ", b" wor", b"ld", b"\n\n", b"a'b", b'say "', "世".encode(), "世界".encode()[:4]]
    words += [b"\\n", b"it's \""]
    pieces = [b"", *[bytes([i]) for i in range(256)], *words]
    tokens = ["<s>", *(repr(p)[2:-1] for p in pieces[1:])]
    kinds = [3, *[1] * (len(tokens) - 1)]
    metadata = {"general.architecture": "rwkv7", "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.eos_token_id": 0}
    return {**metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}, pieces


def test_longest_match_of_bytes() -> None:
    metadata, pieces = rwkv()
    made = built(metadata)
    texts = [*TEXTS, 'hello world\n\nhe\nsay "a\'b" it\'s "', "世界 世!", "\\n\t\x00 ~", "x" * 300]
    for text in texts:
        got = made.encode(text).ids
        assert got == longest(text.encode(), pieces), text
        assert made.decode(got) == text
    assert made.encode("hello<s>").ids[-1] == 0
    with pytest.raises(CheckpointError, match="no token for 57 of 256 bytes, the first 0xc7"):
        tokenizer_files({**metadata, "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"][:200]})
    with pytest.raises(CheckpointError, match=r"token 3, .* damaged escape"):
        tokenizer_files({**metadata, "tokenizer.ggml.tokens": ["<s>", "a", "b", "\\xzz"]})


def test_gemma4_has_merges() -> None:
    """Blanks as "▁", bytes where a letter has no token, as transformers builds it from such a file."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_, *"helowrd▁", "he", "ll", "▁w", "hell", "hello", "\n", "\n\n"]
    merges = ["h e", "l l", "he ll", "hell o", "▁ w", "\n \n"]
    metadata = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }
    made = built(metadata)
    vocabulary = {t: i for i, t in enumerate(tokens)}
    pairs = [tuple(m.split(" ")) for m in merges]
    original = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    original.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    for text in ["hello world", " hello\n\n hell", "éh", ""]:
        assert made.encode(text).ids == original.encode(text).ids, text
    assert made.decode(made.encode("hello world").ids) == "hello world"


def test_no_vocabulary_and_kinds_that_are_not_built() -> None:
    assert tokenizer_files({"tokenizer.ggml.model": "none"}) == {}
    with pytest.warns(JqWarning, match="tokenizer of kind 'plamo2' is not built"):
        assert tokenizer_files({"tokenizer.ggml.model": "plamo2"}, "plamo.gguf") == {}


def test_tokenizer_of_scores() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = {"\u2581": -9.0, "a": -8.0, "b": -7.0, "ab": -1.0, "\u2581a": -3.0, "\u2581ab": -2.0}
    tokens += list(pieces)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    files = tokenizer_files(metadata)
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    at = {token: i for i, token in enumerate(tokens)}
    assert tokenizer.encode("ab a").ids == [1, at["\u2581ab"], at["\u2581a"]]
    assert tokenizer.encode("\u00e9").ids == [1, at["\u2581"], at["<0xC3>"], at["<0xA9>"]]
    assert tokenizer.decode(tokenizer.encode("ab \u00e9 b").ids) == "ab \u00e9 b"
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is True
