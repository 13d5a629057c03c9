"""What transformers' own quantization tests assert and no other file here does, on models of a few kilobytes.

docs/torch/transformers-tests.md lists every assertion with the test that holds it.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from reference_dirs import directories
from tiny import ids, tensors_of
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from jq.errors import UnsupportedError
from jq_torch.linear import JqLinear


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("opt")
    config = OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=128
    )
    OPTForCausalLM(config).save_pretrained(path)
    return path


def load(folder, config=None, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def packed(model):
    return sum(isinstance(m, JqLinear) for m in model.modules())


CONFIGS = {
    "eetq": lambda **skip: transformers.EetqConfig(**skip),
    "fp8": lambda **skip: transformers.FineGrainedFP8Config(weight_block_size=(64, 64), **skip),
    "fbgemm": lambda **skip: transformers.FbgemmFp8Config(**skip),
    "quanto": lambda **skip: transformers.QuantoConfig(weights="int8", **skip),
    "bitnet": lambda **skip: transformers.BitNetQuantConfig(**skip),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_replaced_layers_with_and_without_skips(opt, enabled, name):
    dense = load(opt)
    linears = sum(isinstance(m, torch.nn.Linear) for m in dense.modules())
    assert packed(load(opt, CONFIGS[name]())) == linears - 1
    skipped = load(opt, CONFIGS[name](modules_to_not_convert=["fc1", "lm_head"]))
    assert packed(skipped) == linears - 1 - 2
    assert type(skipped.model.decoder.layers[0].fc1) is torch.nn.Linear


def test_gptq_backend_may_change_at_load(gptq_pair, enabled):
    want = load(gptq_pair / "packed")
    other = transformers.GPTQConfig(bits=4, backend="gptq_torch", max_input_length=2048)
    got = load(gptq_pair / "packed", other)
    with torch.no_grad():
        assert torch.equal(got(ids()).logits, want(ids()).logits)


def test_awq_layer_that_the_file_leaves_in_float(enabled):
    folder = directories().get("awq-gemm-g128-skip")
    if folder is None:
        pytest.skip("needs the reference directory awq-gemm-g128-skip")
    quantized = {n.removesuffix(".qweight") for n in tensors_of(folder) if n.endswith(".qweight")}
    model = load(folder)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, JqLinear) == (name in quantized), name


def test_hqq_forward_of_many_tokens_and_dequantized_layer(float_llama, enabled):
    model = load(float_llama, transformers.HqqConfig(nbits=8, group_size=64), dtype=torch.float16)
    layer = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        out = layer(torch.randn(1, 1024, 128, dtype=torch.float16))
    assert out.shape == (1, 1024, 128) and out.dtype == torch.float16
    assert layer.dequantize().shape == (128, 128)


def test_quanto_activations_are_refused(float_llama, enabled):
    with pytest.raises((UnsupportedError, ValueError), match="activations"):
        load(float_llama, transformers.QuantoConfig(weights="int8", activations="int8"))


def test_fp8_tensors_in_the_file(float_llama, enabled, tmp_path):
    config = transformers.FineGrainedFP8Config(weight_block_size=(32, 32))
    load(float_llama, config).save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    for name in [n for n in stored if n.endswith("_scale_inv")]:
        weight, scale = stored[name.removesuffix("_scale_inv")], stored[name]
        assert weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        assert tuple(weight.shape) == tuple(32 * s for s in scale.shape)
    assert list(load(tmp_path).config.quantization_config.weight_block_size) == [32, 32]


def test_bitnet_tensors_in_the_file(float_llama, enabled, tmp_path):
    load(float_llama, transformers.BitNetQuantConfig()).save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    weight = stored["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.uint8 and weight.shape == (64, 128)
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].numel() == 1


def test_training_an_adapter_under_autocast(float_llama, enabled):
    """bitsandbytes' training test: small matrices beside the attention's projections get gradients."""
    model = load(float_llama, transformers.BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad = False
    adapters = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            adapters[name] = torch.nn.Sequential(
                torch.nn.Linear(128, 8, bias=False), torch.nn.Linear(8, 128, bias=False)
            )
            module.register_forward_hook(lambda m, x, y, extra=adapters[name]: y + extra(x[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids()).logits.norm().backward()
    for name, extra in adapters.items():
        assert extra[1].weight.grad is not None and extra[1].weight.grad.norm() > 0, name


def test_text_generation_pipeline(float_llama, enabled):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(64)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1")
    model = load(float_llama, transformers.BitsAndBytesConfig(load_in_8bit=True))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe("w5 w6 w7", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert found.startswith("w5 w6 w7") and len(found) > len("w5 w6 w7")


def test_dequantized_model_generates_and_casts(float_llama, enabled):
    model = load(float_llama, transformers.BitsAndBytesConfig(load_in_4bit=True)).dequantize()
    assert model.generate(ids(batch=1), max_new_tokens=3, do_sample=False).shape[1] == 15
    assert model.to(torch.float16).lm_head.weight.dtype == torch.float16


def test_footprint_stays_on_the_same_device(float_llama, enabled):
    model = load(float_llama, transformers.BitsAndBytesConfig(load_in_4bit=True))
    before = model.get_memory_footprint()
    assert model.to("cpu").get_memory_footprint() == before


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_saved_and_loaded_parameters_are_equal(float_llama, enabled, tmp_path, kind, double):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    model = load(float_llama, config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)
    assert again.config.quantization_config.bnb_4bit_quant_type == kind
