"""AQLM against a slow, obvious numpy version over random checkpoints, and against torch's own sum."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st

from jq.errors import FormatError, UnsupportedError
from jq.formats import aqlm
from jq.formats.base import Context
from jq.qtensor.vector_codebook import round_half_away

BF16 = np.dtype(ml_dtypes.bfloat16)
CONTEXT = Context(label="test")


def module(
    seed: int, rows: int, columns: int, dtype: Any, **config: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Random stored tensors of one module and its quantization_config."""
    rng = np.random.default_rng(seed)
    books, bits = config["num_codebooks"], config["nbits_per_codebook"]
    og, ig = config["out_group_size"], config["in_group_size"]
    codes = rng.integers(0, 2**bits, (rows, columns, books))
    codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    parts = {
        "codes": codes.astype(np.int8 if bits <= 8 else np.int16),
        "codebooks": rng.standard_normal((books, 2**bits, og, ig)).astype(dtype),
        "scales": (rng.random((rows, 1, 1, 1)) + 0.1).astype(dtype),
    }
    parts["codebooks"].reshape(-1)[::7] = -0.0
    return parts, {"quant_method": "aqlm", **config}


def slow(parts: dict[str, np.ndarray]) -> np.ndarray:
    """The definition, one vector at a time."""
    codes, books, scales = parts["codes"].astype(np.int64), parts["codebooks"], parts["scales"]
    rows, columns, count = codes.shape
    _, size, og, ig = books.shape
    out = np.zeros((rows * og, columns * ig), books.dtype)
    for r in range(rows):
        for c in range(columns):
            total = np.zeros((og, ig), np.float32)
            for m in range(count):
                total = total + books[m, codes[r, c, m] % size].astype(np.float32)
            if books.dtype == BF16:
                half = ((total.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16).view(BF16)
            else:
                half = total.astype(books.dtype)
            out[r * og : (r + 1) * og, c * ig : (c + 1) * ig] = half * scales[r, 0, 0, 0]
    return out


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    books=st.integers(1, 4),
    bits=st.sampled_from([1, 2, 5, 6, 8, 9, 12]),
    og=st.sampled_from([1, 2, 3]),
    ig=st.sampled_from([1, 2, 4, 8, 16]),
    dtype=st.sampled_from([np.float16, BF16, np.float32]),
    turn=TURNS,
)
def test_any_sizes(
    seed: int, rows: int, columns: int, books: int, bits: int, og: int, ig: int, dtype: Any, turn: int
) -> None:
    sizes = {"num_codebooks": books, "nbits_per_codebook": bits, "out_group_size": og, "in_group_size": ig}
    parts, config = module(seed, rows, columns, dtype, **sizes)
    q = aqlm.load("m", parts, aqlm.parse(config, CONTEXT), CONTEXT)
    assert q.shape == (rows * og, columns * ig)
    got, want = dense(q, turn), slow(parts)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{want.itemsize}"))
    for name, array in aqlm.dump(q.to_jax()).items():
        assert array.dtype == parts[name].dtype and array.shape == parts[name].shape
        assert array.tobytes() == parts[name].tobytes()
    assert q.nbytes <= 1.02 * sum(a.nbytes for a in parts.values()) + 8 * rows


def test_sixteen_bits_use_both_signs() -> None:
    sizes = {"num_codebooks": 1, "nbits_per_codebook": 16, "out_group_size": 1, "in_group_size": 2}
    parts, config = module(3, 4, 8, np.float16, **sizes)
    parts["codes"][0, :4, 0] = [-32768, -1, 0, 32767]
    q = aqlm.load("m", parts, aqlm.parse(config, CONTEXT), CONTEXT)
    assert np.asarray(q.unpack())[0, :4, 0].tolist() == [32768, 65535, 0, 32767]
    np.testing.assert_array_equal(np.asarray(q.dequantize()), slow(parts))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sum_rounds_as_torch(dtype: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    import torch

    rng = np.random.default_rng(0)
    parts, config = module(1, 32, 16, dtype, num_codebooks=3, nbits_per_codebook=8, out_group_size=2, in_group_size=8)
    kind = getattr(torch, dtype)

    def tensor(a: np.ndarray) -> Any:
        return torch.from_numpy(a.astype(np.float32)).to(kind)

    codes = torch.from_numpy(parts["codes"].astype(np.int64) % 256).flatten(0, -2) + torch.arange(0, 3 * 256, 256)
    vectors = torch.nn.functional.embedding_bag(
        codes, tensor(parts["codebooks"]).flatten(0, 1).flatten(-2, -1), mode="sum"
    )
    want = vectors.view(32, 16, 2, 8).mul(tensor(parts["scales"])).swapaxes(-3, -2).reshape(64, 128)
    q = aqlm.load("m", parts, aqlm.parse(config, CONTEXT), CONTEXT)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), want.float().numpy())
    del rng


def test_half_away_is_not_half_even() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)  # halfway between two bfloat16 values
    assert round_half_away(ties).astype(np.float32).tolist() == [1 + 2**-7, 1 + 2**-6, -1 - 2**-7]
    assert ties.astype(BF16).astype(np.float32).tolist() == [1.0, 1 + 2**-6, -1.0]


GOOD = {"num_codebooks": 2, "nbits_per_codebook": 6, "out_group_size": 1, "in_group_size": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("scales"), "m.scales: missing"),
        (lambda p: p.update(codes=p["codes"].astype(np.int16)), "m.codes: found dtype int16, expected int8"),
        (lambda p: p["codes"].__setitem__((0, 0, 0), 40), r"values -\d+..40 are outside -32..31"),
        (lambda p: p.update(codebooks=p["codebooks"][:1]), r"found shape \(1, 64, 1, 8\), expected \(2, 64, 1, 8\)"),
        (lambda p: p.update(codes=p["codes"].swapaxes(0, 1)), "first two axes are swapped"),
        (lambda p: p.update(scales=p["scales"].astype(np.float32)), "m.scales: found dtype float32, expected float16"),
        (lambda p: p["codebooks"].__setitem__((0, 0, 0, 0), np.nan), "1 of 1024 values are not finite"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    parts, config = module(0, 4, 6, np.float16, **GOOD)
    change(parts)
    with pytest.raises(FormatError, match=message):
        aqlm.load("m", parts, aqlm.parse(config, CONTEXT), CONTEXT)


def test_config_errors() -> None:
    with pytest.raises(FormatError, match="num_codebooks is 0"):
        aqlm.parse({"num_codebooks": 0}, CONTEXT)
    with pytest.raises(UnsupportedError, match="up to 16 bits"):
        aqlm.parse({"nbits_per_codebook": 20}, CONTEXT)


def test_rows_can_be_sliced() -> None:
    parts, config = module(5, 6, 4, np.float16, **{**GOOD, "out_group_size": 2})
    q = aqlm.load("m", parts, aqlm.parse(config, CONTEXT), CONTEXT)
    np.testing.assert_array_equal(np.asarray(q[2:8].dequantize()), np.asarray(q.dequantize())[2:8])
    with pytest.raises(ValueError, match="rows cannot be sliced"):
        q[1:4]
