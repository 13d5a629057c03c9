"""`jq.convert`: every pair of integer formats that can hold each other's weights, and the reasons where they cannot."""

from __future__ import annotations

import itertools
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_dirs import bits, directories

import jq
from jq.errors import UnsupportedError
from jq.formats import gptq
from jq.formats.integer_targets import TARGETS
from jq.formats.integers import integers_of

TO = {
    "v1": jq.GPTQ(checkpoint_format="gptq"),
    "v2": jq.GPTQ(checkpoint_format="gptq_v2"),
    "planar": jq.GPTQ(checkpoint_format="gptq_p"),
    "gptq": jq.GPTQ(),
    "gemm": jq.AWQ(),
    "gemv": jq.AWQ(version="gemv"),
    "packed": "compressed-tensors",
}


def same_weights(a, b):
    first, second = jq.quantized(a), jq.quantized(b)
    assert first.keys() == second.keys()
    for path, q in first.items():
        x, y = np.asarray(q.dequantize()), np.asarray(second[path].dequantize())
        assert x.dtype == y.dtype and np.array_equal(bits(x), bits(y)), path


def state_of(weights, **config):
    return jq.State(
        {f"{name}.weight": q for name, q in weights.items()},
        {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4, **config}},
    )


def weight(rng, b=4, k=128, n=64, group=32, sym=False, order=False, dtype=np.float16, least=1, **storage):
    groups = -(-k // group)
    zeros = 1 << (b - 1) if sym else rng.integers(least, 1 << b, (n, groups))
    index = rng.permutation(np.arange(k) // group).astype(np.int32) if order else None
    scales = rng.normal(size=(n, groups)).astype(dtype)
    codes = rng.integers(0, 1 << b, (n, k))
    return gptq.build(codes, scales, zeros, bits=b, group_size=group, g_idx=index, **storage)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((32, 64, 128)),
    st.booleans(),
    st.sampled_from((np.float16, ml_dtypes.bfloat16)),
    st.integers(0, 2**32 - 1),
)
def test_every_pair_gives_the_same_weights_and_comes_back(b, group, sym, dtype, seed):
    rng = np.random.default_rng(seed)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    state = state_of({name: weight(rng, b, 128, 64, group, sym, dtype=dtype) for name in names})
    targets = [t for t in TO if b == 4 or t != "gemv"]
    made = {t: jq.convert(state, None, TO[t]) for t in targets}
    for t in targets:
        same_weights(state, made[t])
    for one, two in itertools.permutations(targets, 2):
        back = jq.convert(made[one], None, TO[two])
        stored = {name: array.tobytes() for name, array in back.stored()}
        assert stored == {name: array.tobytes() for name, array in made[two].stored()}, (one, two)
        assert back.config == made[two].config


@pytest.mark.parametrize(
    "source", [n for n in directories() if n.startswith(("gptq", "awq", "auto-round", "ct-w4a16"))]
)
def test_reference_directories(source, tmp_path):
    """What the original libraries wrote, in every other storage that can hold it, saved and loaded again."""
    state = jq.load_state(directories()[source])
    done = 0
    for name, to in TO.items():
        try:
            jq.convert(state, tmp_path / name, to)
        except UnsupportedError as e:
            assert re.search(r"act\.scales|g_idx|floats|2 bits|3 bits|8 bits|lm_head|groups of", str(e)), e
            continue
        again = jq.load_state(tmp_path / name)
        same_weights(state, again)
        assert not any(f.name.startswith("quant") for f in (tmp_path / name).iterdir())
        dense = {k for k in state if k not in {p + ".weight" for p in jq.quantized(state)}}
        for key in dense:
            assert np.asarray(again[key]).tobytes() == np.asarray(state[key]).tobytes(), key
        done += 1
    assert done or "fast" in source or "llm_awq" in source


def refused(state, to, text):
    with pytest.raises(UnsupportedError, match=text):
        jq.convert(state, None, to)


def test_reasons():
    rng = np.random.default_rng(0)
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    refused(
        state_of({q: weight(rng, order=True)}),
        jq.AWQ(),
        r"q_proj: has an activation order \(g_idx\), which AWQ cannot store",
    )
    refused(state_of({q: weight(rng, 8)}), jq.AWQ(version="gemv"), r"q_proj: 8 bits; AWQ gemv has 4")
    refused(state_of({q: weight(rng)}), jq.AWQ(version="gemv_fast"), r"AWQ 'gemv_fast': its kernels compute fma")
    refused(
        state_of({q: weight(rng, k=160, group=64)}),
        jq.AWQ(),
        r"q_proj: in_features 160 is not a multiple of group_size 64",
    )
    refused(
        state_of({q: weight(rng, k=160, group=64)}),
        "compressed-tensors",
        r"in_features 160 is not a multiple of group_size 64",
    )
    refused(state_of({q: weight(rng), down: weight(rng, group=64)}), jq.AWQ(), r"modules have groups of \[32, 64\]")
    refused(state_of({q: weight(rng), down: weight(rng, 8)}), jq.AWQ(), r"modules have \[4, 8\] bits")
    refused(state_of({"lm_head": weight(rng)}), jq.AWQ(), r"lm_head: is quantized; readers of AWQ keep it in float")
    refused(
        state_of({q: weight(rng, group=16)}),
        jq.AWQ(version="gemv"),
        r"groups of 16; AWQ gemv reserves words for groups of 32",
    )
    refused(
        state_of({q: weight(rng)}),
        jq.AWQ(zero_point=False),
        r"q_proj: has zero points; zero_point=False is for symmetric",
    )
    refused(
        state_of({q: weight(rng)}), jq.GPTQ(bits=8), r"q_proj: has bits 4, GPTQ asks for 8; convert changes no weight"
    )
    refused(state_of({q: weight(rng)}), jq.AWQ(group_size=64), r"q_proj: has group_size 32, AWQ asks for 64")
    refused(state_of({q: weight(rng)}), jq.NF4(), r"can be re-encoded as gptq, awq, compressed-tensors")
    refused(state_of({q: weight(rng)}), jq.W8A16(), r"q_proj: has 4 bits, preset W8A16 has 8")
    refused(
        state_of({q: weight(rng, n=60)}), jq.AWQ(), r"q_proj: out_features 60 does not fill words of 32 bits at 4 bits"
    )
    zero = weight(rng, least=0, n=256)
    refused(state_of({q: zero}), TO["v1"], r"q_proj: has zero points of 0, which readers of GPTQ v1")
    named = state_of({q: zero}, meta={"quantizer": ["gptqmodel:7.7.0"]})
    made = jq.convert(named, None, TO["v1"])  # its own reader subtracts on whole words
    same_weights(named, made)
    assert made.config["quantization_config"]["meta"] == {"quantizer": ["gptqmodel:7.7.0"]}
    refused(
        jq.State({"a.weight": np.zeros((2, 2), np.float32)}),
        jq.AWQ(),
        "holds no quantized weights; jq.quantize makes them",
    )
    refused(
        state_of({q: jq.NF4().quantize(np.ones((32, 64), np.float32))}),
        jq.AWQ(),
        r"q_proj: Codebook.* is no integer weight",
    )
    refused(
        state_of({q: jq.Int8().quantize(np.ones((32, 64), np.float32))}),
        jq.GPTQ(),
        r"q_proj: its inputs are quantized too",
    )
    refused(state_of({q: weight(rng, dtype=np.float32).replace(source=None)}), jq.AWQ(), r"q_proj: scales are float32")
    halves = weight(rng).replace(zeros=np.full((64, 4), 7.5, np.float16), zeros_bits=0)
    refused(state_of({q: halves}), jq.AWQ(), r"q_proj: zero points are floats")


def test_mixed_modules_become_rules():
    rng = np.random.default_rng(0)
    weights = {
        "model.layers.0.self_attn.q_proj": weight(rng, 4, group=32, sym=True),
        "model.layers.0.mlp.down_proj": weight(rng, 8, group=64, sym=True),
        "lm_head": weight(rng, 4, group=128, sym=True, order=True),
    }
    state = state_of(weights)
    made = jq.convert(state, None, TO["v2"])
    config = made.config["quantization_config"]
    assert config["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"] == {"bits": 8, "group_size": 64}
    assert config["lm_head"] is True and config["sym"] is True
    same_weights(state, jq.convert(made, None, "compressed-tensors"))
    groups = jq.convert(made, None, "compressed-tensors").config["quantization_config"]["config_groups"]
    assert len(groups) == 3 and groups["group_0"]["targets"] == ["model.layers.0.self_attn.q_proj"]


def test_converted_files_load_again(tmp_path):
    """Rules, groups and act order survive the files, not only memory."""
    rng = np.random.default_rng(0)
    state = state_of(
        {
            "model.layers.0.self_attn.q_proj": weight(rng, 4, group=32, order=True),
            "model.layers.0.mlp.down_proj": weight(rng, 8, k=64, group=64),
        }
    )
    for name in ("v2", "packed"):
        jq.convert(state, tmp_path / name, TO[name])
        same_weights(state, jq.load_state(tmp_path / name))


def test_nothing_is_written_where_it_fails(tmp_path):
    rng = np.random.default_rng(0)
    refused(state_of({"a.q_proj": weight(rng, order=True)}), jq.AWQ(), "g_idx")
    with pytest.raises(UnsupportedError):
        jq.convert(state_of({"a.q_proj": weight(rng, order=True)}), tmp_path / "out", jq.AWQ())
    assert not (tmp_path / "out").exists()


def test_targets_are_formats():
    assert set(TARGETS) <= set(jq.formats())
    parts = integers_of(weight(np.random.default_rng(0)), "m")
    assert parts.codes.min() >= 0 and parts.summary.group_size == 32


@pytest.mark.parametrize(("source", "version"), [("awq-gemv_fast-g32", "llm-awq"), ("awq-llm_awq-g64", "gemv_fast")])
def test_storages_of_one_kernel_change_names_only(source, version, tmp_path):
    if source not in directories():
        pytest.skip(f"{source} is not at hand")
    state = jq.load_state(directories()[source])
    made = jq.convert(state, tmp_path, jq.AWQ(version=version))
    again = jq.load_state(tmp_path)
    same_weights(state, again)
    name = "scaled_zeros" if version == "llm-awq" else "qzeros"
    stored = dict(again.stored())
    assert any(key.endswith(f".{name}") for key in stored)
    assert again.config["quantization_config"] == made.config["quantization_config"]


def test_a_config_in_a_part_of_the_model_is_replaced(tmp_path):
    """Models of two towers name the method in `text_config`."""
    source = jq.load_state(directories()["gptq-4-g32-sym-descact"])
    part = {"hidden_size": 128, "quantization_config": source.config.pop("quantization_config")}
    nested = source.with_tensors(dict(source), {"model_type": "two_towers", "text_config": part})
    jq.save(nested, tmp_path / "nested")
    with pytest.raises(UnsupportedError, match="is quantized already"):
        jq.quantize(tmp_path / "nested", jq.NF4())
    made = jq.convert(tmp_path / "nested", tmp_path / "out", jq.GPTQ(checkpoint_format="gptq_v2"))
    assert made.config["text_config"] == {"hidden_size": 128}
    assert made.config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert made.config["quantization_config"]["quant_method"] == "gptq"
    for path, q in jq.quantized(jq.load_state(tmp_path / "out")).items():
        np.testing.assert_array_equal(bits(q.dequantize()), bits(source[f"{path}.weight"].dequantize()), err_msg=path)
