"""MXFP4 of gpt-oss: blocks and scales against plain numpy, quantization by the OCP rule, errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same, held_bytes, read
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import FormatError
from jq.formats.mxfp4 import FORMAT

NAME = "model.layers.0.mlp.experts.gate_up_proj"
BF16 = ml_dtypes.bfloat16
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32))
def test_experts(experts, n, groups, seed):
    """Low nibble first, -0 kept, scale byte 0 is 2**-127; the bias is no part of the tensor."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, n, groups, 16)).astype(np.uint8)
    scales = rng.integers(0, 255, (experts, n, groups)).astype(np.uint8)
    scales[0, 0, 0] = 0
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, f"{NAME}_bias": np.ones((experts, n), BF16)}
    q = read(FORMAT, tensors, CONFIG)[NAME]
    values = FP4[np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, n, groups, 32)]
    with np.errstate(over="ignore"):
        want = (values * (2.0 ** (scales.astype(np.float64) - 127))[..., None]).astype(BF16)
    assert_same(q.dequantize(), want.reshape(experts, n, 32 * groups))
    assert held_bytes(q) == blocks.nbytes + scales.nbytes
    assert_same(q[0].dequantize(), want[0].reshape(n, -1))


def test_quantize():
    """Exponent floor(log2(amax)) - 2: a group whose largest value is 7.9 saturates at 6."""
    w = np.zeros((1, 2, 32), np.float32)
    w[0, 0, :4] = [7.9, 0.25, -1.25, 5.0]
    q = jq.MXFP4("floor").quantize(w, NAME)
    np.testing.assert_array_equal(np.asarray(q.dequantize(np.float32))[0, 0, :4], [6, 0, -1, 4])
    np.testing.assert_array_equal(np.asarray(q.scales), [[[127], [0]]])
    parts = {f"{NAME}_{k}": v for k, v in FORMAT.dump(q).items()}
    assert_same(read(FORMAT, parts, jq.MXFP4().config())[NAME].dequantize(), q.dequantize())


def test_errors():
    blocks, scales = np.zeros((2, 3, 1, 16), np.uint8), np.zeros((2, 3, 1), np.uint8)
    with pytest.raises(FormatError, match="gate_up_proj_scales: missing"):
        read(FORMAT, {f"{NAME}_blocks": blocks}, CONFIG)
    with pytest.raises(FormatError, match=r"gate_up_proj_scales: found shape \(2, 3, 2\), expected \(2, 3, 1\)"):
        read(FORMAT, {f"{NAME}_blocks": blocks, f"{NAME}_scales": np.zeros((2, 3, 2), np.uint8)}, CONFIG)
    with pytest.raises(FormatError, match=r"gate_up_proj_blocks: found shape \(2, 3, 1, 8\)"):
        read(FORMAT, {f"{NAME}_blocks": blocks[..., :8], f"{NAME}_scales": scales}, CONFIG)
    with pytest.raises(FormatError, match="experts"):
        jq.MXFP4().quantize(np.zeros((4, 32), np.float32), NAME)
