"""Broken checkpoints: an exception that names the tensor or key, and never random weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import GPTQ, SMALL, ids, llama, save_pair, tensors_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from jq.errors import CheckpointError, FormatError, JqError, UnsupportedError
from jq_torch.linear import JqLinear

SIZES = SMALL | {"num_hidden_layers": 1}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    save_pair(llama(SIZES), tmp_path, lambda name: "_proj" in name)
    return tmp_path / "packed"


def rewrite(folder, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**GPTQ, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(folder, enabled, part):
    rewrite(folder, lambda t: t.pop(f"{Q}.{part}"))
    with pytest.raises(JqError, match=rf"{Q}.*({part}|qweight)"):
        load(folder)


def test_a_missing_layer_is_named(folder, enabled):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)])
    with pytest.raises(CheckpointError, match=f"{Q}.weight: not in the file"):
        load(folder)


def test_a_missing_float_tensor_is_named(folder, enabled):
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


def test_a_packed_tensor_without_a_module_is_named(folder, enabled):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(Q)]:
            tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.self_attn\.q_proj"):
        load(folder)


def test_a_lone_packed_tensor_is_named(folder, enabled):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.qzeros": torch.zeros(2, 2, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"self_attn\.qzeros"):
        load(folder)


def test_codes_in_place_of_floats_are_named(folder, enabled):
    codes = torch.ones(SIZES["hidden_size"], dtype=torch.int8)
    for name in ("model.norm.weight", f"{Q}.bias"):
        before = tensors_of(folder)
        rewrite(folder, lambda t, name=name: t.update({name: codes}))
        with pytest.raises(CheckpointError, match=rf"{name}: found dtype int8, expected a float tensor"):
            load(folder)
        save_file(before, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tensor_beside_a_packed_layer_that_nobody_reads_is_named(folder, enabled):
    rewrite(folder, lambda t: t.update({f"{Q}.bias_scale": torch.ones(1)}))
    with pytest.raises(UnsupportedError, match=rf"{Q}.bias_scale: lies beside a packed layer"):
        load(folder)


def test_a_wrong_shape_is_named(folder, enabled):
    rewrite(folder, lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :-8].clone()}))
    with pytest.raises(FormatError, match=f"{Q}.*scales"):
        load(folder)


def test_a_whole_layer_of_another_shape_is_named(folder, enabled):
    def change(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{Q}.{part}"] = tensors[f"model.layers.0.mlp.up_proj.{part}"].clone()

    rewrite(folder, change)
    with pytest.raises(FormatError, match=rf"{Q}: .*\(128, 64\).*\(64, 64\)"):
        load(folder)


def test_a_truncated_file_is_named(folder, enabled):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)model\.safetensors|incomplete|truncated"):
        load(folder)


def test_an_unknown_method_is_no_float_model_with_random_weights(folder, enabled):
    configure(folder, quant_method="gtpq")
    with pytest.raises(UnsupportedError, match="gtpq"):
        load(folder)


def test_an_unknown_format_option_is_named(folder, enabled):
    configure(folder, format="gptq_v9")
    with pytest.raises(JqError, match="gptq_v9"):
        load(folder)


def test_another_config_class_is_refused(folder, enabled):
    import transformers

    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        load(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))


def test_state_dict_argument_is_refused(folder, enabled):
    config = LlamaConfig.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors_of(folder))


def test_a_new_head_may_be_missing(folder, enabled):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert model(ids()).logits.shape == (2, 3)


def test_tied_output_layer(tmp_path, enabled):
    save_pair(llama(SIZES, tie_word_embeddings=True), tmp_path, lambda name: "_proj" in name)
    model, info = load(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_packed_output_layer_that_the_config_calls_tied(tmp_path, enabled):
    save_pair(llama(SIZES), tmp_path, lambda name: "_proj" in name or "lm_head" in name)
    file = tmp_path / "packed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    model, info = load(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    dense = load(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_extra_biases_are_kept_and_added(folder, enabled):
    bias = torch.randn(64, dtype=torch.float16)
    rewrite(folder, lambda t: t.update({f"{Q}.bias": bias}))
    model, info = load(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(model.get_submodule(Q).bias, bias)


def test_a_missing_shard_is_named(folder, enabled):
    """A download that stopped between two shards."""
    load(folder).save_pretrained(folder / "shards", max_shard_size="40KB")
    shards = sorted((folder / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises((OSError, CheckpointError), match=shards[1].name):
        load(folder / "shards")


def test_a_shard_of_another_save_is_named(folder, enabled):
    """A directory that two saves wrote into: the index names tensors that its files do not have."""
    load(folder).save_pretrained(folder / "shards", max_shard_size="40KB")
    shards = sorted((folder / "shards").glob("model-*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(JqError, match=r"safetensors|not in the file"):
        load(folder / "shards")


def test_weights_without_a_config(folder, enabled):
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        load(folder)


def test_device_maps_need_accelerate(folder, enabled, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "accelerate" else found(n, *a))
    with pytest.raises(ImportError, match="pip install accelerate"):
        load(folder, device_map="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, {"model": "cuda:1", "lm_head": "cpu"}, torch.device("cuda")])
def test_a_device_that_is_not_there_is_named(folder, enabled, device_map):
    with pytest.raises(RuntimeError, match=r"device_map: cuda(:\d)? .*torch sees no"):
        load(folder, device_map=device_map)


@pytest.mark.parametrize("key, value", [("bits", 5), ("bits", "four"), ("group_size", -7)])
def test_a_value_that_the_method_does_not_have_is_named(folder, enabled, key, value):
    configure(folder, **{key: value})
    with pytest.raises(JqError, match=rf"{key}.*{value}|{value}.*{key}"):
        load(folder)


@pytest.fixture
def beside(folder):
    """The checkpoint as old AutoGPTQ wrote it: quantize_config.json, and nothing of it in config.json."""
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(said))
    return folder


WAYS = {
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "class": lambda folder: LlamaForCausalLM.from_pretrained(folder),
    "config": lambda folder: AutoModelForCausalLM.from_pretrained(folder, config=LlamaConfig.from_pretrained(folder)),
    "subfolder": lambda folder: AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
    "class and subfolder": lambda folder: LlamaForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_beside_the_weights_is_found_whatever_the_call(beside, enabled, way):
    dense = LlamaForCausalLM.from_pretrained(beside.parent / "dense")
    model = WAYS[way](beside)
    assert sum(isinstance(m, JqLinear) for m in model.modules()) == 7
    torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["qweight", "weight_packed"])
def test_packed_tensors_that_nothing_explains_are_refused(beside, enabled, way, end):
    (beside / "quantize_config.json").unlink()
    rewrite(beside, lambda t: [t.update({n.replace("qweight", end): t.pop(n)}) for n in list(t) if "qweight" in n])
    if end != "qweight":
        rewrite(beside, lambda t: [t.pop(n) for n in list(t) if n.endswith(("qzeros", "scales", "g_idx"))])
    with pytest.raises(JqError, match=end):
        WAYS[way](beside)
