"""What the adapter saves, the original libraries load, with the same dequantized weights (extra `peers`)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from tiny import ids
from transformers import AutoModelForCausalLM

import jq_torch
from jq_torch.config_methods import method_of

pytestmark = pytest.mark.peers


def _needs(name: str):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


@pytest.fixture(scope="module")
def folder(float_llama):
    return float_llama


def made(folder, target, config, dtype=torch.bfloat16):
    """Quantized by the adapter, saved to `target`; {module: dequantized weight} and logits in float32."""
    with jq_torch.enable():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
        model.save_pretrained(target)
    weights = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, jq_torch.JqLinear)}
    with torch.no_grad():
        return weights, model(ids()).logits.float()


@_needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_four_bit(folder, tmp_path, kind, double):
    import bitsandbytes as bnb

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    weights, logits = made(folder, tmp_path, config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in weights.items():
        layer = theirs.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit)
        dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(dense.reshape(weight.shape).to(weight.dtype), weight), name
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits.float(), logits, rtol=0.05, atol=0.02)


@_needs("bitsandbytes")
def test_bitsandbytes_eight_bit(folder, tmp_path):
    weights, logits = made(folder, tmp_path, transformers.BitsAndBytesConfig(load_in_8bit=True), torch.float16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in weights.items():
        layer = theirs.get_submodule(name)
        dense = layer.weight.data.float() * layer.weight.SCB[:, None].float() / 127
        torch.testing.assert_close(dense, weight.float(), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits.float(), logits, rtol=0.05, atol=0.02)


@_needs("bitsandbytes")
def test_same_codes_as_bitsandbytes_makes(folder, tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    made(folder, tmp_path / "ours", transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    from tiny import same, tensors_of

    want, got = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert want.keys() == got.keys()
    wrong = [n for n in want if not same(want[n], got[n]) and "quant_state" not in n]
    assert not wrong, wrong[:4]


TORCHAO = [
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int4WeightOnlyConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
]


@_needs("torchao")
@pytest.mark.parametrize("name", TORCHAO)
def test_a_name_means_what_torchaos_class_means(name):
    import torchao.quantization
    from torchao.core.config import config_to_dict

    own = getattr(torchao.quantization, name)()
    with jq_torch.enable("torchao"):
        found = [method_of(transformers.TorchAoConfig(kind)).config() for kind in (name, own)]
    assert found[0] == found[1] and found[0]["quant_type"]["default"]["_data"] == config_to_dict(own)["_data"]
