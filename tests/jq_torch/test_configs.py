"""Our config classes beside transformers' own: the same arguments, defaults, methods and dicts."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from transformers.quantizers import auto
from transformers.utils import quantization_config as hf

import jq_torch
from jq_torch import configs

ORIGINALS = {c.__name__: c for c in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.values()}
METHODS = ("post_init", "from_dict", "to_dict", "to_diff_dict", "to_json_string", "to_json_file", "update")
BY_CLASS = {
    "BitsAndBytesConfig": ("is_quantizable", "quantization_method", "post_init"),
    "GPTQConfig": ("to_dict_optimum", "from_dict_optimum", "get_loading_attributes", "post_init"),
    "AwqConfig": ("get_loading_attributes", "post_init"),
    "CompressedTensorsConfig": ("get_loading_attributes", "is_quantized", "is_quantization_compressed"),
    "FbgemmFp8Config": ("get_loading_attributes",),
}
ARGUMENTS: dict[str, list[dict]] = {
    "AqlmConfig": [{}, {"in_group_size": 16, "linear_weights_not_to_quantize": ["lm_head.weight"]}],
    "VptqConfig": [{}, {"shared_layer_config": {"q_proj": {}}, "modules_to_not_convert": ["lm_head"]}],
    "AwqConfig": [{}, {"bits": 4, "group_size": 64, "zero_point": False, "modules_to_not_convert": ["lm_head"]}],
    "EetqConfig": [{}, {"modules_to_not_convert": ["lm_head"]}],
    "GPTQConfig": [
        {"bits": 4},
        {"bits": 8, "group_size": -1, "desc_act": True, "dataset": ["a text"], "backend": "gptq_torch"},
    ],
    "BitsAndBytesConfig": [
        {},
        {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True, "llm_int8_skip_modules": ["lm_head"]},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    ],
    "HqqConfig": [
        {},
        {"nbits": 3, "group_size": 128, "view_as_float": True, "axis": 0, "skip_modules": ["lm_head", "o_proj"]},
        {"dynamic_config": {"self_attn.q_proj": {"nbits": 8, "group_size": 64, "quant_zero": True}}},
    ],
    "FbgemmFp8Config": [{}, {"activation_scale_ub": 600.0}],
    "QuantoConfig": [{}, {"weights": "int4", "activations": "int8"}],
    "CompressedTensorsConfig": [{}],
    "TorchAoConfig": [],
    "FineGrainedFP8Config": [{}, {"weight_block_size": (64, 64)}],
    "BitNetQuantConfig": [{}, {"linear_class": "autobitlinear", "use_rms_norm": True}],
    "Mxfp4Config": [{}, {"dequantize": True}],
    "AutoRoundConfig": [{}, {"bits": 3, "group_size": 32, "sym": False}],
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_arguments_and_methods_of_the_original(name):
    original, ours = ORIGINALS[name], configs.replacement(ORIGINALS[name])
    assert ours.__name__ == name and issubclass(ours, original)
    want, got = (inspect.signature(kind.__init__).parameters for kind in (original, ours))
    documented = set(re.findall(r"^\s{4,8}(\w+) \(`", original.__doc__ or "", re.M))
    assert set(want) | documented <= set(got)
    different = {n for n, p in want.items() if got[n].default != p.default} - {
        "skip_modules"
    }  # there a list, here None
    assert not different
    for method in (*(m for m in METHODS if hasattr(original, m)), *BY_CLASS.get(name, ())):
        assert hasattr(ours, method), method


@pytest.mark.parametrize("name", ARGUMENTS)
def test_dicts_of_the_original(name):
    """Runs for every class where the originals' libraries are installed, for the others without."""
    original, ours = ORIGINALS[name], configs.replacement(ORIGINALS[name])
    for arguments in ARGUMENTS[name]:
        try:
            want = original(**arguments)
        except ImportError as e:
            pytest.skip(f"the original refuses: {e}")
        got = ours(**arguments)
        assert got.to_dict() == want.to_dict()
        assert got.to_diff_dict() == want.to_diff_dict()
        assert json.loads(got.to_json_string()) == json.loads(want.to_json_string())
        assert vars(want).keys() <= vars(got).keys()
        again = ours.from_dict(got.to_dict())
        assert again.to_dict() == got.to_dict()
        if hasattr(original, "get_loading_attributes"):
            assert got.get_loading_attributes() == want.get_loading_attributes()


@pytest.mark.parametrize(
    "wrong",
    [
        ("GPTQConfig", {"bits": 5}),
        ("GPTQConfig", {"bits": 4, "group_size": 0}),
        ("GPTQConfig", {"bits": 4, "damp_percent": 2}),
        ("GPTQConfig", {"bits": 4, "dataset": "no-such-set"}),
        ("AwqConfig", {"backend": "no-such-backend"}),
        ("BitsAndBytesConfig", {"load_in_4bit": "yes"}),
        ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_storage": "add"}),
        ("BitsAndBytesConfig", {"llm_int8_threshold": "6"}),
        ("QuantoConfig", {"weights": "int3"}),
        ("QuantoConfig", {"activations": "int4"}),
        ("EetqConfig", {"weights": "int4"}),
        ("HqqConfig", {"axis": 2}),
        ("HqqConfig", {"nbits": 7}),
        ("AqlmConfig", {"in_group_size": "8"}),
        ("FineGrainedFP8Config", {"activation_scheme": "none"}),
    ],
    ids=str,
)
def test_values_that_no_library_knows(wrong):
    name, arguments = wrong
    with pytest.raises((ValueError, TypeError)):
        configs.replacement(ORIGINALS[name])(**arguments)


def test_enabled_names_are_the_replacements(enabled):
    for key in set(jq_torch.methods()) & set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        name = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[key].__name__
        if name not in ORIGINALS:  # a method that jq alone knows
            continue
        assert getattr(hf, name) is configs.replacement(ORIGINALS[name]) is getattr(jq_torch, name)
