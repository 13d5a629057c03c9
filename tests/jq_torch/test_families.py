"""One model of each family: packed from a file, and quantized while loading, beside its dense twin."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from tiny import ids, same, save_pair, tensors_of

import jq
from jq_torch.linear import JqLinear


def opt():
    config = hf.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=64
    )
    return hf.OPTForCausalLM(config), hf.AutoModelForCausalLM, lambda n: ".layers." in n and "norm" not in n


def bloom():
    config = hf.BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64)
    wanted = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
    return hf.BloomForCausalLM(config), hf.AutoModelForCausalLM, lambda n: n.endswith(wanted)


def gpt2():
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    return hf.GPT2LMHeadModel(config), hf.AutoModelForCausalLM, lambda n: ".c_" in n


def t5():
    config = hf.T5Config(d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2, vocab_size=64)
    wanted = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi.weight")
    return hf.T5ForConditionalGeneration(config), hf.AutoModelForSeq2SeqLM, lambda n: n.endswith(wanted)


def bert():
    config = hf.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    return hf.BertModel(config), hf.AutoModel, lambda n: "encoder" in n and "Norm" not in n


def qwen2():
    config = hf.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    return hf.Qwen2ForCausalLM(config), hf.AutoModelForCausalLM, lambda n: "_proj" in n


FAMILIES = {"opt": opt, "bloom": bloom, "gpt2": gpt2, "t5": t5, "bert": bert, "qwen2": qwen2}
LAYERS = {"opt": 12, "bloom": 8, "gpt2": 8, "t5": 28, "bert": 12, "qwen2": 14}


def outputs(model):
    inputs = {"input_ids": ids()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids()[:, :5]
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    torch.manual_seed(0)
    model, auto, wanted = FAMILIES[request.param]()
    for parameter in model.parameters():  # biases start at zero, which would hide a lost one
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    save_pair(model, tmp_path, wanted, transposed=request.param == "gpt2")
    return request.param, tmp_path, auto


def test_packed_file(family, enabled, tmp_path):
    name, folder, auto = family
    model, info = auto.from_pretrained(folder / "packed", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert sum(isinstance(m, JqLinear) for m in model.modules()) == LAYERS[name]
    dense = auto.from_pretrained(folder / "dense")
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=1e-3, atol=1e-4)
    assert model.num_parameters() == dense.num_parameters()
    model.save_pretrained(folder / "saved")
    want, got = tensors_of(folder / "packed"), tensors_of(folder / "saved")
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)
    plain = model.dequantize()
    for key, parameter in dense.named_parameters():
        assert torch.equal(plain.get_parameter(key), parameter), key


def test_quantized_while_loading(family, enabled):
    name, folder, auto = family
    config = enabled.JqConfig(jq.RTN(group_size=32))
    model, info = auto.from_pretrained(folder / "float", quantization_config=config, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert sum(isinstance(m, JqLinear) for m in model.modules()) >= LAYERS[name]
    want = outputs(model)
    assert torch.isfinite(want).all()
    model.save_pretrained(folder / "made")
    assert torch.equal(outputs(auto.from_pretrained(folder / "made")), want)


def test_layers_on_disk(family, enabled, tmp_path):
    """Also where a family's `_init_weights` looks at the weights of layers inside of others."""
    name, folder, auto = family
    blocks = {"opt": "model.decoder.layers.1", "bloom": "transformer.h.1", "gpt2": "transformer.h.1"}
    blocks |= {"t5": "encoder.block.1", "bert": "encoder.layer.1", "qwen2": "model.layers.1"}
    whole = auto.from_pretrained(folder / "packed")
    places = {path: "cpu" for path, m in whole.named_modules() if path and not list(m.children())}
    places = {path: at for path, at in places.items() if not path.startswith(blocks[name] + ".")}
    model = auto.from_pretrained(
        folder / "packed", device_map={**places, blocks[name]: "disk"}, offload_folder=tmp_path / "off"
    )
    there = [m for m in model.get_submodule(blocks[name]).modules() if isinstance(m, JqLinear)]
    assert there and not any(m.is_packed for m in there)
    torch.testing.assert_close(outputs(model), outputs(whole), rtol=1e-5, atol=1e-6)


def test_merged_adapters_leave_the_layers_of_the_family(family, enabled, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    _, folder, auto = family
    model = auto.from_pretrained(folder / "packed")
    targets = [path for path, m in model.named_modules() if isinstance(m, JqLinear)]
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
    merged = adapted.merge_and_unload()
    dense = auto.from_pretrained(folder / "dense")
    for path in targets:
        assert type(merged.get_submodule(path)) is type(dense.get_submodule(path)), path
        assert merged.get_submodule(path).weight.shape == dense.get_submodule(path).weight.shape, path
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(auto.from_pretrained(tmp_path / "merged")), outputs(merged))


def test_t5_keeps_wo_in_float32(tmp_path, enabled):
    torch.manual_seed(0)
    t5()[0].save_pretrained(tmp_path)
    config = enabled.JqConfig(jq.RTN(group_size=32))
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float16)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(wo) is torch.nn.Linear and wo.weight.dtype == torch.float32
    assert torch.isfinite(outputs(model)).all()


def clip():
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)), hf.AutoModel


def llava():
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 66, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        text_config=hf.LlamaConfig(**text, num_attention_heads=2),
        image_token_index=65, vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), hf.AutoModelForImageTextToText


@pytest.mark.parametrize("build, packed", [(clip, 13), (llava, 21)])
def test_images_and_text(build, packed, enabled, tmp_path):
    """Two towers, of which transformers knows no embedding; a quantization_config that lies under text_config."""
    model, auto = build()
    model.save_pretrained(tmp_path / "float")
    inputs = {"input_ids": torch.tensor([[3, 65, 65, 65, 65, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    if build is clip:
        inputs["input_ids"] = ids(batch=1)
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    made = auto.from_pretrained(tmp_path / "float", quantization_config=config)
    assert sum(isinstance(m, JqLinear) for m in made.modules()) == packed
    made.save_pretrained(tmp_path / "nf4")
    folders = [tmp_path / "nf4"]
    if build is llava:
        found = json.loads((tmp_path / "nf4" / "config.json").read_text())
        found["text_config"]["quantization_config"] = found.pop("quantization_config")
        shutil.copytree(tmp_path / "nf4", tmp_path / "under")
        (tmp_path / "under" / "config.json").write_text(json.dumps(found))
        folders.append(tmp_path / "under")
    with torch.no_grad():
        want = made(**inputs)
        for folder in folders:
            again = auto.from_pretrained(folder)(**inputs)
            key = "logits_per_image" if build is clip else "logits"
            assert torch.equal(again[key], want[key])
