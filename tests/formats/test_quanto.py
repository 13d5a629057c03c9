"""Quanto: random modules packed by slow, obvious numpy; implicit groups, shifts, activations; every error."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, assert_same, context_of, dense, held_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import activations
from jq.algorithms.quanto import group_size_of
from jq.errors import FormatError, UnsupportedError
from jq.formats import quanto
from jq.safetensors_file import write

BF = ml_dtypes.bfloat16
FLOATS = (np.float16, BF, np.float32)
FLOAT8 = {"qfloat8_e4m3fn": ml_dtypes.float8_e4m3fn, "qfloat8_e5m2": ml_dtypes.float8_e5m2,
          "qfloat8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz}  # fmt: skip
NAME = "model.layers.0.mlp.down_proj"


def read(tensors, qtype, hidden=48, inner=64, activation="none"):
    """The module NAME of a model of that hidden and intermediate size; dump must give every tensor back."""
    config = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 1}
    context = dataclasses.replace(context_of(tensors), config=config)
    options = quanto.parse({"map": {NAME: {"weights": qtype, "activations": activation}}}, context)
    stored = quanto.group(list(tensors), options, context)[NAME]
    q = quanto.load(NAME, {s: tensors[n] for s, n in stored.items()}, options, context)
    back = quanto.dump(q)
    assert set(back) == set(stored)
    for suffix, array in back.items():
        assert_same(array, tensors[stored[suffix]], suffix)
    return q


def named(parts, dtype=np.float16):
    one = np.ones((), dtype)
    return {f"{NAME}.{k}": v for k, v in {"input_scale": one, "output_scale": one, **parts}.items()}


def pack_slowly(codes, bits):
    """Slabs of rows, the first in the lowest bits; code by code."""
    rows = math.ceil(len(codes) / (8 // bits))
    packed = np.zeros((rows, codes.shape[1]), np.uint8)
    for r in range(len(codes)):
        for c in range(codes.shape[1]):
            packed[r % rows, c] |= int(codes[r, c]) << (bits * (r // rows))
    return packed


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_reads_and_writes_packed_codes(data):
    bits = data.draw(st.sampled_from((4, 2)))
    n, k = data.draw(st.integers(1, 9)), data.draw(st.sampled_from((1, 7, 32, 100, 128, 160, 192, 256, 288, 130)))
    integer = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    columns = group_size_of(k) or k
    codes = rng.integers(0, 1 << bits, (n * k // columns, columns)).astype(np.uint8)
    scale = rng.normal(size=(len(codes), 1)).astype(dtype)
    shift = (
        rng.integers(0, 1 << bits, scale.shape).astype(np.uint8)
        if integer
        else rng.normal(size=scale.shape).astype(dtype)
    )
    parts = {"weight._data._data": pack_slowly(codes, bits), "weight._scale": scale, "weight._shift": shift}
    tensors = named(parts, dtype)
    q = read(tensors, f"qint{bits}", inner=k)
    np.testing.assert_array_equal(np.asarray(q.unpack()), codes.reshape(n, k))
    if integer:
        want = (scale * (codes.astype(np.int8) - shift.astype(np.int8)).astype(dtype)).astype(dtype)
    else:
        want = ((scale * codes.astype(dtype)).astype(dtype) - shift).astype(dtype)
    assert_same(dense(q, data.draw(TURNS)), want.reshape(n, k))
    assert held_bytes(q) <= 1.02 * sum(t.nbytes for t in tensors.values()) + 8 * n


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reads_and_writes_bytes(data):
    qtype = data.draw(st.sampled_from(("qint8", *FLOAT8)))
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scalar = n == 1 and data.draw(st.booleans())
    scale = rng.normal(size=() if scalar else (n, 1)).astype(dtype)
    if qtype == "qint8":
        codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    else:
        codes = rng.normal(size=(n, k)).astype(FLOAT8[qtype])
    tensors = named({"weight._data": codes, "weight._scale": np.asarray(scale)}, dtype)
    q = read(tensors, qtype)
    assert_same(dense(q, data.draw(TURNS)), (np.asarray(scale) * codes.astype(dtype)).astype(dtype))


@pytest.mark.parametrize(
    "k, group", ((64, None), (128, None), (129, None), (160, 32), (192, 96), (256, 128), (320, 64))
)
def test_groups_follow_from_the_inputs(k, group):
    assert group_size_of(k) == group


def test_inputs_come_from_the_config_or_the_bias():
    """Nothing but 128 codes a row is stored: down_proj's inputs are the intermediate size, q_proj's the hidden one."""
    codes = np.zeros((12, 128), np.uint8)
    side = np.ones((24, 1), np.float16)
    parts = {"weight._data._data": codes, "weight._scale": side, "weight._shift": side}
    assert read(named(parts), "qint4", hidden=512, inner=768).shape == (4, 768)
    with_bias = named(parts) | {f"{NAME}.bias": np.ones(6, np.float16)}
    assert read(with_bias, "qint4", hidden=7, inner=9).shape == (6, 512)
    with pytest.raises(UnsupportedError, match=r"down_proj.weight._data._data: .*24 rows of 128 codes"):
        read(named(parts), "qint4", hidden=7, inner=9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", ("int8", "int4", "int2", "float8", "float8_e5m2", "float8_e4m3fnuz"))
def test_quantizes_near_the_weight(weights, dtype):
    w = np.random.default_rng(2).normal(size=(6, 256)).astype(dtype)
    made = jq.Quanto(weights).quantize(w, NAME)
    error = np.abs(np.asarray(made.dequantize(), np.float32) - w.astype(np.float32))
    span = 2 * np.abs(w.astype(np.float32)).max(1, keepdims=True)
    step = {"int8": 1 / 254, "int4": 1 / 15, "int2": 1 / 3, "float8": 1 / 16}.get(weights, 1 / 8)
    assert (error <= 0.51 * step * span + (0.02 if dtype is BF else 0.002) * span).all()
    assert_same(quanto.dump(made)["input_scale"], np.ones((), dtype))


def test_integer_shifts_keep_zero():
    w = np.random.default_rng(3).normal(size=(4, 96)).astype(np.float32)
    w[:, 5] = 0
    made = jq.Quanto("int4", integer_shift=True).quantize(w)
    assert quanto.dump(made)["weight._shift"].dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(made.dequantize())[:, 5], 0)


@pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="needs optimum-quanto (extra `peers`)")
@pytest.mark.parametrize("qtype", ("qint8", "qint4", "qint2", *FLOAT8))
def test_stores_what_quanto_freezes(qtype):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("optimum.quanto")
    for dtype, name in ((torch.float32, np.float32), (torch.float16, np.float16), (torch.bfloat16, BF)):
        for shape in ((48, 256), (32, 160), (5, 100), (1, 64)):
            torch.manual_seed(7)
            layer = torch.nn.Linear(shape[1], shape[0], bias=False).to(dtype)
            w = layer.weight.detach().float().numpy().astype(name)
            model = torch.nn.Sequential(layer)
            peer.quantize(model, weights=peer.qtypes[qtype])
            peer.freeze(model)
            made = quanto.dump(jq.Quanto(qtype).quantize(w))
            for key, value in model.state_dict().items():
                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                assert made[key.removeprefix("0.")].tobytes() == raw, (dtype, shape, key)


def active(kind, weights, bias=None):
    rng = np.random.default_rng(4)
    w = jq.Quanto(weights).quantize(rng.normal(size=(8, 48)).astype(np.float16), NAME)
    extras = {"input_scale": np.float16(0.03), "output_scale": np.float16(0.2)}
    how = activations.Activation("quanto", tuple(extras), (("dtype", kind),))
    return w.replace(extras={k: np.asarray(v) for k, v in extras.items()}, activation=how), rng


@pytest.mark.parametrize("weights", ("int8", "int4", "float8"))
@pytest.mark.parametrize("kind", ("int8", "float8_e4m3fn"))
def test_inputs_and_outputs_are_quantized(kind, weights):
    w, rng = active(kind, weights)
    x, bias = rng.normal(size=(5, 48)).astype(np.float16), rng.normal(size=8).astype(np.float16)

    def to(values, scale):
        quotient = (values / np.float16(scale)).astype(np.float16)
        if kind == "int8":
            return np.clip(np.rint(quotient), -128, 127).astype(np.float16)
        return np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float16)

    dense = np.asarray(w.dequantize(), np.float64)
    y = (to(x, 0.03).astype(np.float64) * np.float64(np.float16(0.03))) @ dense.T + bias
    want = to(y.astype(np.float16), 0.2) * np.float16(0.2)
    got = np.asarray(activations.matmul(jnp.asarray(x), w, jnp.asarray(bias)))
    assert np.mean(got == want) > 0.9  # an output on the edge of a step may fall to either side
    np.testing.assert_allclose(got.astype(float), want.astype(float), atol=0.21 if kind == "int8" else 0.3, rtol=0.13)


def test_float_activations_switch_it_off():
    w, rng = active("int8", "int8")
    x = jnp.asarray(rng.normal(size=(3, 48)), jnp.float32)
    plain = jq.matmul(x, w, quantize_activations=False)
    np.testing.assert_allclose(plain, np.asarray(x) @ np.asarray(w.dequantize("float32")).T, atol=1e-5)


def save(folder, tensors, files, config=None):
    folder.mkdir()
    items = [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()]
    write(folder / "model.safetensors", items, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"hidden_size": 48, "intermediate_size": 64, **(config or {})}))
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def test_map_files_are_found_and_kept(tmp_path):
    made = quanto.dump(jq.Quanto("int2").quantize(np.ones((4, 64), np.float16)))
    tensors = {f"{NAME}.{k}": v for k, v in made.items()} | {"norm.input_scale": np.ones((), np.float16)}
    for file in quanto.MAP_FILES:
        entry = {NAME: {"weights": "qint2", "activations": "none"}, "norm": {"weights": "none", "activations": "qint8"}}
        folder = save(tmp_path / file, tensors, {file: entry})
        state = jq.load_state(folder)
        assert list(jq.quantized(state)) == [NAME]
        jq.save(state, tmp_path / "out")
        assert json.loads((tmp_path / "out" / file).read_text()) == entry
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    transformers = {"quantization_config": {"quant_method": "quanto", "weights": "int2"}}
    assert list(jq.quantized(jq.load_state(save(tmp_path / "hf", tensors, {}, transformers)))) == [NAME]


@pytest.mark.parametrize(
    "change, qtype, message",
    (
        ({"weight._shift": None}, "qint4", r"down_proj.weight._shift: missing"),
        ({"weight._data._data": np.zeros((3, 64), np.uint8)}, "qint4", r"found shape \(3, 64\), expected 2 rows"),
        ({"weight._scale": np.ones((4, 2), np.float16)}, "qint4", r"weight._scale: found shapes \(4, 2\)"),
        ({}, "qint8", r"the map says qint8, but the tensors are those of qint4 or qint2"),
        ({"weight._scale": np.full((4, 1), np.inf, np.float16)}, "qint4", r"4 of 4 values are not finite"),
        ({"weight._scale": np.ones((4, 1), np.int8)}, "qint4", r"weight._scale: found dtype int8, expected float16"),
    ),
)
def test_errors_name_the_tensor(change, qtype, message):
    parts = quanto.dump(jq.Quanto("int4").quantize(np.ones((4, 64), np.float16)))
    tensors = {f"{NAME}.{k}": v for k, v in (parts | change).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        read(tensors, qtype)


def test_unknown_qtypes_are_errors():
    with pytest.raises(FormatError, match=r"quantization map: a.weights: found 'qint3', expected none, qint2"):
        quanto.parse({"map": {"a": {"weights": "qint3"}}}, context_of({}))
    with pytest.raises(FormatError, match=r"Quanto: weights 'int3'"):
        jq.Quanto("int3").quantize(np.ones((4, 4), np.float16))
