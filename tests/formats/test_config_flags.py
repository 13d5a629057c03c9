"""A word where a quantization_config has true or false: an error that names the key, in every format."""

import pytest

from jq.errors import FormatError
from jq.formats import table
from jq.formats.base import Context, true_or_false

ARGS = {"num_bits": 4, "type": "int"}
QUARK = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0}
CONFIGS = [
    *(("gptq", {"bits": 4, key: "no"}, f"quantization_config.{key}") for key in ("desc_act", "sym", "lm_head")),
    ("gptq", {"bits": 4, "dynamic": {"a": {"sym": "no"}}}, "dynamic 'a'.sym"),
    ("qqq", {"desc_act": "no"}, "quantization_config.desc_act"),
    ("awq", {"zero_point": "no"}, "quantization_config.zero_point"),
    ("paroquant", {"sym": "no"}, "quantization_config.sym"),
    ("bitsandbytes", {"load_in_4bit": "no"}, "quantization_config.load_in_4bit"),
    ("bitnet", {"use_rms_norm": "no"}, "quantization_config.use_rms_norm"),
    ("fp_quant", {"pseudoquantization": "no"}, "quantization_config.pseudoquantization"),
    ("fouroversix", {"weight_scale_2d": "no"}, "quantization_config.weight_scale_2d"),
    ("auto_round", {"bits": 4, "data_type": "mx_fp", "act_dynamic": "no"}, "quantization_config.act_dynamic"),
    ("compressed_tensors", {"config_groups": {"g": {"weights": {**ARGS, "symmetric": "no"}}}}, "g: weights.symmetric"),
    ("compressed_tensors", {"config_groups": {"g": {"weights": {**ARGS, "dynamic": "no"}}}}, "g: weights.dynamic"),
    ("quark", {"global_quant_config": {"weight": {**QUARK, "symmetric": "no"}}}, "weight.symmetric"),
]


@pytest.mark.parametrize(("name", "config", "where"), CONFIGS)
def test_a_word_is_no_flag(name, config, where):
    fmt = next(f for f in table().values() if f.name.replace("-", "_") == name)
    with pytest.raises(FormatError, match=rf"here.*{where.replace('.', '[.]')} is 'no', expected true or false"):
        fmt.parse(config, Context(label="here"))


@pytest.mark.parametrize("value", [[], {}, 2, 0.5, "true"])
def test_only_truth_values_count(value):
    with pytest.raises(FormatError, match=r"there[.]key is "):
        true_or_false({"key": value}, "key", "there")


def test_truth_values_and_defaults():
    for value, expected in ((True, True), (1, True), (False, False), (0, False)):
        assert true_or_false({"key": value}, "key", "") is expected
    for config in ({}, {"key": None}):
        assert true_or_false(config, "key", "") and not true_or_false(config, "key", "", default=False)
