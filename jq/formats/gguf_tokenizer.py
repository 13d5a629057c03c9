"""Tokenizer files from the metadata of a GGUF, built with the `tokenizers` library (no torch, no transformers).

Six kinds of vocabulary: byte-level BPE (`tokenizer.ggml.model` "gpt2") with merges and a named way of splitting text
before them, SentencePiece BPE ("llama") with a score for each piece or ("gemma4") with merges, SentencePiece unigram
("t5"), WordPiece ("bert") and the longest match by bytes ("rwkv"). "plamo2" (a lattice of its own) is not built. Keys:
llama.cpp, gguf-py/gguf/constants.py; the ways of splitting and normalizing: src/llama-vocab.cpp; how vocabularies are
written: conversion/ and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jq.errors import CheckpointError
from jq.formats.base import warn_once

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How text is cut before merges.

    Fields:
      regexes: applied one after the other; matches become pieces of their own.
      whole: a piece that is a token as it stands takes no merges (tiktoken's rule).
      bos: whether the begin token is added where the file does not say.
    """

    regexes: tuple[str, ...] = (_GPT2,)
    whole: bool = False
    bos: bool = False


SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "roberta-bpe", "trillion"), Splitting()),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "granite-docling"),
        Splitting((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Splitting((_LLAMA3,), whole=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting((_LLAMA3,))),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "kormo", "solar-open"), Splitting((_QWEN2,))
    ),
    "tekken": Splitting((_TEKKEN,), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Splitting((_GPT4O,))),
}


def tokenizer_files(metadata: Mapping[str, Any], label: str = "file") -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja of a GGUF's metadata, as far as it gives them.

    Raises:
      CheckpointError: a vocabulary that contradicts itself.
    """
    found: dict[str, bytes] = {}
    config = _tokenizer_config(metadata, label)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template.jinja"] = template.encode()
    kind = str(metadata.get("tokenizer.ggml.model", ""))
    if kind in ("", "none", "no_vocab"):
        return found
    if kind not in BUILDERS:
        warn_once(label, f"tokenizer of kind {kind!r} is not built (only {', '.join(BUILDERS)}); pass token ids")
        return found
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{label}: tokenizer.ggml.tokens is missing or empty")
    for key, kinds in (
        ("tokens", str),
        ("merges", str),
        ("scores", (int, float)),
        ("token_type", int),
        ("precompiled_charsmap", int),
    ):
        values = metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or not all(isinstance(v, kinds) for v in values):
            raise CheckpointError(f"{label}: tokenizer.ggml.{key} is no list of {key}")
    tokenizer = BUILDERS[kind](metadata, tokens, label)
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_ends(tokenizer, metadata, config)
    found["tokenizer.json"] = tokenizer.to_str().encode()
    found["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _tokenizer_config(metadata: Mapping[str, Any], label: str) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    length = metadata.get(f"{arch}.context_length")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if isinstance(length, int):
        config["model_max_length"] = length
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names |= {"cls_token": "cls", "sep_token": "seperator", "mask_token": "mask"}  # "seperator": the key's own spelling
    for name, key in names.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(f"{label}: tokenizer.ggml.{key}_token_id is {index}, outside 0..{len(tokens) - 1}")
        config[name] = tokens[index]
    return config


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], label: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in SPLITTINGS:
        warn_once(label, f"pre-tokenizer {name!r} is not known; text is split as GPT-2 does, tokens may differ")
    splitting = SPLITTINGS.get(name, Splitting())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    known = _merges(metadata, vocabulary, label)
    tokenizer = Tokenizer(models.BPE(vocabulary, known, fuse_unk=False, ignore_merges=splitting.whole))
    steps = [pre_tokenizers.Split(Regex(r), behavior="isolated") for r in splitting.regexes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], label: str) -> list[tuple[str, str]]:
    """The file's merges, those left out (with a warning) that name pieces outside the vocabulary."""
    merges = []
    for text in metadata.get("tokenizer.ggml.merges") or []:
        left, _, right = text[1:].partition(" ")  # the first character may itself be a blank
        merges.append((text[0] + left if text else "", right))
    known = [m for m in merges if m[0] in vocabulary and m[1] in vocabulary and m[0] + m[1] in vocabulary]
    if len(known) < len(merges):
        warn_once(label, f"{len(merges) - len(known)} merges name pieces outside the vocabulary; left out")
    return known


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], label: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores: Any = metadata.get("tokenizer.ggml.scores")
    if not metadata.get("tokenizer.ggml.merges") and (not isinstance(scores, list) or len(scores) != len(tokens)):
        raise CheckpointError(
            f"{label}: tokenizer.ggml.scores does not give one score for each of {len(tokens)} tokens"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma and not merges:  # blanks are spelled as such in these files, and scores do not follow the order of merging
        tokens = ["\u2581" * len(t) if t and not t.strip(" ") else t for t in tokens]
        scores = [-i for i in range(len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocabulary,
        _merges(metadata, vocabulary, label) if merges else merges_of_scores(vocabulary, scores),
        unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_of_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that a SentencePiece BPE vocabulary implies: every split of a piece into two others, best score first.

    Splits of pieces with equal scores keep the order of the vocabulary, splits of one piece that of their parts' ids.
    """
    found: list[tuple[float, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [s for s in splits if s[0] in vocabulary and s[1] in vocabulary]
        splits.sort(key=lambda s: (vocabulary[s[0]], vocabulary[s[1]]))
        found += [(scores[index], s) for s in splits]
    found.sort(key=lambda item: -item[0])
    return [split for _, split in found]


def _unigram(metadata: Mapping[str, Any], tokens: list[str], label: str) -> Any:
    """SentencePiece unigram, as T5 has it: normalized by the map that the file carries, blanks as "\u2581"."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(
            f"{label}: tokenizer.ggml.scores does not give one score for each of {len(tokens)} tokens"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{label}: tokenizer.ggml.unknown_token_id is {unknown!r}, outside 0..{len(tokens) - 1}")
    tokenizer = Tokenizer(models.Unigram(list(zip(tokens, map(float, scores), strict=True)), unknown, False))
    steps: list[Any] = []
    table = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if table:
        try:
            steps.append(normalizers.Precompiled(bytes(b & 255 for b in table)))
        except Exception as e:  # the library's own exception class is Exception
            raise CheckpointError(f"{label}: tokenizer.ggml.precompiled_charsmap is damaged: {e}") from e
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _wordpiece(metadata: Mapping[str, Any], tokens: list[str], label: str) -> Any:
    """WordPiece, as BERT has it. llama.cpp's converter writes a first piece as "\u2581piece" and "##piece" as "piece"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        plain = kind == CONTROL or (token.startswith("[") and token.endswith("]"))
        text = token if plain else token[1:] if token.startswith("\u2581") else f"##{token}"
        vocabulary[text] = index
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    name = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=name))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def bytes_of_text(text: str) -> bytes:
    """The bytes that an RWKV vocabulary means by Python's spelling of them: "\\n", "\\xe4", "\\\\", "\\'" are one byte each."""
    found, at = bytearray(), 0
    named = {"n": b"\n", "t": b"\t", "r": b"\r"}
    while at < len(text):
        if text[at] != "\\" or at + 1 == len(text):
            found += text[at].encode()
            at += 1
        elif text[at + 1] == "x":
            found.append(int(text[at + 2 : at + 4], 16))
            at += 4
        else:
            found += named.get(text[at + 1], text[at + 1].encode())
            at += 2
    return bytes(found)


def _longest_match(metadata: Mapping[str, Any], tokens: list[str], label: str) -> Any:
    """RWKV: from left to right, the longest token that the bytes begin with.

    That is WordPiece without a mark for pieces inside of words, over the whole text as one word.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    letters = _byte_letters()
    vocabulary = {}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        try:
            plain = kind not in (CONTROL, USER_DEFINED, UNUSED)
            vocabulary["".join(letters[b] for b in bytes_of_text(token)) if plain else token] = index
        except ValueError as e:
            raise CheckpointError(f"{label}: token {index}, {token!r}: damaged escape") from e
    missing = [b for b, letter in enumerate(letters) if letter not in vocabulary]
    if missing:  # any other text would be no match at all
        raise CheckpointError(f"{label}: no token for {len(missing)} of 256 bytes, the first 0x{missing[0]:02x}")
    model = models.WordPiece(vocabulary, unk_token=tokens[0], continuing_subword_prefix="")
    model.max_input_chars_per_word = 2**31
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: itself where it is printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram, "bert": _wordpiece}
BUILDERS |= {"gemma4": _sentencepiece, "rwkv": _longest_match}
# Kinds whose files mean begin and end tokens where they do not speak of them (src/llama-vocab.cpp).
_BEGINS, _ENDS = ("llama", "bert"), ("t5", "bert")


def _add_special_tokens(tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens, and user-defined ones that llama.cpp always matches whole."""
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [t for t, k in zip(tokens, kinds) if k == kind and t]
        added = [AddedToken(t, normalized=False, special=special) for t in chosen]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _add_ends(tokenizer: Any, metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Begin and end tokens around a text, where the file asks for them."""
    from tokenizers import processors

    kind = metadata.get("tokenizer.ggml.model")
    splitting = SPLITTINGS.get(str(metadata.get("tokenizer.ggml.pre", "default")), Splitting())
    begin = metadata.get("tokenizer.ggml.add_bos_token", True if kind in _BEGINS else splitting.bos and kind == "gpt2")
    if kind == "gemma4":  # the flag is set, but the chat template writes the begin token itself (transformers 5.23)
        begin = False
    end = metadata.get("tokenizer.ggml.add_eos_token", kind in _ENDS)
    config["add_bos_token"], config["add_eos_token"] = bool(begin), bool(end)
    bos, eos = config.get("bos_token"), config.get("eos_token")
    if kind == "bert":  # [CLS] and [SEP]; older files name them begin and separator
        bos, eos = config.get("cls_token") or bos, config.get("sep_token") or eos
    head = [bos] if begin and bos else []
    tail = [eos] if end and eos else []
    if not head and not tail:
        return
    pair = [*head, "$A", *tail, *(f"{t}:1" for t in head), "$B:1", *(f"{t}:1" for t in tail)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=pair,
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*head, *tail}],
    )
