"""ModelOpt: NVFP4, FP8 in its granularities, INT8 and mixed exports against plain numpy; both configs; errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same, held_bytes, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError, JqWarning, UnsupportedError
from jq.formats import base
from jq.formats.base import Context
from jq.formats.modelopt import FORMAT, parse

NAME = "model.layers.0.self_attn.q_proj"
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
# modelopt's own table: the code of -0 reads as +0.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def config(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["bfloat16", "float16", "float32"]), st.integers(0, 2**32))
def test_nvfp4(n, groups, dtype, seed):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n, 8 * groups)).astype(np.uint8)
    scale = np.abs(rng.standard_normal((n, groups)) * 50).astype(E4M3)
    whole = np.asarray(rng.uniform(1e-5, 1e-2), np.float32)
    parts = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": whole,
        "input_scale": np.asarray(0.01, np.float32),
    }
    q = read(FORMAT, {f"{NAME}.{k}": v for k, v in parts.items()}, config("NVFP4"), dtype)[NAME]
    values = FP4[np.stack([packed & 15, packed >> 4], -1).reshape(n, -1)]
    want = values * np.repeat(scale.astype(np.float32) * whole, 16, 1)
    assert_same(q.dequantize(), want.astype(BF16 if dtype == "bfloat16" else dtype))
    assert held_bytes(q) == sum(v.nbytes for v in parts.values())
    assert q.activation.parameters == ("input_scale",)


@pytest.mark.parametrize("shape", [(), (1,), (160,), (160, 1), (2, 3), (2, 1, 3, 1)], ids=str)
def test_fp8(shape):
    """One scale, one for each output, blocks of 128x128 (with or without their axes of one)."""
    rng = np.random.default_rng(len(shape))
    codes = rng.integers(0, 120, (160, 260)).astype(np.uint8)
    scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    tensors = {f"{NAME}.weight": codes.view(E4M3), f"{NAME}.weight_scale": scale}
    q = read(FORMAT, tensors, config("FP8_PB_WO"))[NAME]
    if scale.size == 6:
        full = np.repeat(np.repeat(scale.reshape(2, 3), 128, 0), 128, 1)[:160, :260]
    else:
        full = scale.reshape(-1, 1)
    assert_same(q.dequantize(), codes.view(E4M3).astype(BF16) * np.broadcast_to(full.astype(BF16), codes.shape))


def test_mixed_export_int8_and_mxfp8():
    rng = np.random.default_rng(5)
    ints, floats = rng.integers(-128, 128, (4, 8)).astype(np.int8), rng.integers(0, 120, (4, 64)).astype(np.uint8)
    scale, exponents = rng.uniform(0.1, 1, 4).astype(np.float32), rng.integers(120, 130, (4, 2)).astype(np.uint8)
    tensors = {"a.weight": ints, "a.weight_scale": scale, "b.weight": floats.view(E4M3), "b.weight_scale": exponents}
    layers = {"a": {"quant_algo": "W8A16"}, "b": {"quant_algo": "MXFP8", "group_size": 32}}
    found = read(FORMAT, tensors, config("MIXED_PRECISION", quantized_layers=layers))
    assert_same(found["a"].dequantize(), ints.astype(BF16) * scale.astype(BF16)[:, None])
    factor = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)
    assert_same(found["b"].dequantize(), (floats.view(E4M3).astype(np.float32) * factor).astype(BF16))
    assert found["a"].activation is None and found["b"].activation.get("pow2")


def test_config_of_the_side_file():
    class Checkpoint:
        def side_json(self, name):
            assert name == "hf_quant_config.json"
            return {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
            }

    assert parse(FORMAT.detect(Checkpoint()), Context()).algorithm == "FP8"


def test_configs_of_groups_and_of_the_cache_alone():
    """The kind of a weight, not its width alone; a model whose cache alone is quantized has plain weights."""
    for bits, kind, want in ((4, "int", "W4A16_AWQ"), (4, "float", "NVFP4"), (8, "int", "W8A8_SQ_PER_CHANNEL")):
        groups = {"group_0": {"weights": {"num_bits": bits, "type": kind}}}
        assert parse({"quant_method": "modelopt", "config_groups": groups}, Context()).algorithm == want
    cache = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}, "ignore": []}
    assert parse(cache, Context()).algorithm == "NONE"
    assert read(FORMAT, {f"{NAME}.weight": np.ones((2, 16), BF16)}, cache) == {}


def test_awq_scales_inputs_whether_they_are_quantized_or_not():
    rng = np.random.default_rng(4)
    parts = {
        "weight": rng.integers(0, 256, (6, 16)).astype(np.uint8),
        "weight_scale": np.ones((6, 2), E4M3),
        "weight_scale_2": np.asarray(0.5, np.float32),
        "pre_quant_scale": rng.uniform(0.5, 2, 32).astype(np.float32),
    }
    q = read(FORMAT, {f"{NAME}.{k}": v for k, v in parts.items()}, config("NVFP4_AWQ"), "float32")[NAME]
    x = rng.standard_normal((3, 32)).astype(np.float32)
    want = (x * parts["pre_quant_scale"]) @ np.asarray(q.dequantize()).T
    for quantize in (True, False):
        np.testing.assert_allclose(
            np.asarray(jq.matmul(x, q, quantize_activations=quantize)), want, rtol=1e-4, atol=1e-4
        )


def test_errors(monkeypatch):
    monkeypatch.setattr(base, "_warned", set())
    with pytest.raises(FormatError, match="no quant_algo"):
        parse({"quant_method": "modelopt"}, Context())
    with pytest.raises(UnsupportedError, match="quant_algo 'W4A16_GPTQ' is not read here"):
        parse(config("W4A16_GPTQ"), Context())
    good = {
        "weight": np.zeros((2, 8), np.uint8),
        "weight_scale": np.ones((2, 1), E4M3),
        "weight_scale_2": np.ones((), np.float32),
        "input_scale": np.ones((), np.float32),
    }
    without = {f"{NAME}.{k}": v for k, v in good.items() if k != "input_scale"}
    with pytest.warns(JqWarning, match="NVFP4 quantizes inputs by a stored input_scale; layers without one"):
        assert read(FORMAT, without, config("NVFP4"))[NAME].activation is None

    def fails(error, message, **change):
        tensors = {f"{NAME}.{k}": v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(error, match=message):
            read(FORMAT, tensors, config("NVFP4"))

    fails(FormatError, "q_proj.weight_scale_2: missing", weight_scale_2=None)
    fails(FormatError, r"q_proj.weight_scale: found shape \(3, 1\)", weight_scale=np.ones((3, 1), E4M3))
    fails(FormatError, "q_proj.weight_scale: found dtype float32", weight_scale=np.ones((2, 1), np.float32))
    fails(FormatError, "q_proj.weight_scale: no weight beside it", weight=None)
    fails(FormatError, r"pre_quant_scale: found shape \(8,\), expected \(16,\)", pre_quant_scale=np.ones(8, BF16))
    fails(FormatError, "q_proj.svdquant_lora_b: missing", svdquant_lora_a=np.ones((2, 16), BF16))
    low = {"svdquant_lora_a": np.ones((2, 16), BF16), "svdquant_lora_b": np.ones((3, 2), BF16)}
    fails(FormatError, r"a low-rank product of \(3, 2\) and \(2, 16\) for a weight of \(2, 16\)", **low)
    experts = {"m.experts.gate_up_proj_weight_scale": np.ones((2, 2, 1), E4M3)}
    with pytest.raises(UnsupportedError, match="gate_up_proj_weight_scale: experts that are stored as one tensor"):
        read(FORMAT, experts, config("NVFP4"))
    fails(FormatError, "float8 without .*weight_scale", weight=np.ones((2, 16), E4M3), weight_scale=None)


def test_quantize():
    """A negative value that rounds to zero gets the code of -0; a block of zeros the scale 1."""
    w = np.random.default_rng(2).standard_normal((3, 32)).astype(BF16)
    w[0, :16] = 0
    w[1, 0] = -1e-4
    q = jq.NVFP4().quantize(w, NAME)
    x = w.astype(np.float32)
    whole = np.abs(x).max() / np.float32(2688)
    assert np.asarray(q.global_scale) == whole
    scales = np.asarray(q.block_scales())
    assert scales[0, 0] == 1 and np.asarray(q.unpack())[1, 0] == 8
    for i in range(3):
        for g in range(2):
            part = x[i, 16 * g : 16 * g + 16]
            want = np.float32(np.abs(part).max() / (np.float32(6) * whole)).astype(E4M3).astype(
                np.float32
            ) or np.float32(1)
            assert scales[i, g] == want
            nearest = np.abs(part[:, None] / (want * whole) - FP4[None, :]).min(1)
            got = np.abs(part / (want * whole) - FP4[np.asarray(q.unpack())[i, 16 * g : 16 * g + 16]])
            np.testing.assert_allclose(got, nearest, atol=1e-5)
    parts = {f"{NAME}.{k}": v for k, v in FORMAT.dump(q).items()}
    assert_same(read(FORMAT, parts, jq.NVFP4().config(["lm_head"]))[NAME].dequantize(), q.dequantize())


def test_int4_awq():
    """Two output rows to a byte, the even one in the low nibble, as `pack_int4_in_uint8` of modelopt lays them out."""
    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 8, (6, 256))
    stored = np.zeros((3, 256), np.uint8)
    for r in range(3):
        stored[r] = (codes[2 * r] & 15) | (codes[2 * r + 1] & 15) << 4
    scale = rng.random((6, 2)).astype(np.float32)
    parts = {f"{NAME}.weight": stored, f"{NAME}.weight_scale": scale}
    want = (codes.astype(np.float32) * np.repeat(scale, 128, axis=1)).astype(BF16)
    q = read(FORMAT, parts, config("W4A16_AWQ"))[NAME]
    assert_same(q.dequantize(), want)
    parts[f"{NAME}.pre_quant_scale"] = rng.random(256).astype(BF16)
    prepared = read(FORMAT, parts, config("w4a16_awq"))[NAME]
    x = rng.standard_normal((3, 256)).astype(np.float32)
    y = (x * parts[f"{NAME}.pre_quant_scale"].astype(np.float32)) @ want.astype(np.float32).T
    np.testing.assert_allclose(np.asarray(jq.matmul(x, prepared)), y, rtol=1e-4, atol=1e-4)


def test_static_int8_inputs():
    rng = np.random.default_rng(5)
    parts = {
        f"{NAME}.weight": rng.integers(-128, 128, (8, 64)).astype(np.int8),
        f"{NAME}.weight_scale": rng.random(8).astype(np.float32),
        f"{NAME}.input_scale": np.asarray(0.03, np.float32),
    }
    q = read(FORMAT, parts, config("W8A8_SQ_PER_CHANNEL"))[NAME]
    x = rng.standard_normal((5, 64)).astype(np.float32)
    rounded = np.clip(np.rint(x / np.float32(0.03)), -128, 127) * np.float32(0.03)
    want = rounded @ np.asarray(q.dequantize("float32")).T
    np.testing.assert_allclose(np.asarray(jq.matmul(x, q)), want, rtol=1e-3, atol=0.1)
