"""SINQ against a slow, obvious numpy version of its layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jq
from jq.errors import FormatError
from jq.formats import sinq
from jq.formats.base import Context

DIRECTORY = Path(__file__).parents[1] / "reference" / "sinq-4-g64-bf16"
PER = {8: 1, 6: 5, 5: 6, 4: 2, 3: 10, 2: 4, 1: 8}


def context(dtype: str) -> Context:
    return Context(config={"dtype": dtype}, label="test")


def module(bits: int, n: int, k: int, group: int, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random stored tensors and the weight: every step in the dtype that torch promotes to."""
    rng, per = np.random.default_rng(bits), PER[bits]
    groups = n * k // group
    codes = rng.integers(0, 1 << bits, (groups, group))
    step = -(-groups // per)
    padded = np.zeros((per * step, group), np.int64)
    padded[:groups] = codes
    words = sum(padded[i * step : (i + 1) * step] << (bits * (per - 1 - i)) for i in range(per))
    x, s = rng.integers(0, 256, (32, groups // 32)), (rng.random((1, groups // 32)) * 1e-3).astype(np.float16)
    m, zero_x = (rng.random((1, groups // 32)) * 0.1).astype(np.float16), rng.integers(0, 256, (groups, 1))
    zero_s, zero_m = np.full((1, 1), 0.03, np.float16), np.full((1, 1), 0.5, np.float16)
    parts = {
        "W_q": np.asarray(words).astype(np.int32 if bits in (3, 5, 6) else np.uint8),
        "meta.scale.x": x.astype(np.uint8),
        "meta.scale.s": s,
        "meta.scale.m": m,
        "meta.zero.x": zero_x.astype(np.uint8),
        "meta.zero.s": zero_s,
        "meta.zero.m": zero_m,
        "meta.scale2": (rng.random((1, k)) + 0.5).astype(np.float16),
    }
    scale = (x.astype(np.float16) * s + m).reshape(-1, 1)
    zero = (zero_x.astype(np.float16) * zero_s + zero_m).reshape(-1, 1)
    work = np.float16 if dtype == "float16" else np.float32
    dense = (codes.astype(work) - zero.astype(work)) * scale.astype(work)
    return parts, (dense.reshape(n, k) * parts["meta.scale2"].astype(work)).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_decoding(bits: int, dtype: str) -> None:
    parts, want = module(bits, 48, 128, 64, dtype)
    ctx = context(dtype)
    q = sinq.load("m", parts, sinq.parse({"nbits": bits, "group_size": 64}, ctx), ctx)
    got = np.asarray(q.dequantize())
    assert got.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{got.itemsize}"))
    back = sinq.dump(q.to_jax())
    assert back.keys() == parts.keys()
    for name, array in back.items():
        assert (array.dtype, array.shape) == (parts[name].dtype, parts[name].shape), name
        assert array.tobytes() == parts[name].tobytes(), name


def test_scales_that_are_not_quantized() -> None:
    parts, _ = module(4, 32, 64, 64, "float32")
    for name in ("scale", "zero"):
        x, s, m = (parts.pop(f"meta.{name}.{p}") for p in "xsm")
        parts[f"meta.{name}"] = (x.astype(np.float16) * s + m).reshape(-1, 1)
    ctx = context("float32")
    q = sinq.load("m", parts, sinq.parse({}, ctx), ctx)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), module(4, 32, 64, 64, "float32")[1])
    assert all(np.array_equal(a, parts[k]) for k, a in sinq.dump(q).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("meta.scale2"), "m.meta.scale2: missing"),
        (lambda p: p.pop("meta.zero.s"), "m.meta.zero.s: missing"),
        (lambda p: p.update(W_q=p["W_q"][:-1]), "do not fit together"),
        (lambda p: p.update(W_q=p["W_q"].astype(np.int32)), "m.W_q: found dtype int32, expected uint8"),
        (lambda p: p["meta.scale.s"].__setitem__((0, 0), np.nan), "not finite"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    parts, _ = module(4, 48, 128, 64, "bfloat16")
    change(parts)
    with pytest.raises(FormatError, match=message):
        sinq.load("m", parts, sinq.Options(4, 64), context("bfloat16"))


def test_config_errors() -> None:
    with pytest.raises(FormatError, match="nbits is 7"):
        sinq.parse({"nbits": 7}, context("bfloat16"))
    with pytest.raises(FormatError, match="tiling_mode is '3D', expected '1D' or '2D'"):
        sinq.parse({"tiling_mode": "3D"}, context("bfloat16"))
    with pytest.raises(FormatError, match="nbits is 3, which does not hold the codes of method 'sinq_nf4'"):
        sinq.parse({"nbits": 3, "method": "sinq_nf4"}, context("bfloat16"))
    with pytest.raises(FormatError, match=r"found shape .40, 64.; SINQ needs squares of 32"):
        sinq.SINQ(4, 32, "2D").quantize(np.zeros((40, 64), np.float32))


def test_inputs_of_tiles_come_from_the_plain_values_or_the_model() -> None:
    w = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    parts = sinq.dump(sinq.SINQ(4, 32, "2D").quantize(w))
    options = sinq.parse({"group_size": 32, "tiling_mode": "2D"}, context("float32"))
    with pytest.raises(FormatError, match="tells in_features"):
        sinq.load("m.q_proj", parts, options, context("float32"))
    known = Context(config={"dtype": "float32", "hidden_size": 128}, label="test")
    assert sinq.load("m.q_proj", parts, options, known).shape == (64, 128)
    objects = {"m.q_proj.meta.shape": [128, 64]}
    assert sinq.load("m.q_proj", parts, options, Context({}, objects=objects, label="test")).shape == (128, 64)


def test_models_that_sinq_saved_need_no_config(tmp_path: Path) -> None:
    """Plain values of the layers stand for quantization_config, each layer's own where they differ."""
    state = jq.load_state(str(DIRECTORY))
    config = json.loads((DIRECTORY / "config.json").read_text())
    del config["quantization_config"]
    shutil.copytree(DIRECTORY, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    found = jq.load_state(str(tmp_path / "m"))
    for name, q in state.items():
        if isinstance(q, jq.QTensor):
            assert np.array_equal(np.asarray(found[name].dequantize()), np.asarray(q.dequantize()))


def test_plain_values_beside_new_weights_are_those_of_sinq(tmp_path: Path) -> None:
    """The library's loader needs them and an index; what it wrote itself is the oracle."""
    want = json.loads((DIRECTORY / sinq.SIDE_FILE).read_text())
    state = jq.load_state(DIRECTORY)
    dense = {
        name: np.asarray(state[name].dequantize()) if name in state and "proj" in name else state[name]
        for name in state
    }
    config = {k: v for k, v in state.config.items() if k != "quantization_config"}
    jq.save(jq.quantize(jq.State(dense, config), jq.SINQ(4, 64)), tmp_path / "made")
    made = json.loads((tmp_path / "made" / sinq.SIDE_FILE).read_text())
    assert made.pop("model.rotary_emb") == {}  # buffers that the module computes
    assert made == want and [list(v["meta"]) for v in made.values()] == [list(v["meta"]) for v in want.values()]
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    jq.save(jq.load_state(tmp_path / "made"), tmp_path / "again")
    for file in (tmp_path / "made").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
