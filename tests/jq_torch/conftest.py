"""Skips the folder where torch is missing; one thread for torch, since JAX has its own pool on the same cores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="tests of the torch adapter need the extra `torch`")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def float_llama(tmp_path_factory) -> Path:
    """The directory of a float32 Llama of two layers; tests write elsewhere."""
    import tiny

    path = tmp_path_factory.mktemp("float-llama")
    tiny.llama(tiny.SIZES).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gptq_pair(tmp_path_factory) -> Path:
    """`packed` (4-bit GPTQ) and `dense` (the same numbers) of a small Llama; tests write elsewhere."""
    import tiny

    path = tmp_path_factory.mktemp("gptq-pair")
    tiny.save_pair(tiny.llama(tiny.SMALL), path, lambda name: "_proj" in name)
    return path


@pytest.fixture(autouse=True)
def _no_takeover_is_left():
    yield
    import jq_torch

    jq_torch.disable()


@pytest.fixture
def enabled():
    """The adapter, taken over for the length of a test."""
    import jq_torch

    with jq_torch.enable():
        yield jq_torch
