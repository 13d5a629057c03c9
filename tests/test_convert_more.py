"""`jq.convert` to and from HQQ, torchao, quanto and EETQ: the same weights to the bit, saved and loaded again."""

from __future__ import annotations

import ml_dtypes
import mutations
import numpy as np
import pytest

import jq
from jq.errors import UnsupportedError
from jq.formats import gptq
from jq.formats.integer_codes import linear_tag

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def state_of(bits, group, dtype, symmetric=False, names=NAMES):
    rng = np.random.default_rng(bits)
    n, k = 64, 128
    groups = k // group
    weights = {}
    for name in names:
        zeros = 1 << (bits - 1) if symmetric else rng.integers(1, 1 << bits, (n, groups))
        scales = rng.normal(size=(n, groups)).astype(dtype)
        storage = {"storage": "gptq_p"} if bits in (5, 6, 7) else {"storage": "gptq_v2", "zeros_rule": "v2"}
        q = gptq.build(
            rng.integers(0, 1 << bits, (n, k)), scales, zeros, bits=bits, group_size=group,
            g_idx=None, **{"zeros_rule": "v2", **storage},
        )  # fmt: skip
        weights[f"{name}.weight"] = q
    return jq.State(weights, {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": bits}})


def same(a, b):
    first, second = jq.quantized(a), jq.quantized(b)
    assert first.keys() == second.keys()
    for name, q in first.items():
        x, y = np.asarray(q.dequantize()), np.asarray(second[name].dequantize())
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("to", ("hqq", "torchao"))
@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_there_and_back(bits, dtype, to, tmp_path):
    for group in (32, 128):
        state = state_of(bits, group, dtype)
        folder = tmp_path / f"{group}"
        same(state, jq.convert(state, folder, to))
        made = jq.load_state(folder)
        same(state, made)
        assert made.config["quantization_config"]["quant_method"] == to
        for back in (jq.GPTQ(checkpoint_format="gptq_v2"), "compressed-tensors", "torchao", "hqq"):
            again = jq.convert(made, None, back)
            same(state, again)


@pytest.mark.parametrize("to", ("quanto", "eetq", "hqq", "torchao"))
def test_symmetric_bytes_by_channel(to, tmp_path):
    state = state_of(8, 128, np.float16, symmetric=True)
    same(state, jq.convert(state, tmp_path / to, to))
    made = jq.load_state(tmp_path / to)
    same(state, made)
    same(state, jq.convert(made, None, jq.GPTQ()))


@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16))
@pytest.mark.parametrize("bits", (2, 4))
def test_quanto_holds_integer_shifts(bits, dtype, tmp_path):
    """Where a group is the one that quanto takes for the row: optimum-quanto 0.2.7 loads these as `qint4`, `qint2`."""
    state = state_of(bits, 128, dtype)
    state.config |= {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 128}
    same(state, jq.convert(state, tmp_path / "made", "quanto"))
    made = jq.load_state(tmp_path / "made")
    same(state, made)
    assert made.config["quantization_config"]["weights"] == f"int{bits}"
    for back in (jq.GPTQ(checkpoint_format="gptq_v2"), "hqq", "quanto"):
        same(state, jq.convert(made, None, back))


def test_gemma_becomes_integers(tmp_path):
    """dt(code - 8) * dt(scale), with no ranges of activations, is an integer weight."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name in NAMES:
        tensors[f"{name}.weight"] = rng.integers(0, 256, (64, 64), np.uint8)
        tensors[f"{name}.weight_scale"] = rng.random((64, 1), np.float32)
        for side in ("input", "output"):
            tensors[f"{name}.{side}_activation_scale"] = np.zeros((), np.float32)
    config = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": 128, "num_attention_heads": 4}
    mutations.write(tmp_path, tensors, config | {"quantization_config": {"quant_method": "gemma"}}, {}, {})
    state = jq.load_state(tmp_path)
    for to in (jq.GPTQ(), "awq", "compressed-tensors", "hqq", "torchao", "quanto"):
        same(state, jq.convert(state, None, to))


def test_modules_that_differ_are_named_in_the_config():
    mixed = {**state_of(4, 32, np.float16, names=NAMES[:2])}
    mixed |= state_of(8, 64, np.float16, names=NAMES[2:])
    state = jq.State(mixed, {"quantization_config": {"quant_method": "gptq"}})
    kinds = jq.convert(state, None, "hqq").config["quantization_config"]["quant_config"]
    assert {tag: kind["weight_quant_params"]["nbits"] for tag, kind in kinds.items()} == {
        "self_attn.q_proj": 4,
        "mlp.down_proj": 8,
    }
    rules = jq.convert(state, None, "torchao").config["quantization_config"]["quant_type"]["default"]
    assert rules["_type"] == "FqnToConfig" and set(rules["_data"]["fqn_to_config"]) == set(NAMES)
    assert linear_tag(NAMES[1]) == "self_attn.q_proj"


@pytest.mark.parametrize(
    "state, to, text",
    (
        (state_of(4, 32, np.float16), "quanto", r"q_proj: groups of 32; quanto has 128 for in_features 128"),
        (state_of(8, 32, np.float16), "quanto", r"q_proj: quanto stores symmetric 8-bit weights by output channel"),
        (state_of(3, 128, np.float16), "quanto", r"q_proj: 3 bits; quanto has 8, 4 and 2"),
        (state_of(4, 128, np.float16), jq.Quanto("int8"), r"q_proj: has 4 bits, Quanto.* asks for qint8"),
        (state_of(8, 128, ml_dtypes.bfloat16, symmetric=True), "eetq", r"q_proj: scales are bfloat16, EETQ's are float16"),
        (state_of(5, 32, np.float16, names=NAMES[:1]), jq.HQQ(axis=0), r"q_proj: groups lie along in_features; HQQ axis 0"),
        (state_of(4, 32, np.float16), jq.HQQ(8, group_size=32), r"has 4 bits in groups of 32, HQQ asks for 8"),
        (state_of(4, 32, np.float16), jq.TorchAO(), r"only torchao's 'intx_weight_only' class"),
    ),
)  # fmt: skip
def test_reasons(state, to, text):
    with pytest.raises(UnsupportedError, match=text):
        jq.convert(state, None, to)
