"""Tokenizer files that are damaged, or that ask for code of their repository to run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jq.errors import CheckpointError
from jq.models import tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_damaged_files_name_the_directory(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    for sides in ({}, {name: raw}):
        with pytest.raises(CheckpointError, match="the tokenizer files cannot be loaded") as caught:
            tokenizer.load(tmp_path, sides)
        assert str(caught.value).startswith(f"{tmp_path}: ")


def test_no_code_of_a_repository_runs(tmp_path: Path, capsys) -> None:
    """transformers would ask on the terminal whether it may."""
    (tmp_path / "tokenization_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="need code of their repository, which is not run"):
        tokenizer.load(tmp_path, {})
    assert not (tmp_path / "ran").exists() and capsys.readouterr().out == ""
