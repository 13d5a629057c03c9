"""SpQR against the decoder of spqr_quant's C++ source, written down step by step in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jq.errors import FormatError, UnsupportedError
from jq.formats import spqr
from jq.formats.base import Context

HALF = np.float16


def checkpoint(seed: int, n: int, k: int, *, interleaved: bool, perm: bool, outliers: int) -> tuple[dict, np.ndarray]:
    """Stored tensors as `tensor_compress_interleaved` writes them, and the weight that `dequantize_compressed` reads."""
    rng = np.random.default_rng(seed)
    columns = -(-k // 16)
    words, weight = [], np.zeros((n, k), np.float32)
    for tile_row in range(n // 16):
        for tile_column in range(columns):
            ss, zs, sz, zz = (rng.random(4) * [0.02, 0.9, 6, 6] + 0.01).astype(HALF)
            packed = int(np.array([ss, zs, sz, zz], HALF).view(np.uint64)[0])
            for i in range(16):
                scale, zero = (int(v) for v in rng.integers(0, 8, 2))
                q = rng.integers(0, 8, 16)
                word = scale | zero << 3
                s, z = ss * (HALF(scale) - sz), zs * (HALF(zero) - zz)
                for j in range(16):
                    if tile_column * 16 + j < k:
                        word |= int(q[j]) << (6 + 3 * j)
                        weight[tile_row * 16 + i, tile_column * 16 + j] = s * (HALF(int(q[j])) - z)
                word |= (packed >> (8 * (i // 2)) & 0xFF) << 54
                words.append(word)
    lists: list[list[tuple[int, Any]]] = [[] for _ in range(n)]
    for _ in range(outliers):
        row, column, value = int(rng.integers(n)), int(rng.integers(k)), HALF(rng.standard_normal())
        lists[row].append((column, value))
        weight[row, column] += np.float32(value)

    def entry(column: int, value: Any) -> int:
        return column | int(np.asarray(value, HALF).view(np.uint16)) << 16

    offsets, entries = [0], []
    if interleaved:
        for start in range(0, n, 16):
            longest = max(len(lists[start + i]) for i in range(16))
            for step in range(longest):
                for i in range(16):
                    row_list = lists[start + i]
                    entries.append(entry(*row_list[step]) if step < len(row_list) else 0)
            offsets.append(len(entries))
    else:
        for row_list in lists:
            entries += [entry(*item) for item in row_list]
            offsets.append(len(entries))
    parts = {
        "dense_weights": np.array(words, np.uint64).view(np.int64),
        "row_offsets": np.array(offsets, np.int32),
        "col_vals": np.array(entries, np.uint32).view(np.int32) if entries else np.zeros(0, np.float32),
        "in_perm": np.zeros(0, np.int32),
    }
    weight = weight.astype(HALF)
    if perm:
        order = rng.permutation(k)
        parts["in_perm"] = order.astype(np.uint16).view(np.int32)
        out = np.empty_like(weight)
        out[:, order] = weight
        weight = out
    return parts, weight


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tiles=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    interleaved=st.booleans(),
    perm=st.booleans(),
    outliers=st.sampled_from([0, 1, 40]),
)
def test_decoding(seed: int, tiles: tuple[int, int], interleaved: bool, perm: bool, outliers: int) -> None:
    n, k = 16 * tiles[0], 16 * tiles[1]
    parts, want = checkpoint(seed, n, k, interleaved=interleaved, perm=perm, outliers=outliers)
    context = Context(config={"hidden_size": k}, label="test")
    q = spqr.load("m.q_proj", parts, spqr.parse({"bits": 3, "beta1": 16, "beta2": 16}, context), context)
    assert q.shape == (n, k)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).view(np.uint16), want.view(np.uint16))
    back = spqr.dump(q.to_jax())
    assert back.keys() == parts.keys()
    for name, array in back.items():
        assert array.dtype == parts[name].dtype and array.tobytes() == parts[name].tobytes(), name
    assert q.nbytes <= sum(a.nbytes for a in parts.values()) + 2 * n  # rows of codes end with whole bytes


def test_a_last_tile_that_is_not_full(cell) -> None:
    cell("spqr", "read", "write", "identical bits", "identical dequantize")
    parts, want = checkpoint(0, 16, 40, interleaved=False, perm=False, outliers=5)
    context = Context(config={"hidden_size": 40}, label="test")
    q = spqr.load("m.q_proj", parts, spqr.Options(), context)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want)
    assert all(array.tobytes() == parts[name].tobytes() for name, array in spqr.dump(q.to_jax()).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["row_offsets"].__setitem__(-1, 99), "at most 8 outliers"),
        (lambda p: p["col_vals"].__setitem__(0, 500), "an outlier in column 500 of 32"),
        (lambda p: p["dense_weights"].__setitem__(0, p["dense_weights"][0] | 1 << 62), "unused bits are set"),
        (lambda p: p.update(dense_weights=p["dense_weights"][:-1]), "fit no weight of tiles"),
        (lambda p: p.pop("col_vals"), "m.q_proj.col_vals: missing"),
        (lambda p: p.update(in_perm=np.zeros(16, np.int32)), "no permutation of 0..31"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    parts, _ = checkpoint(0, 16, 32, interleaved=False, perm=False, outliers=8)
    change(parts)
    with pytest.raises(FormatError, match=message):
        spqr.load("m.q_proj", parts, spqr.Options(), Context(config={"hidden_size": 32}))


def test_lengths_of_the_config_are_those_of_the_tensors() -> None:
    parts, want = checkpoint(0, 16, 32, interleaved=False, perm=True, outliers=5)
    context = Context(config={"hidden_size": 32}, label="test")
    shapes = {f"m.q_proj.{name}.shape": len(array) for name, array in parts.items()}
    q = spqr.load("m.q_proj", parts, spqr.parse({"shapes": shapes}, context), context)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want)
    options = spqr.parse({"shapes": shapes | {"m.q_proj.col_vals.shape": 6}}, context)
    with pytest.raises(FormatError, match=r"m\.q_proj\.col_vals: found 5 values, expected 6"):
        spqr.load("m.q_proj", parts, options, context)
    with pytest.raises(FormatError, match="shapes must map tensors to lengths"):
        spqr.parse({"shapes": [1]}, context)


def test_other_sizes() -> None:
    with pytest.raises(UnsupportedError, match="beta1 is 8; SpQR has only 16"):
        spqr.parse({"beta1": 8}, Context())
