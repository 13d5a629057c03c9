"""Fixtures: a small checkpoint with a tokenizer, and the command line run in this process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from reference_dirs import directories

from jq.cli import main


@dataclasses.dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def jaxq(capsys):
    """jaxq("inspect", path) -> Ran: exit code, stdout and stderr."""

    def run(*words) -> Ran:
        capsys.readouterr()
        code = main([str(w) for w in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte: 256 entries, as the tiny models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A float32 Llama of two layers with a tokenizer: the dequantized weights of a reference directory."""
    import jq
    from jq.state import State

    source = directories()["gptq-4-g32-sym-descact"]
    state = jq.load_state(source)
    tensors = {
        k: np.asarray(v.dequantize("float32")) if k in quantized(state) else np.asarray(v) for k, v in state.items()
    }
    config = {k: v for k, v in state.config.items() if k != "quantization_config"} | {"dtype": "float32"}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    jq.save(State(tensors, config), folder)
    write_tokenizer(folder)
    return folder


def quantized(state) -> set[str]:
    from jq.qtensor import QTensor

    return {name for name in state if isinstance(state[name], QTensor)}
