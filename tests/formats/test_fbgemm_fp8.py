"""FBGEMM-FP8: rows and Llama-4 experts against plain numpy, quantization, errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same, held_bytes, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError
from jq.formats.base import Context
from jq.formats.fbgemm_fp8 import FORMAT, parse

NAME = "model.layers.0.mlp.down_proj"
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
CONFIG = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def random_codes(rng, *shape):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0
    return codes.view(E4M3)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 20), st.sampled_from([np.float32, BF16]), st.integers(1, 2), st.integers(0, 2**32)
)
def test_rows(n, k, dtype, rank, seed):
    rng = np.random.default_rng(seed)
    weight, scale = random_codes(rng, n, k), rng.standard_normal((n, 1)).astype(dtype)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale if rank == 2 else scale.reshape(-1)}
    q = read(FORMAT, tensors, CONFIG)[NAME]
    assert_same(q.dequantize(), (weight.astype(np.float32) * scale.astype(np.float32)).astype(BF16))
    assert held_bytes(q) == weight.nbytes + scale.nbytes and q.activation.get("upper") == 1200.0


def test_llama4_experts():
    """gate_up_proj [E, H, 2I] scales its last axis, down_proj [E, I, H] too, but stores the scale as [E, H, 1]."""
    rng = np.random.default_rng(0)
    up, down = random_codes(rng, 2, 4, 6), random_codes(rng, 2, 3, 4)
    up_scale, down_scale = (
        rng.standard_normal((2, 1, 6)).astype(np.float32),
        rng.standard_normal((2, 4, 1)).astype(np.float32),
    )
    base = "model.layers.0.feed_forward.experts"
    tensors = {f"{base}.gate_up_proj": up, f"{base}.gate_up_proj_scale": up_scale}
    tensors |= {f"{base}.down_proj": down, f"{base}.down_proj_scale": down_scale}
    found = read(FORMAT, tensors, CONFIG)
    want = (up.astype(np.float32) * up_scale).astype(BF16).swapaxes(1, 2)
    assert_same(found[f"{base}.gate_up_proj"].dequantize(), want)
    want = (down.astype(np.float32).swapaxes(1, 2) * down_scale).astype(BF16)
    assert_same(found[f"{base}.down_proj"].dequantize(), want)
    assert FORMAT.parameter(f"{base}.down_proj") and not FORMAT.parameter(NAME)


def test_quantize():
    w = (np.random.default_rng(1).standard_normal((4, 16)) * 3).astype(BF16)
    w[2] = 0
    q = jq.FbgemmFp8(500.0).quantize(w, NAME)
    for i, row in enumerate(w.astype(np.float32)):
        scale = max(np.abs(row).max() / np.float32(448), np.float32(1 / (448 * 512)))
        assert np.asarray(q.scales)[i, 0] == scale
        np.testing.assert_array_equal(
            np.asarray(q.codes)[i], np.clip(row / scale, -448, 448).astype(E4M3).view(np.uint8)
        )
    parts = {f"{NAME}.{k}": v for k, v in FORMAT.dump(q).items()}
    again = read(FORMAT, parts, jq.FbgemmFp8(500.0).config(["lm_head"]))[NAME]
    assert again.activation.get("upper") == 500.0
    assert_same(again.dequantize(), q.dequantize())


def test_errors():
    weight = random_codes(np.random.default_rng(0), 4, 8)
    with pytest.raises(FormatError, match=r"down_proj.weight: float8 without .*weight_scale"):
        read(FORMAT, {f"{NAME}.weight": weight}, CONFIG)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": np.ones((8, 1), np.float32)}
    with pytest.raises(FormatError, match=r"weight_scale: found shape \(8, 1\), expected \(4, 1\)"):
        read(FORMAT, tensors, CONFIG)
    tensors[f"{NAME}.weight_scale"] = np.full((4, 1), np.nan, np.float32)
    with pytest.raises(FormatError, match="4 of 4 values are not finite"):
        read(FORMAT, tensors, CONFIG)
    with pytest.raises(FormatError, match="activation_scale_ub -1"):
        parse({**CONFIG, "activation_scale_ub": -1}, Context())
