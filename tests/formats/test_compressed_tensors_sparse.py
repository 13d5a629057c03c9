"""compressed-tensors: masks, 2 of 4 and marlin-24 against slow, obvious numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same, held_bytes, named, read
from format_reading import compressed_tensors_config as config
from hypothesis import given, settings
from hypothesis import strategies as st

from jq.errors import FormatError
from jq.formats import compressed_tensors_sparse as sparse
from jq.formats.compressed_tensors import FORMAT
from jq.formats.marlin import tile

NAME = "model.layers.0.self_attn.q_proj"
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
E4M3 = ml_dtypes.float8_e4m3fn


def masked(mask, values):
    return {"bitmask": np.packbits(mask, axis=1, bitorder="little"), "compressed": values}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from(["", "weight."]),
    st.integers(0, 2**32),
)
def test_sparse_bitmask(n, k, share, lead, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((n, k)) < share
    values = rng.standard_normal(int(mask.sum())).astype(ml_dtypes.bfloat16)
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1))[:-1]]).astype(np.int64)
    parts = {**masked(mask, values), "shape": np.array([n, k], np.int64), "row_offsets": offsets}
    tensors = named({lead + key: v for key, v in parts.items()})
    sparsity = {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": [], "sparsity_structure": "unstructured"}
    q = read(FORMAT, tensors, {"quant_method": "compressed-tensors", "sparsity_config": sparsity})[NAME]
    dense = np.zeros((n, k), values.dtype)
    dense[mask] = values
    assert_same(q.dequantize(), dense)
    assert held_bytes(q) <= sum(v.nbytes for v in parts.values())


def two_of_four(rng, n, k):
    mask = np.zeros((n * k // 4, 4), bool)
    for row in mask:
        row[rng.permutation(4)[:2]] = True
    return mask.reshape(n, k)


@pytest.mark.parametrize("kind", ["float", "int"])
def test_sparse_24_on_codes(kind):
    """2:4 masks over fp8 and int8 codes: the values are read as stored, a code of -128 that the writer lost stays lost."""
    rng = np.random.default_rng(3)
    n, k = 6, 24
    mask = two_of_four(rng, n, k)
    raw = rng.integers(0, 120, (n, k // 2)).astype(np.uint8)
    values = raw.view(E4M3) if kind == "float" else raw.view(np.int8)
    values[0, 0] = 0  # what abs(-128) = -128 made of the largest code
    scales = rng.standard_normal((n, 1)).astype(np.float32)
    parts = {**masked(mask, values), "shape": np.array([[n], [k]], np.int64), "weight_scale": scales}
    args = {"num_bits": 8, "type": kind, "strategy": "channel"}
    cfg = config(args, form=f"{kind}-quantized", sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]})
    q = read(FORMAT, named(parts), cfg)[NAME]
    codes = np.zeros((n, k), values.dtype)
    codes[mask] = values.reshape(-1)
    assert_same(q.dequantize(), codes.astype(np.float32) * scales)
    assert held_bytes(q) <= sum(v.nbytes for v in parts.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_marlin_24(bits, groups):
    """Codes, metadata and scales back from their tiles. (A file of the library, 4 bits, is among the references.)"""
    rng = np.random.default_rng(bits + groups)
    n, k, half = 64, 512, 1 << (bits - 1)
    mask = two_of_four(rng, n, k)
    codes = rng.integers(-half, half, (n, k // 2))
    places = np.nonzero(mask)[1].reshape(n, k // 2)
    scales = rng.uniform(0.01, 1, (groups, n)).astype(np.float16)
    order = sparse._SHORT if groups > 1 else sparse._IDENTITY
    parts = {
        "weight_packed": tile(np.ascontiguousarray(codes.T) + half, bits, sparse=True),
        "meta": sparse._metadata(places, n, k),
        "scale_packed": scales.reshape(-1, 64)[:, order].reshape(scales.shape),
    }
    assert parts["weight_packed"].shape == (k // 32, n * bits // 2) and parts["meta"].shape == (k // 32, 2 * n)
    args = (
        {"num_bits": bits, "strategy": "group", "group_size": 128}
        if groups > 1
        else {"num_bits": bits, "strategy": "channel"}
    )
    q = read(FORMAT, named(parts), config(args, form="marlin-24"))[NAME]
    dense = np.zeros((n, k), np.float16)
    dense[mask] = codes.reshape(-1)
    assert_same(q.dequantize(), dense * np.repeat(scales.T, k // groups, 1))
    assert held_bytes(q) == sum(v.nbytes for v in parts.values())


def test_marlin_metadata_out_of_order():
    n = 64
    parts = {
        "weight_packed": np.zeros((1, 128), np.int32),
        "meta": np.zeros((1, 128), np.int16),
        "scale_packed": np.ones((1, n), np.float16),
    }
    with pytest.raises(FormatError, match=r"q_proj.meta: metadata names the places of a quad out of order"):
        read(FORMAT, named(parts), config({"num_bits": 4, "strategy": "channel"}, form="marlin-24"))
    with pytest.raises(FormatError, match="holds symmetric int4 and int8 only"):
        read(FORMAT, named(parts), config({"num_bits": 3, "strategy": "channel"}, form="marlin-24"))


def test_mask_that_does_not_count():
    mask = np.ones((2, 8), bool)
    parts = {**masked(mask, np.ones(15, np.float16)), "shape": np.array([2, 8]), "row_offsets": np.array([0, 8])}
    with pytest.raises(FormatError, match=r"q_proj.*keeps 16 values, but 15"):
        read(FORMAT, named(parts), {"sparsity_config": {"format": "sparse-bitmask"}})
