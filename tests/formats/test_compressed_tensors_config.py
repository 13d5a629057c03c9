"""compressed-tensors: which scheme a module has, and configs that contradict themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import compressed_tensors_config as config
from format_reading import named, read

from jq.errors import FormatError
from jq.formats.base import Context
from jq.formats.compressed_tensors import FORMAT
from jq.formats.compressed_tensors_config import PRESETS, parse

NAME = "model.layers.0.self_attn.q_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
E4M3 = ml_dtypes.float8_e4m3fn


def options_with(groups, ignore=()):
    return parse({"config_groups": groups, "ignore": list(ignore)}, Context())


def test_targets_exact_before_regex_before_class():
    """The library sorts names before regexes before classes, each as strings: not in the order of the config."""

    def group(bits, *targets):
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}

    options = options_with(
        {"a": group(8, "Linear"), "b": group(3, "re:.*proj$"), "c": group(2, "re:.*k_proj"), "d": group(4, "m.q_proj")},
        ["re:.*lm_head", "m.skip", "Embedding"],
    )

    def bits(name):
        found = options.group_of(name)
        return None if found is None else found.weights.num_bits

    assert [bits(n) for n in ("m.q_proj", "m.v_proj", "m.k_proj", "m.gate")] == [4, 3, 2, 8]
    assert [bits(n) for n in ("lm_head", "m.skip", "model.embed_tokens")] == [None, None, None]
    assert bits("m.o_proj_extra") == 8  # "re:.*proj$" is anchored by its own $
    assert bits("m.k_proj_extra") == 2  # a regex without one is a prefix match


def test_ignored_module_that_is_quantized_all_the_same():
    parts = {"weight": np.ones((2, 4), E4M3), "weight_scale": np.ones((2, 1), np.float32)}
    cfg = config({"num_bits": 8, "type": "float", "strategy": "channel"}, form="float-quantized")
    assert list(read(FORMAT, named(parts, "lm_head"), cfg)) == ["lm_head"]


def test_preset_with_targets():
    options = options_with({"FP8_dynamic": ["re:.*mlp.*"], "w4a16": ["Linear"]})
    assert options.groups[0].weights.strategy == "channel" and options.groups[0].inputs.strategy == "token"
    assert options.groups[1].weights.group_size == 128
    assert len(PRESETS) == 33


def test_config_nested_one_level_deeper():
    inner = config({"num_bits": 4, "group_size": -1})
    options = parse({"quant_method": "compressed-tensors", "quantization_config": inner}, Context())
    assert options.groups[0].weights.strategy == "channel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 9}, "num_bits 9"),
        ({"num_bits": 5, "type": "float"}, "num_bits 5"),
        ({"strategy": "rows"}, "strategy 'rows'"),
        ({"strategy": "group", "group_size": None}, "needs a positive group_size"),
        ({"strategy": "block"}, "needs a block_structure"),
        ({"actorder": "columns"}, "actorder 'columns'"),
        ({"nonsense": 1}, "unknown key 'nonsense'"),
        ({"dynamic": "sometimes"}, "dynamic is 'sometimes'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(FormatError, match=message):
        parse(config({"num_bits": 4, **change}), Context())


def test_bad_config():
    with pytest.raises(FormatError, match="preset 'W9A1' is not known"):
        options_with({"W9A1": ["Linear"]})
    with pytest.raises(FormatError, match="format 'zip' is not known"):
        parse(config({"num_bits": 4}, form="zip"), Context())
