"""AutoRound exports: which storage a packing_format means, exceptions by module, checkpoints without a config."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jq
from jq import safetensors_file
from jq.errors import FormatError, UnsupportedError
from jq.formats import auto_round, awq, awq_words, gptq
from jq.formats.base import Context


def parse(**config):
    return auto_round.parse({"bits": 4, "group_size": 32, **config}, Context(label="here"))


@pytest.mark.parametrize(
    ("packing", "storage"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_round:gptqmodel", "own"),  # inference/backend.py of 0.16.1: GPTQ_FORMAT_NO_ZP
        ("auto", "gptq"),
        ("auto_round:gptq:exllamav2", "gptq"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
        ("auto_round", "own"),
        ("auto_round:exllamav2", "own"),
        ("auto_round:triton", "own"),
    ],
)
def test_packing(packing, storage):
    assert parse(packing_format=packing).storage == storage
    assert parse(backend=packing).storage == storage


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"data_type": "gguf"}, UnsupportedError, "AutoRound's data_type 'gguf' is not read"),
        ({"packing_format": "auto_round:llm_compressor"}, UnsupportedError, "packing_format 'auto_round:llm_compressor'"),
        ({"act_bits": 8}, UnsupportedError, "8-bit activations"),
        ({"packing_format": "mlx"}, UnsupportedError, "packing_format 'mlx'"),
        ({"bits": None}, FormatError, "quantization_config.bits is missing"),
        ({"bits": 5}, UnsupportedError, "AutoRound with 5 bits"),
        ({"extra_config": [1]}, FormatError, "extra_config is list"),
        ({"packing_format": "four"}, UnsupportedError, "packing_format 'four'"),
        ({"packing_format": [1]}, UnsupportedError, "says nothing of the zero points"),
        ({"sym": "false"}, FormatError, "sym is 'false', expected true or false"),
    ],
)  # fmt: skip
def test_refusals(config, error, text):
    with pytest.raises(error, match=text):
        parse(**config)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"(": {"bits": 4}}, r"extra_config: '\(' is neither a module nor a regular expression"),
        ({"a": 5}, r"extra_config\['a'\] is 5, expected an object"),
        ({"a": {"sym": "false"}}, "sym is 'false', expected true or false"),
    ],
)
def test_bad_extra_config(extra, text):
    with pytest.raises(FormatError, match=text):
        parse(bits=4, group_size=32, sym=True, extra_config=extra)


def test_extra_config():
    o = parse(
        extra_config={"lm_head": {"bits": 8, "group_size": -1}, ".*k_proj": {"sym": False}, "model.x": {"bits": 16}}
    )
    assert (o.of("lm_head").bits, o.of("lm_head").group_size) == (8, -1)
    assert o.of("model.layers.1.self_attn.k_proj").sym is False
    assert o.of("model.layers.1.self_attn.q_proj") == o


@pytest.mark.parametrize(("packing", "rule"), [("auto_round:auto_gptq", "v1-field"), ("auto_round", "v2")])
def test_zero_points_of_both_gptq_arrangements(packing, rule):
    rng = np.random.default_rng(0)
    zeros = rng.integers(1, 16, (32, 2))
    q = gptq.build(
        rng.integers(0, 16, (32, 64)),
        rng.random((32, 2)).astype(np.float16),
        zeros,
        bits=4,
        group_size=32,
        zeros_rule=rule,
    )
    parts = gptq.dump(q)
    del parts["g_idx"]
    again = auto_round.load("m.q_proj", parts, parse(packing_format=packing, sym=False), Context())
    np.testing.assert_array_equal(again.group_zeros(), zeros)
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
    stored = auto_round.dump(again)
    assert stored.keys() == parts.keys() and all(np.array_equal(stored[k], parts[k]) for k in parts)


def write(folder, tensors, config=None, **sides):
    """A checkpoint directory of numpy tensors."""
    folder.mkdir(exist_ok=True)
    items = [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()]
    safetensors_file.write(folder / "model.safetensors", items, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, content in sides.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def modules(q, name="model.layers.0.mlp.up_proj"):
    dump = awq.dump if q.source.format == "awq" else gptq.dump
    return {f"{name}.{suffix}": np.asarray(array) for suffix, array in dump(q).items()}


def random_gptq():
    return jq.RTN(4, 32).quantize(np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32))


def test_configs_beside_config_json(tmp_path):
    """AutoGPTQ's quantize_config.json, GPT-QModel's for AWQ, auto-round's quantization_config.json."""
    q = random_gptq()
    plain = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    a = write(tmp_path / "a", modules(q), quantize_config=plain)
    b = write(tmp_path / "b", modules(q), quantization_config=plain | {"quant_method": "auto-round"})
    converted = jq.convert(jq.load_state(a), None, jq.AWQ())
    awq_config = converted.config["quantization_config"]
    c = write(tmp_path / "c", modules(next(iter(jq.quantized(converted).values()))), quantize_config=awq_config)
    for folder in (a, b, c):
        (found,) = jq.quantized(jq.load_state(folder)).values()
        np.testing.assert_array_equal(found.dequantize(), q.dequantize())


def test_exports_under_the_names_of_gptq_and_awq_say_nothing(tmp_path):
    """auto-round 0.16.1's formats auto_gptq and auto_awq; a warning is an error in these tests."""
    from jq.formats import gptq_config

    made = {
        "autoround_version": "0.16.1",
        "bits": 4,
        "data_type": "int",
        "group_size": 32,
        "iters": 200,
        "provider": "auto-round",
    }
    made |= {"to_quant_block_names": "model.layers", "nsamples": 128, "seqlen": 2048, "lr": 5e-3}
    gptq = made | {
        "quant_method": "gptq",
        "sym": False,
        "damp_percent": 0.01,
        "desc_act": False,
        "true_sequential": False,
    }
    assert gptq_config.parse(gptq, Context(label="a")).zeros == "v1-field"
    assert awq.parse(made | {"quant_method": "awq", "version": "gemm", "zero_point": False}, Context(label="b")).sym


def test_rotations_of_whole_blocks_are_refused():
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
    for key in ("rotation_config", "rotation_configs", "hadamard_config", "spinquant_config"):
        with pytest.raises(UnsupportedError, match=f"{key}.*rotated"):
            auto_round.parse(config | {key: [{"algorithm": "hadamard"}]}, Context())
        auto_round.parse(config | {key: None}, Context())
    floats = config | {"data_type": "mx_fp"}
    for rotation in ({"backend": "inplace"}, {"fuse_online_to_weight": True}, {"hadamard_type": "quarot_hadamard"}):
        with pytest.raises(UnsupportedError, match=r"rotation_config is .*QuaRot"):
            auto_round.parse(floats | {"rotation_config": rotation}, Context())
    with pytest.raises(UnsupportedError, match="rotation_config is"):
        auto_round.parse(config | {"data_type": "fp", "rotation_config": {"hadamard_type": "hadamard"}}, Context())


@pytest.mark.parametrize(
    ("rotation", "matrix", "message"),
    [
        ({"block_size": 24}, None, "blocks of 24 .* do not divide 64"),
        ({"block_size": 64.0}, None, "block_size is 64.0"),
        (["hadamard"], None, "expected an object"),
        ({"hadamard_type": "random_hadamard"}, None, r"m\.hadamard_matrix: missing"),
        ({"hadamard_type": "random_hadamard"}, np.ones((16, 16), np.float32), r"m\.hadamard_matrix: found shape"),
        (
            {"hadamard_type": "random_hadamard"},
            np.full((32, 32), np.nan, np.float32),
            r"m\.hadamard_matrix: .*not finite",
        ),
        ({"hadamard_type": "hadamard"}, np.ones((32, 32), np.float32), "rotation_config asks for hadamard"),
        (None, np.ones((32, 32), np.float32), "rotation_config asks for nothing"),
    ],
)
def test_bad_rotations(rotation, matrix, message):
    config = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "rotation_config": rotation}
    parts = {"weight_packed": np.zeros((8, 32), np.uint8), "weight_scale": np.full((8, 2), 120, np.uint8)}
    if matrix is not None:
        parts["hadamard_matrix"] = matrix
    with pytest.raises(FormatError, match=message):
        auto_round.load("m", parts, auto_round.parse(config, Context()), Context())


def test_no_config_at_all(tmp_path):
    folder = write(tmp_path / "bare", modules(random_gptq()))
    with pytest.raises(FormatError, match=r"has GPTQ tensors \(\*\.qweight\), but neither config\.json"):
        jq.load_state(folder)


def test_llm_awq_needs_no_config(tmp_path):
    """llm-awq saves a state_dict alone: storage and groups are told by the tensors."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (64, 256)), rng.random((64, 4)).astype(np.float16) + np.float16(0.1)
    pad = ((0, 0), (0, 8 * awq.padded_words(4, 64) - 4))
    wide = np.ascontiguousarray(np.pad(scales, pad).T)
    tensors = {
        "m.up_proj.qweight": awq_words.fast_words(codes),
        "m.up_proj.scales": wide,
        "m.up_proj.scaled_zeros": -wide * np.float16(8),
    }
    (found,) = jq.quantized(jq.load_state(write(tmp_path / "bare", tensors))).values()
    index = np.arange(256) // 64
    want = (codes - 8.0) * scales.astype(np.float64)[:, index]
    np.testing.assert_array_equal(found.dequantize(), want.astype(np.float16))


def test_embeddings_are_refused(tmp_path):
    folder = write(
        tmp_path / "e",
        modules(random_gptq(), "model.embed_tokens"),
        {"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 32}},
    )
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens: a quantized embedding"):
        jq.load_state(folder)
