"""The tokenizer of a checkpoint, through transformers (which needs no torch for it), loaded when first asked for."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jq.errors import CheckpointError, UnsupportedError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load(path: Path | None, side_files: Mapping[str, bytes]) -> Any:
    """A transformers tokenizer from a checkpoint's directory or from the files that a State carries.

    Raises:
      UnsupportedError: no tokenizer files.
      CheckpointError: damaged ones, or a tokenizer that is code of the repository, which is never run.
    """
    names = set(side_files) | ({p.name for p in path.iterdir()} if path is not None and path.is_dir() else set())
    if not names & set(FILES):
        raise UnsupportedError(
            f"{path or 'this model'}: has no tokenizer files ({', '.join(FILES)}); generate takes lists of token ids too"
        )
    if path is not None and path.is_dir() and any((path / f).exists() for f in FILES):
        return _from(str(path), path)
    with tempfile.TemporaryDirectory() as folder:
        for name, raw in side_files.items():
            (Path(folder) / name).write_bytes(raw)
        return _from(folder, path)


def _from(folder: str, path: Path | None) -> Any:
    with _without_advice():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # it would ask on the terminal
    except Exception as e:  # damaged files raise nearly anything
        raise CheckpointError(
            f"{path or 'this model'}: the tokenizer files cannot be loaded ({type(e).__name__}: {e}); they are damaged, "
            "incomplete, or need code of their repository, which is not run. generate takes lists of token ids too"
        ) from e


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """While transformers is imported: it would advise to install torch, which a tokenizer does not need."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages: [{"role": ..., "content": ...}, ...]."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a text, or of a conversation through the chat template."""
    if is_chat(prompt):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


class TextStream:
    """Turns growing token lists into pieces of text; holds back what may still change or go.

    That is half a character, and an end that may become one of the stop strings `stop`.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.given, self.stop = "", stop

    def push(self, text: str, last: bool) -> str:
        """The new part of `text`, the decoded answer so far."""
        if not last:
            if text.endswith("\ufffd"):
                return ""
            text = text[: len(text) - self._beginning_of_stop(text)]
        piece = text[len(self.given) :]
        self.given += piece
        return piece

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        lengths = (n for s in self.stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
        return max(lengths, default=0)
