"""EETQ: the interleaved bytes against the offset formula, byte by byte; rounding half away from zero; every error."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError
from jq.formats import eetq

NAME = "model.layers.0.mlp.up_proj"
CONFIG = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": None}
ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def interleave_slowly(codes):
    """Codes [N, K] -> stored int8[K, N], by the place of each byte."""
    n_all, k_all = codes.shape
    stored = np.zeros(n_all * k_all, np.uint8)
    for n in range(n_all):
        for k in range(k_all):
            moved = 16 * (k // 16) + ROWS.index(k % 16)
            place = (n // 2) * 2 * k_all + (moved // 64) * 128 + (n % 2) * 64 + moved % 64
            place += {1: 1, 2: -1}.get(place % 4, 0)
            stored[place] = int(codes[n, k]) + 128
    return stored.view(np.int8).reshape(k_all, n_all)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from((np.float16, np.float32)))
def test_reads_and_writes_the_interleaved_bytes(n, k, seed, dtype):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (64 * n, 64 * k)).astype(np.int8)
    scales = rng.normal(size=64 * n).astype(dtype)
    tensors = {f"{NAME}.weight": interleave_slowly(codes), f"{NAME}.weight_scales": scales}
    q = read(eetq.FORMAT, tensors, CONFIG)[NAME]
    assert q.shape == codes.shape  # the file's shape is that of the transposed weight
    np.testing.assert_array_equal(np.asarray(q.unpack()), codes)
    assert_same(q.to_numpy().dequantize(), (codes.astype(dtype) * scales[:, None]).astype(dtype))
    assert q.nbytes == sum(t.nbytes for t in tensors.values())


def test_own_name_of_the_library_is_read():
    tensors = {f"{NAME}.qweight": np.zeros((64, 64), np.int8), f"{NAME}.weight_scales": np.ones(64, np.float16)}
    np.testing.assert_array_equal(np.asarray(read(eetq.FORMAT, tensors, CONFIG)[NAME].unpack()), -128)


def test_rounds_half_away_from_zero_and_clips_the_maximum():
    w = np.zeros((64, 64), np.float32)
    w[:, 0] = 128  # scale 1: the maximum would be code 128
    w[:, 1:5] = (0.5, -0.5, 2.5, -127.5)
    made = jq.EETQ().quantize(w)
    np.testing.assert_array_equal(np.asarray(made.unpack())[0, :5], (127, 1, -1, 3, -128))


def test_codes_come_from_the_float32_scale():
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    made = jq.EETQ().quantize(w)
    scale = np.abs(w.astype(np.float32)).max(1) / 128
    assert_same(made.scales[:, 0], scale.astype(np.float16))
    ratio = w.astype(np.float64) / scale.astype(np.float64)[:, None]
    want = np.clip(np.sign(ratio) * np.floor(np.abs(ratio) + 0.5), -128, 127)
    np.testing.assert_array_equal(np.asarray(made.unpack()), want)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"weight": np.zeros((64, 96), np.int8)}, r"up_proj.weight: found shape \(64, 96\), .* multiples of 64"),
        ({"weight": np.zeros((64, 64), np.float16)}, r"up_proj.weight: found dtype float16, expected int8"),
        ({"weight_scales": np.ones(65, np.float16)}, r"up_proj.weight_scales: found shape \(65,\), expected \(64,\)"),
        ({"weight_scales": np.full(64, np.inf, np.float16)}, r"64 of 64 values are not finite"),
        ({"weight": None}, r"up_proj.weight: missing"),
    ),
)
def test_errors_name_the_tensor(change, message):
    parts = {"weight": np.zeros((64, 64), np.int8), "weight_scales": np.ones(64, np.float16)} | change
    with pytest.raises(FormatError, match=message):
        read(eetq.FORMAT, {f"{NAME}.{k}": v for k, v in parts.items() if v is not None}, CONFIG)


def test_refuses_what_the_library_refuses():
    with pytest.raises(FormatError, match=r"weights: found 'int4', eetq has only 'int8'"):
        read(eetq.FORMAT, {}, {"quant_method": "eetq", "weights": "int4"})
    with pytest.raises(FormatError, match=r"w: EETQ does not quantize bfloat16 weights; cast them to float16"):
        jq.EETQ().quantize(np.ones((64, 64), ml_dtypes.bfloat16), "w")
    with pytest.raises(FormatError, match=r"w: found shape \(64, 100\); EETQ needs multiples of 64"):
        jq.EETQ().quantize(np.ones((64, 100), np.float16), "w")
