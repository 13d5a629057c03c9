"""One model of each family: packed from a file, and quantized while loading, beside its dense twin."""

from __future__ import annotations

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


def test_t5_keeps_wo_in_float32(tmp_path, enabled):
    torch.manual_seed(0)
    t5()[0].save_pretrained(tmp_path)
    config = enabled.JqConfig(jq.RTN(group_size=32))
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float16)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(wo) is torch.nn.Linear and wo.weight.dtype == torch.float32
    assert torch.isfinite(outputs(model)).all()
