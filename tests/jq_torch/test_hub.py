"""`push_to_hub` of packed models: what would be uploaded, with the hub's client replaced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from reference_dirs import NOT_CHECKPOINT, directories
from tiny import ids, same, tensors_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import hub

NAMES = ("quanto-int8-actint8", "bnb-nf4", "gptq-autogptq-quantize_config")


class FakeHub:
    """Keeps the files of each commit in a folder; nothing goes over a network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.message = folder, [], ""

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        self.made.append((repo_id, options.get("private")))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, *, repo_id: str, operations: list, commit_message: str, **options: object) -> str:
        self.message = commit_message
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())
        return repo_id


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "hf_api", lambda: made)

    def no_card(repo_id: str, **options: object) -> None:
        raise huggingface_hub.errors.EntryNotFoundError(f"{repo_id} has no card yet")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    return made


def test_quantized_while_loading(fake, float_llama, enabled):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(float_llama, quantization_config=config)
    assert model.push_to_hub("somebody/nf4", private=True, commit_message="first", tags=["jaxq"]) == "somebody/nf4"
    assert fake.made == [("somebody/nf4", True)] and fake.message == "first"
    there = {p.relative_to(fake.folder).as_posix() for p in fake.folder.rglob("*") if p.is_file()}
    assert there == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert "jaxq" in (fake.folder / "README.md").read_text()
    stored = json.loads((fake.folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes" and stored["bnb_4bit_use_double_quant"] is True
    assert any(n.endswith("q_proj.weight.quant_state.bitsandbytes__nf4") for n in tensors_of(fake.folder))
    again = AutoModelForCausalLM.from_pretrained(fake.folder)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("folder", [d for name, d in directories().items() if name in NAMES], ids=lambda d: d.name)
def test_a_library_s_file_in_shards_with_what_lies_beside(fake, folder, enabled):
    """Every tensor byte for byte, the config's quantization verbatim, side files of the method."""
    AutoModelForCausalLM.from_pretrained(folder).push_to_hub("somebody/again", max_shard_size="60KB")
    there = {p.name for p in fake.folder.iterdir()}
    assert "model.safetensors.index.json" in there and sum(n.endswith(".safetensors") for n in there) > 1
    want = tensors_of_weights(folder)
    got = tensors_of(fake.folder)
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)
    configs = [json.loads((d / "config.json").read_text()).get("quantization_config") for d in (folder, fake.folder)]
    assert configs[0] == configs[1]  # none where the source had none
    for side in ("quanto_qmap.json", "quantize_config.json"):
        assert (side in there) == (folder / side).exists()


def tensors_of_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, not those that the reference keeps beside them."""
    from safetensors import safe_open

    found = {}
    for file in (f for f in folder.glob("*.safetensors") if f.name not in NOT_CHECKPOINT):
        with safe_open(file, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found
