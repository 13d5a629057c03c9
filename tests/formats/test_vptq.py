"""VPTQ against a slow, obvious numpy version over random checkpoints."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats import vptq
from jq.formats.base import Context

BF16 = np.dtype(ml_dtypes.bfloat16)
CONTEXT = Context(label="test")
NAME = "model.layers.0.mlp.up_proj"


def bits(entries: int) -> int:
    return math.ceil(math.log2(entries)) if entries > 1 else 0


def packed(stream: list[int]) -> np.ndarray:
    words = np.packbits(np.array(stream, np.uint8), bitorder="little")
    return np.concatenate([words, np.zeros(-len(words) % 4, np.uint8)]).view(np.int32)


def layer(seed: int, dtype: Any, conf: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random stored tensors of one module and the weight that they mean, built entry by entry."""
    rng = np.random.default_rng(seed)
    n, k, groups, size, outliers = (
        conf[x] for x in ("out_features", "in_features", "group_num", "group_size", "outlier_size")
    )
    (vo, v), (ko, entries), (_, second) = conf["vector_lens"], conf["num_centroids"], conf["num_res_centroids"]
    rows = -(-n // v)

    def table(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    book, residual = table(groups, entries, v), table(groups, max(second, 1), v)
    main = rng.integers(0, entries, (groups, rows, size))
    extra = rng.integers(0, max(second, 1), (groups, rows, size))
    parts = {"centroids.weight": book.reshape(groups, -1)}
    weight = np.zeros((rows * v, groups * size), dtype)
    for g in range(groups):
        for r in range(rows):
            for c in range(size):
                vector = book[g, main[g, r, c]]
                if second > 0:
                    vector = vector + residual[g, extra[g, r, c]]
                weight[r * v : (r + 1) * v, g * size + c] = vector
    weight = weight[:n]
    if second > 0:
        parts["res_centroids.weight"] = residual.reshape(groups, -1)
    if conf["is_indice_packed"]:
        b, rb = bits(entries), bits(second) if second > 0 else 0
        lines = []
        for g in range(groups):
            for r in range(rows):
                stream: list[int] = []
                for c in range(size):
                    entry = int(main[g, r, c]) | (int(extra[g, r, c]) << b if second > 0 else 0)
                    stream += [(entry >> i) & 1 for i in range(b + rb)]
                lines.append(packed(stream))
        parts["indices"] = np.stack(lines).reshape(groups, rows, -1)
    else:
        parts["indices"] = main.astype(np.uint16).view(np.int16)
        if second > 0:
            parts["res_indices"] = extra.astype(np.uint16).view(np.int16)
    if outliers:
        book, index = table(1, ko, vo), rng.integers(0, ko, (1, -(-n // vo), outliers))
        parts["outlier_centroids.weight"] = book.reshape(1, -1)
        parts["outlier_indices"] = index.astype(np.uint16).view(np.int16)
        front = book[0][index[0]].transpose(0, 2, 1).reshape(-1, outliers)[:n]
        weight = np.concatenate([front, weight], axis=1)
    if conf["enable_perm"]:
        perm = rng.permutation(k)
        parts["perm"] = perm.astype(np.uint16).view(np.int16) if conf["is_indice_packed"] else perm
        out = np.empty_like(weight)
        out[:, perm] = weight
        weight = out
    if conf["enable_norm"]:
        rows = conf.get("norm_dim") == 1
        parts["weight_scale"], parts["weight_bias"] = (table(n if rows else k) for _ in range(2))
        scale, bias = (parts[f"weight_{x}"][:, None] if rows else parts[f"weight_{x}"] for x in ("scale", "bias"))
        weight = weight * scale + bias
    return parts, weight


@st.composite
def settings_of_a_layer(draw: Any) -> dict[str, Any]:
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    outliers = draw(st.sampled_from([0, 0, 1, 4]))
    return {
        "in_features": groups * size + outliers,
        "out_features": draw(st.integers(1, 25)),
        "bias": False,
        "vector_lens": [draw(st.sampled_from([2, 4, 6])) if outliers else -1, draw(st.sampled_from([1, 2, 6, 8]))],
        "num_centroids": [16 if outliers else -1, draw(st.sampled_from([1, 2, 8, 16, 128, 512, 4096]))],
        "num_res_centroids": [-1, draw(st.sampled_from([-1, -1, 2, 16, 64, 1024]))],
        "group_num": groups,
        "group_size": size,
        "outlier_size": outliers,
        "enable_norm": draw(st.booleans()),
        "norm_dim": draw(st.sampled_from([0, 0, 1])),
        "enable_perm": draw(st.booleans()),
        "is_indice_packed": draw(st.sampled_from([True, True, False])),
        "indices_as_float": False,
    }


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    conf=settings_of_a_layer(),
    dtype=st.sampled_from([np.float16, BF16, np.float32]),
    turn=TURNS,
)
def test_any_settings(seed: int, conf: dict[str, Any], dtype: Any, turn: int) -> None:
    parts, want = layer(seed, dtype, conf)
    options = vptq.parse({"config_for_layers": {NAME: conf}}, CONTEXT)
    q = vptq.load(NAME, parts, options, CONTEXT)
    assert q is not None and q.shape == want.shape
    got = dense(q, turn)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{want.itemsize}"))
    back = vptq.dump(q.to_jax())
    assert back.keys() == parts.keys()
    for name, array in back.items():
        assert array.dtype == parts[name].dtype and array.shape == parts[name].shape, name
        assert array.tobytes() == np.ascontiguousarray(parts[name]).tobytes(), name


@given(seed=st.integers(0, 999), width=st.integers(1, 32), count=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_streams_of_any_width(seed: int, width: int, count: int) -> None:
    entries = np.random.default_rng(seed).integers(0, 2**width, (3, count))
    words = vptq.pack_stream(entries, width)
    assert words.dtype == np.int32 and words.shape == (3, -(-count * width // 32))
    np.testing.assert_array_equal(vptq.unpack_stream(words, width, count), entries)


BASE = {
    "in_features": 12,
    "out_features": 10,
    "vector_lens": [-1, 4],
    "num_centroids": [-1, 12],
    "num_res_centroids": [-1, -1],
    "group_num": 1,
    "group_size": 12,
    "outlier_size": 0,
    "enable_norm": True,
    "enable_perm": True,
    "is_indice_packed": True,
}


def test_shared_settings_and_stack() -> None:
    options = vptq.parse({"shared_layer_config": {"up_proj": BASE}}, CONTEXT)
    made = [layer(seed, np.float16, BASE) for seed in range(2)]
    tensors = [vptq.load(f"model.layers.{i}.mlp.up_proj", parts, options, CONTEXT) for i, (parts, _) in enumerate(made)]
    stacked = jq.qtensor.stack([t.to_jax() for t in tensors if t is not None])
    assert stacked.shape == (2, 10, 12)
    np.testing.assert_array_equal(np.asarray(stacked.dequantize()), np.stack([w for _, w in made]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("perm"), f"{NAME}.perm: missing"),
        (lambda p: p["perm"].__setitem__(0, p["perm"][1]), "no permutation of 0..11"),
        (lambda p: p["indices"].__setitem__((0, 0, -1), -1), "bits after the last index|outside 0..11"),
        (lambda p: p["indices"].__setitem__((0, 0, 0), -1), "values 0..15 are outside 0..11"),
        (lambda p: p.update(indices=p["indices"][..., :1]), r"found shape \(1, 3, 1\), expected \(1, 3, 2\)"),
        (lambda p: p.update(res_indices=p["indices"]), "res_indices: stored, but"),
        (lambda p: p.update(weight_scale=p["weight_scale"][:-1]), r"found shape \(11,\), expected \(12,\)"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    parts, _ = layer(0, np.float16, BASE)
    change(parts)
    options = vptq.parse({"config_for_layers": {NAME: BASE}}, CONTEXT)
    with pytest.raises(FormatError, match=message):
        vptq.load(NAME, parts, options, CONTEXT)


@pytest.mark.parametrize("norm_dim", [0, 1])
def test_tensors_tell_what_settings_leave_out(norm_dim: int) -> None:
    parts, want = layer(1, np.float16, {**BASE, "norm_dim": norm_dim})
    told = ("enable_norm", "enable_perm", "is_indice_packed", "group_size", "outlier_size", "num_res_centroids")
    conf = {k: v for k, v in BASE.items() if k not in told} | {"norm_dim": norm_dim, "in_features": -1}
    q = vptq.load(NAME, parts, vptq.parse({"config_for_layers": {NAME: conf}}, CONTEXT), CONTEXT)
    assert q is not None
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want)
    if norm_dim:
        np.testing.assert_array_equal(np.asarray(q[4:8].dequantize()), want[4:8])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"group_size": 6}, "group_size 6, but 12 inputs less 0 outliers in 1 groups are 12 each"),
        ({"norm_dim": 2}, "norm_dim is 2, expected 0"),
        ({"enable_perm": "yes"}, "enable_perm is 'yes', expected true or false"),
        ({"indices_as_float": 1}, "indices_as_float is 1, expected true or false"),
        ({"out_features": "10"}, "out_features is '10', expected an integer"),
        ({"out_features": -1}, "in_features 12 and out_features -1"),
        ({"enable_abs": True}, "enable_abs is set; signs"),
        ({"enable_norm": False}, "weight_bias: stored, but the layer's settings"),
    ],
)
def test_unknown_values_of_settings_are_named(setting: Any, message: str) -> None:
    parts, _ = layer(0, np.float16, BASE)
    with pytest.raises((FormatError, UnsupportedError), match=message):
        vptq.load(NAME, parts, vptq.parse({"config_for_layers": {NAME: {**BASE, **setting}}}, CONTEXT), CONTEXT)


def test_settings_are_checked() -> None:
    with pytest.raises(FormatError, match="enable_proxy_error is 3, expected true or false"):
        vptq.parse({"enable_proxy_error": 3, "config_for_layers": {NAME: BASE}}, CONTEXT)
    with pytest.raises(FormatError, match="neither config_for_layers nor shared_layer_config"):
        vptq.parse({}, CONTEXT)
    with pytest.raises(FormatError, match="num_centroids is 3, expected two integers"):
        vptq.parse({"config_for_layers": {NAME: {**BASE, "num_centroids": 3}}}, CONTEXT)
    with pytest.raises(UnsupportedError, match="outliers with a residual"):
        conf = {**BASE, "vector_lens": [4, 4], "num_centroids": [8, 8], "num_res_centroids": [8, 8], "outlier_size": 2}
        vptq.parse({"config_for_layers": {NAME: conf}}, CONTEXT)
    parts, _ = layer(0, np.float16, BASE)
    with pytest.raises(FormatError, match="is named neither in"):
        vptq.load(NAME, parts, vptq.parse({"shared_layer_config": {"o_proj": BASE}}, CONTEXT), CONTEXT)
