"""The small real model, where JAXQ_SMOLLM2 names its Hugging Face directory: logits, tokens, text, chat, saving."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import jq

FOLDER = os.environ.get("JAXQ_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not (Path(FOLDER) / "config.json").is_file(), reason="JAXQ_SMOLLM2 names no directory of SmolLM2-135M-Instruct"
)


@pytest.fixture(scope="module")
def model():
    return jq.load(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch", reason="transformers' own model needs torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_logits_equal_transformers(model, theirs) -> None:
    import torch

    ids = np.asarray(model.tokenizer("The history of the bicycle begins in the nineteenth century, when")["input_ids"])
    with torch.no_grad():
        want = theirs(torch.tensor(ids)[None]).logits.numpy()
    error = np.abs(np.asarray(model(ids)) - want).max()
    print(f"max abs error {error:.2e}")
    assert error < 2e-4


def test_greedy_tokens_equal_transformers(model, theirs) -> None:
    import torch

    for text in ("Gravity is", "def fibonacci(n):", "Once upon a time there was"):
        ids = np.asarray(model.tokenizer(text)["input_ids"])[None]
        with torch.no_grad():
            want = theirs.generate(
                torch.tensor(ids), attention_mask=torch.ones(ids.shape), max_new_tokens=40, do_sample=False
            )
        np.testing.assert_array_equal(model.generate(ids, 40), want.numpy())


def test_text_and_chat(model) -> None:
    assert (
        model.generate("Gravity is", 12)
        == " a fundamental concept in physics that describes the curvature of spacetime caused"
    )
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    assert model.generate(question, 40) == "The capital of France is Paris."
    assert "".join(model.stream(question, 40)) == "The capital of France is Paris."
    assert model.generate("Gravity is", 30, stop=" that") == " a fundamental concept in physics"


def test_saves_byte_for_byte(model, tmp_path: Path) -> None:
    jq.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-1000000:] == (
        Path(FOLDER) / "model.safetensors"
    ).read_bytes()[-1000000:]
    from reference_dirs import stored

    assert stored(tmp_path / "out")[0] == stored(Path(FOLDER))[0]
