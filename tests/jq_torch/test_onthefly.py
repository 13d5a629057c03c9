"""Quantizing while loading: by transformers' config classes and by methods of jq; saved and loaded again."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny import ids
from transformers import AutoModelForCausalLM

import jq
import jq_torch
from jq.cli import methods
from jq.errors import CalibrationError, FormatError, UnsupportedError
from jq_torch.config_methods import method_of
from jq_torch.linear import JqLinear


@pytest.fixture(scope="module")
def folder(float_llama):
    return float_llama


def _config(name: str, *args, **kwargs):
    return lambda: getattr(transformers, name)(*args, **kwargs)


CONFIGS = {
    "bnb-nf4": _config("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-double": _config(
        "BitsAndBytesConfig",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "bnb-fp4": _config("BitsAndBytesConfig", load_in_4bit=True),
    "bnb-int8": _config("BitsAndBytesConfig", load_in_8bit=True),
    "hqq": _config("HqqConfig", nbits=4, group_size=64),
    "hqq-3bit": _config("HqqConfig", nbits=3, group_size=64, axis=0),
    "hqq-dynamic": _config(
        "HqqConfig",
        dynamic_config={
            "self_attn.q_proj": {"nbits": 8, "group_size": 64},
            "mlp.up_proj": {"nbits": 2, "group_size": 32},
        },
    ),
    "quanto-int8": _config("QuantoConfig", weights="int8"),
    "quanto-int2": _config("QuantoConfig", weights="int2"),
    "quanto-float8": _config("QuantoConfig", weights="float8"),
    "eetq": _config("EetqConfig"),
    "fbgemm": _config("FbgemmFp8Config"),
    "fp8": _config("FineGrainedFP8Config"),
    "torchao-int8": _config("TorchAoConfig", "Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": _config("TorchAoConfig", "Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": _config("TorchAoConfig", "Float8WeightOnlyConfig"),
    "metal": _config("MetalConfig", bits=4, group_size=64),
    "higgs": _config("HiggsConfig", group_size=64, hadamard_size=64),
    "sinq": _config("SinqConfig", nbits=3),
    "fp_quant": _config("FPQuantConfig"),
    "fp_quant-mxfp4": _config("FPQuantConfig", forward_dtype="mxfp4"),
    "fp_quant-pseudo": _config("FPQuantConfig", pseudoquantization=True),
    "fouroversix": _config("FourOverSixConfig"),
    "fouroversix-mxfp4": _config("FourOverSixConfig", dtype="mxfp4", scale_rule="static_6"),
    "jq-rtn": lambda: jq_torch.JqConfig(jq.RTN(group_size=32)),
    "jq-nf4": lambda: jq_torch.JqConfig(jq.NF4()),
    "jq-int8": lambda: jq_torch.JqConfig(jq.Int8()),
    "jq-compressed": lambda: jq_torch.JqConfig(jq.CompressedTensors("W4A16", group_size=32)),
    "jq-bitnet": lambda: jq_torch.JqConfig(jq.BitNet()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_made_saved_and_loaded_again(folder, tmp_path, enabled, name):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[name](), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    packed = sum(isinstance(m, JqLinear) for m in model.modules())
    assert packed == (4 if name == "hqq-dynamic" else 14)
    assert type(model.lm_head) is torch.nn.Linear
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.num_parameters() == dense.num_parameters()
    if name != "fp_quant-pseudo":  # whose weights the library keeps as floats
        assert model.get_memory_footprint() < dense.get_memory_footprint()
    with torch.no_grad():
        want = model(ids(batch=1)).logits  # as many tokens as generate begins with: each number of them is compiled
        assert torch.isfinite(want).all()
    assert model.generate(ids(batch=1), max_new_tokens=2, do_sample=False).shape == (1, 14)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        assert torch.equal(again(ids(batch=1)).logits, want)
    assert again.config.quantization_config.to_dict()["quant_method"] == model.config.quantization_config.quant_method


def test_equal_to_quantizing_the_weight_alone(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS["bnb-nf4"](), dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = dense.model.layers[1].mlp.up_proj.weight.detach().numpy()
    want = jq.NF4().quantize(weight).dequantize("float32")
    assert torch.equal(model.model.layers[1].mlp.up_proj.dequantize(torch.float32), jq_torch.bridge.from_jax(want))


def test_skip_lists(folder, enabled):
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds["down_proj"] is torch.nn.Linear and kinds["up_proj"] is JqLinear


def test_a_named_skip_list_opens_the_output_layer(folder, enabled, tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert isinstance(model.lm_head, JqLinear)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.lm_head, JqLinear)


def test_calibrated_methods_say_what_they_need(folder, enabled):
    for config in (transformers.GPTQConfig(bits=4), transformers.AwqConfig()):
        with pytest.raises(CalibrationError, match="calibration data"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ValueError, match="method is missing"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=jq_torch.JqConfig())


def test_methods_that_jq_only_reads(folder, enabled):
    with pytest.raises(UnsupportedError, match="AqlmConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=transformers.AqlmConfig())


@pytest.mark.parametrize(
    "config, message",
    [
        (_config("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_use_doublequant=True), "bnb_4bit_use_doublequant"),
        (_config("HqqConfig", nbits=4, groupsize=64), "HqqConfig: unknown option 'groupsize'"),
        (_config("QuantoConfig", weight="int4"), "QuantoConfig: unknown option 'weight'"),
        (_config("EetqConfig", skip=["lm_head"]), "EetqConfig: unknown option 'skip'"),
        (lambda: jq_torch.JqConfig(jq.NF4(), skipped=["lm_head"]), "JqConfig: unknown option 'skipped'"),
        (lambda: {"quant_method": "hqq", "nbits": 4, "groupsize": 64}, "HqqConfig: unknown option 'groupsize'"),
        (_config("BitsAndBytesConfig"), "neither load_in_4bit nor load_in_8bit"),
        (_config("TorchAoConfig", "Int4WeightOnlyConfig", groupsize=64), "groupsize=64: .*knows group_size"),
        (_config("TorchAoConfig", "Int4WeightOnlyConfig", int4_choose_qparams_algorithm="hqq"), "makes 'tinygemm'"),
        (
            _config("TorchAoConfig", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"lm_head": None}}}),
            "names nothing",
        ),
        (_config("BitNetQuantConfig", use_rms_norm=True), "use_rms_norm=True"),
        (_config("BitNetQuantConfig", quantization_mode="online"), "quantization_mode='online'"),
        (_config("FourOverSixConfig", activation_scale_rule="mae"), "'mse' beside activation_scale_rule 'mae'"),
        (_config("FourOverSixConfig", output_dtype="float16"), "output_dtype='float16'"),
        (_config("FineGrainedFP8Config", expert_dtype="fp4"), "expert_dtype"),
    ],
)
def test_unknown_options_are_named(folder, enabled, config, message):
    with pytest.raises(UnsupportedError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())


def _of(kind, **data):
    return {"_type": kind, "_data": data}


# What classes of torchao 0.18 mean by default (tests/jq_torch/test_peers.py asks them), and with options.
TORCHAO = [
    ("Int8WeightOnlyConfig", {}, {}),
    ("Int8WeightOnlyConfig", {"granularity": _of("PerTensor")}, {"granularity": "tensor"}),
    ("IntxWeightOnlyConfig", {}, {"bits": 8}),
    (
        "IntxWeightOnlyConfig",
        {"weight_dtype": "torch.int3", "mapping_type": "ASYMMETRIC"},
        {"bits": 3, "asymmetric": True},
    ),
    ("Int8DynamicActivationIntxWeightConfig", {}, {"bits": 8, "group_size": 32}),
    (
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_granularity": _of("PerGroup", group_size=64)},
        {"bits": 8, "group_size": 64},
    ),
    ("Int8DynamicActivationInt8WeightConfig", {"act_mapping_type": "MappingType.ASYMMETRIC"}, {"asymmetric": True}),
    ("Int4WeightOnlyConfig", {"int4_packing_format": "tile_packed_to_4d"}, {"packing": "tile_packed_to_4d"}),
    ("Float8DynamicActivationFloat8WeightConfig", {}, {"granularity": "tensor"}),
]


@pytest.mark.parametrize("name, options, fields", TORCHAO)
def test_torchaos_options(name, options, fields, enabled):
    scheme = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("Config")).lower()
    for config in (
        transformers.TorchAoConfig(name, **options),
        transformers.TorchAoConfig({"default": {"_type": name, "_data": options}}),
    ):
        assert method_of(config) == jq.TorchAO(scheme, **fields)


@pytest.mark.parametrize("name", ["bnb-nf4", "hqq", "quanto-int8", "fp8"])
def test_a_config_as_a_dict(folder, enabled, name, tmp_path):
    arguments = {
        "bnb-nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 64},
        "quanto-int8": {"quant_method": "quanto", "weights": "int8"},
        "fp8": {"quant_method": "fp8"},
    }
    want = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name]())
    made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=arguments[name])
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(made(ids()).logits, want(ids()).logits)
        assert torch.equal(again(ids()).logits, want(ids()).logits)


def test_a_config_that_asks_for_float_layers(folder, tmp_path):
    with jq_torch.enable(quantize_activations=False):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS["fp8"]()).save_pretrained(tmp_path)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path)
        config = transformers.FineGrainedFP8Config(dequantize=True)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert not any(isinstance(m, JqLinear) for m in plain.modules())
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids()).logits, packed(ids()).logits)


def test_what_goes_wrong_on_the_way_is_raised_as_it_is(folder, enabled):
    config = transformers.HqqConfig(nbits=4, group_size=24)
    with pytest.raises(FormatError, match=r"model\.layers\.0\..*group"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_disk_offload_is_refused_while_quantizing(folder, enabled):
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=CONFIGS["bnb-nf4"](),
            device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"},
        )


EVERY = sorted(name for name in methods.names().values() if hasattr(methods.find(name), "quantize"))
OPTIONS = {
    "RTN": {"group_size": 64},
    "FP8": {"block_size": (64, 64)},
    "HIGGS": {"group_size": 64, "hadamard_size": 64},
}


@pytest.mark.parametrize("name", [n for n in EVERY if n != "MXFP4"])  # its files hold experts of gpt-oss alone
def test_every_method_without_data(folder, tmp_path, enabled, name):
    """`JqConfig(method)`: the weights are those of `jq.quantize`, and they save and load."""
    method = getattr(jq, name)(**OPTIONS.get(name, {}))
    dtype = torch.float16 if name == "EETQ" else torch.bfloat16
    config = jq_torch.JqConfig(method)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, JqLinear)}
    assert len(layers) == 14
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    path = "model.layers.1.mlp.up_proj"
    want = method.quantize(jq_torch.bridge.array_of(dense.get_submodule(path).weight)).dequantize("float32")
    assert torch.equal(layers[path].dequantize(torch.float32), jq_torch.bridge.from_jax(want))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, layer in layers.items():
        assert torch.equal(again.get_submodule(path).dequantize(torch.float32), layer.dequantize(torch.float32)), path
    with torch.no_grad():
        assert torch.isfinite(again(ids()).logits).all()
