"""enable, disable, methods; config classes without their libraries."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import transformers
from reference_dirs import directories
from transformers.quantizers import auto
from transformers.utils import quantization_config as hf

import jq_torch
from jq.errors import UnsupportedError

EVERY = sorted(auto.AUTO_QUANTIZER_MAPPING)


def state():
    return (
        dict(auto.AUTO_QUANTIZER_MAPPING),
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        transformers.HqqConfig,
        hf.GPTQConfig,
        transformers.modeling_utils.get_hf_quantizer,
        auto.AutoHfQuantizer.supports_quant_method,
    )


def test_disable_gives_everything_back():
    before = state()
    jq_torch.enable()
    assert state() != before
    jq_torch.enable("gptq")
    jq_torch.disable()
    assert state() == before
    jq_torch.disable()


def test_context_manager_nests():
    before = state()
    with jq_torch.enable("gptq") as outer:
        assert outer is not None
        inside = state()
        with jq_torch.enable(quantize_activations=False):
            assert not jq_torch.settings.current().quantize_activations
        assert state() == inside
        assert jq_torch.settings.current().quantize_activations
    assert state() == before


def test_an_exception_gives_everything_back():
    before = state()
    with pytest.raises(RuntimeError, match="inside"), jq_torch.enable():
        raise RuntimeError("inside")
    assert state() == before


def test_only_the_named_methods_are_taken():
    with jq_torch.enable("gptq", "bitsandbytes"):
        ours = {k for k, v in auto.AUTO_QUANTIZER_MAPPING.items() if v is jq_torch.JqQuantizer}
    assert ours == {"gptq", "bitsandbytes_4bit", "bitsandbytes_8bit"}


def test_an_unknown_method_is_named():
    with pytest.raises(UnsupportedError, match=r"'gtpq'.*gptq"):
        jq_torch.enable("gtpq")


def test_methods_lists_what_is_read():
    assert {"gptq", "awq", "bitsandbytes_4bit", "hqq", "fp8", "compressed-tensors"} <= set(jq_torch.methods())
    assert "gguf" not in jq_torch.methods()


ARGUMENTS = {
    "AqlmConfig": {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16},
    "VptqConfig": {"enable_proxy_error": False, "config_for_layers": {}, "shared_layer_config": {}},
    "AwqConfig": {
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "do_fuse": True,
        "fuse_max_seq_len": 512,
        "modules_to_fuse": {"attention": ["q_proj"]},
        "exllama_config": {"version": 2},
    },
    "EetqConfig": {"weights": "int8", "modules_to_not_convert": ["lm_head"]},
    "GPTQConfig": {
        "bits": 4,
        "group_size": 64,
        "desc_act": True,
        "use_exllama": False,
        "exllama_config": {"version": 1},
        "use_cuda_fp16": True,
        "max_input_length": 4096,
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    },
    "BitsAndBytesConfig": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "HqqConfig": {"nbits": 4, "group_size": 64, "axis": 1, "skip_modules": ["lm_head"]},
    "FbgemmFp8Config": {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "QuantoConfig": {"weights": "int4", "activations": None, "modules_to_not_convert": ["lm_head"]},
    "CompressedTensorsConfig": {"format": "pack-quantized", "ignore": ["lm_head"], "dequantize": True},
    "TorchAoConfig": {"quant_type": "int8_weight_only", "modules_to_not_convert": ["lm_head"]},
    "QuarkConfig": {"quant_method": "quark", "export": {}},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_config_classes_need_no_library(name, enabled):
    kind = getattr(transformers, name)
    if not issubclass(kind, jq_torch.configs.Verbatim):
        pytest.skip(f"the method of {name} is not read, so its class is left alone")
    assert kind is getattr(jq_torch, name) and kind.__name__ == name
    config = kind(**ARGUMENTS[name])
    for key, value in ARGUMENTS[name].items():
        if name != "QuarkConfig" and hasattr(config, key):
            assert getattr(config, key) == value
    kept = set(ARGUMENTS[name]) - set(vars(config))
    assert not kept - {"format", "ignore", "nbits", "group_size", "axis", "load_in_4bit", "quant_method", "export"}
    json.loads(config.to_json_string())
    json.loads(config.to_json_string(use_diff=False))
    assert name in repr(config)
    assert config.to_diff_dict().items() <= config.to_dict().items() or name == "BitsAndBytesConfig"
    found = dict(config)
    assert found == config.to_dict()


@pytest.mark.parametrize("name", ["HqqConfig", "TorchAoConfig", "CompressedTensorsConfig", "AwqConfig"])
def test_names_imported_before(name):
    original = getattr(transformers, name)
    before = inspect.signature(original)
    with jq_torch.enable():
        with jq_torch.enable("hqq"):
            pass
        config = original(**ARGUMENTS[name])
        assert type(config) is getattr(transformers, name) is not original
        assert config.to_dict() == getattr(transformers, name)(**ARGUMENTS[name]).to_dict()
        assert isinstance(copy.deepcopy(config), original)
        file = {"quant_method": str(config.quant_method.value), "a key of the file": 1}
        assert original.from_dict(file).to_dict() == file
    assert inspect.signature(original) == before
    if name == "AwqConfig":
        assert type(original(bits=4)) is original
    else:
        with pytest.raises((ImportError, ValueError), match="install"):
            original(**ARGUMENTS[name])


def test_bitsandbytes_config_answers(enabled):
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert four.is_quantizable() and four.quantization_method() == "nf4"
    assert transformers.BitsAndBytesConfig(load_in_8bit=True).quantization_method() == "llm_int8"
    with pytest.raises(ValueError, match="load_in_4bit"):
        transformers.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)


def test_gptq_config_goes_through_optimum_and_back(enabled):
    config = transformers.GPTQConfig(bits=4, group_size=32)
    assert transformers.GPTQConfig.from_dict_optimum(config.to_dict_optimum()).to_dict() == config.to_dict()
    assert set(config.get_loading_attributes()) >= {"max_input_length"}
    with pytest.raises(ValueError, match="bits"):
        transformers.GPTQConfig(bits=5)


def _stored_configs():
    for name, folder in directories().items():
        file = folder / "config.json"
        found = json.loads(file.read_text()).get("quantization_config") if file.exists() else None
        if found and "quant_method" in found:
            yield pytest.param(found, id=name)


@pytest.mark.parametrize("stored", list(_stored_configs()))
def test_a_files_dict_comes_back_verbatim(stored, enabled):
    if stored["quant_method"] not in {m.removesuffix("_4bit").removesuffix("_8bit") for m in jq_torch.methods()}:
        pytest.skip(f"{stored['quant_method']} is not read")
    config = auto.AutoQuantizationConfig.from_dict(stored)
    assert config.to_dict() == stored and config.to_diff_dict() == stored
    assert json.loads(config.to_json_string()) == stored
    unused = config.update(nonsense=1)
    assert unused == {"nonsense": 1}


def test_loading_arguments_do_not_change_what_is_saved(enabled, tmp_path):
    """transformers asks AutoRoundConfig, by the name that it imported, for the file's config."""
    folder = directories().get("auto-round-gptq-g32-sym")
    if folder is None:
        pytest.skip("no reference directory")
    arguments = transformers.AutoRoundConfig(bits=4, backend="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=arguments)
    model.save_pretrained(tmp_path)
    found, want = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (tmp_path, folder))
    assert found == want
