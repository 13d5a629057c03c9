"""The quantized tensors as pytrees, and their arithmetic against slow numpy versions."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from format_reading import TURNS, dense
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq import exact
from jq.errors import FormatError
from jq.qtensor import Affine, Codebook, Grouping, NarrowFloat, stack

BF16 = ml_dtypes.bfloat16


def affine(seed: int = 0, n: int = 8, k: int = 64, group: int = 32, bits: int = 4, **fields) -> Affine:
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    return Affine.make(
        rng.integers(0, 1 << bits, (n, k)),
        rng.standard_normal((n, groups)).astype(np.float16),
        zeros=rng.integers(0, 1 << bits, (n, groups)),
        zeros_bits=bits,
        code_bits=bits,
        grouping=Grouping("block", 1, group),
        **fields,
    )


def codebook(seed: int = 0, n: int = 8, k: int = 64, block: int = 64) -> Codebook:
    rng = np.random.default_rng(seed)
    flat = (n * k) % block or k % block
    absmax = rng.random(-(-n * k // block) if flat else (n, k // block)).astype(np.float32)
    grouping = Grouping("flat", 0, block) if flat else Grouping("block", 1, block)
    table = np.sort(rng.standard_normal(16)).astype(np.float32)
    return Codebook.make(rng.integers(0, 16, (n, k)), table, absmax, code_bits=4, grouping=grouping)


def nested(seed: int = 0, n: int = 8, k: int = 64) -> Codebook:
    rng = np.random.default_rng(seed)
    outer = codebook(seed, n, k)
    inner = Codebook.make(
        rng.integers(0, 256, (n, k // 64)),
        np.sort(rng.standard_normal(256)).astype(np.float32),
        rng.random(-(-n * (k // 64) // 256)).astype(np.float32),
        code_bits=8,
        grouping=Grouping("flat", 0, 256),
        offset=np.float32(0.25),
        dtype="float32",
    )
    return outer.replace(absmax=inner)


def narrow(seed: int = 0, n: int = 8, k: int = 64) -> NarrowFloat:
    rng = np.random.default_rng(seed)
    return NarrowFloat.make(rng.integers(0, 126, (n, k)), rng.random((n, 1)).astype(np.float32), kind="e4m3fn")


def packed_float(seed: int = 0, n: int = 8, k: int = 64) -> NarrowFloat:
    rng = np.random.default_rng(seed)
    scales = rng.integers(118, 130, (n, k // 32)).astype(np.uint8)
    return NarrowFloat.make(
        rng.integers(0, 16, (n, k)),
        scales,
        kind="e2m1",
        scale_kind="e8m0",
        grouping=Grouping("block", 1, 32),
        formula="own",
    )


MAKERS = {"affine": affine, "codebook": codebook, "nested": nested, "narrow": narrow, "packed float": packed_float}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@every
def test_transformations_agree(make) -> None:
    one, two = make(0), make(1)
    both = stack([one, two])
    want = np.stack([np.asarray(one.dequantize()), np.asarray(two.dequantize())])
    assert both.shape == (2, 8, 64) and both[1].shape == (8, 64) and len(both) == 2
    np.testing.assert_array_equal(both.dequantize(), want)
    np.testing.assert_array_equal(both[1].dequantize(), want[1])
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(one), want[0])
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(both), want)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, both)[1], want)
    shape = jax.eval_shape(lambda q: q.dequantize(), one)
    assert shape.shape == (8, 64) and shape.dtype == want.dtype
    assert repr(one).startswith(f"{type(one).__name__}(8x64, ")
    assert "..." in repr(jax.tree.map(lambda _: object(), one))
    assert jax.tree.structure(one) == jax.tree.structure(two)


@every
def test_dequantized_values_keep_their_rounding_when_widened(make) -> None:
    tensor = make(0)
    want = np.asarray(tensor.dequantize()).astype(np.float32)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), want)
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize(jnp.float32) * 1)(tensor), want)


@every
def test_numpy_and_jax_arrays_give_the_same(make) -> None:
    tensor = make(0)
    np.testing.assert_array_equal(np.asarray(tensor._dense()), np.asarray(tensor.to_jax().dequantize()))


@every
def test_second_tensor_of_equal_statics_compiles_nothing(make) -> None:
    function = jax.jit(lambda q: q.dequantize(jnp.float32).sum())
    function(make(0).to_jax())
    function(make(1).to_jax())
    assert function._cache_size() == 1


@every
def test_donation_reuses_the_buffers(make) -> None:
    tensor = make(0).to_jax()
    leaves = jax.tree.leaves(tensor)
    out = jax.jit(lambda q: jax.tree.map(lambda a: a, q), donate_argnums=0)(tensor)
    assert type(out) is type(tensor) and all(leaf.is_deleted() for leaf in leaves)


@every
def test_the_form_of_few_rows_on_a_gpu(make, monkeypatch) -> None:
    """Multiply and reduce: the same product, also in a vmap; rows beyond it take a dot."""
    module = importlib.import_module("jq.matmul")  # `jq.matmul` itself is the function
    monkeypatch.setattr(module, "_on_gpu", lambda: True)
    tensor = make(0).to_jax()
    dense = np.asarray(tensor.dequantize()).astype(np.float32)
    for rows in (1, module.FUSED_ROWS, module.FUSED_ROWS + 1):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        lowered = jax.jit(lambda x, w: jq.matmul(x, w, impl="jnp")).lower(x, tensor).as_text()
        assert ("dot_general" in lowered) == (rows > module.FUSED_ROWS)
        np.testing.assert_allclose(jq.matmul(x, tensor, impl="jnp"), x @ dense.T, rtol=1e-5, atol=1e-4)
    many = jax.vmap(lambda x: jq.matmul(x, tensor, impl="jnp"))(x)
    np.testing.assert_allclose(many, x @ dense.T, rtol=1e-5, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_matmul_and_its_gradient(make, dtype) -> None:
    tensor = make(0)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 64)), dtype)
    dense = np.asarray(tensor.dequantize()).astype(dtype).astype(np.float64)
    got = np.asarray(jq.matmul(x, tensor, impl="jnp")).astype(np.float64)
    want = np.asarray(x).astype(np.float64) @ dense.T
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert got.shape == (2, 3, 8)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    gradient = jax.grad(lambda x: jq.matmul(x, tensor).astype(jnp.float32).sum())(x)
    np.testing.assert_allclose(
        np.asarray(gradient).astype(np.float64),
        np.broadcast_to(dense.sum(0), x.shape),
        rtol=tolerance,
        atol=tolerance * np.abs(dense).max() * 8,
    )


@every
def test_lives_in_nnx_and_orbax(make, tmp_path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

    class Module(nnx.Module):
        def __init__(self, tensor):
            self.weight = jq.nn.QVar(tensor)

    module = Module(make(0).to_jax())
    graph, state = nnx.split(module)
    merged = nnx.merge(graph, state)
    want = np.asarray(make(0).dequantize())
    np.testing.assert_array_equal(merged.weight.get_value().dequantize(), want)
    np.testing.assert_array_equal(nnx.jit(lambda m: m.weight.get_value().dequantize())(module), want)
    checkpointer = orbax.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", target))
    np.testing.assert_array_equal(restored.weight.get_value().dequantize(), want)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(1, 8), n=st.integers(1, 5), k=st.integers(1, 70), group=st.integers(1, 80), seed=st.integers(0, 2**32 - 1),
    order=st.booleans(), dtype=st.sampled_from([np.float16, BF16, np.float32]), turn=TURNS,
)  # fmt: skip
def test_affine_against_a_loop(bits, n, k, group, seed, order, dtype, turn) -> None:
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(0, 1 << bits, (n, groups))
    scales = rng.standard_normal((n, groups)).astype(dtype)
    g_idx = rng.integers(0, groups, k).astype(np.int32) if order else None
    tensor = Affine.make(
        codes, scales, zeros=zeros, zeros_bits=bits, code_bits=bits, g_idx=g_idx, grouping=Grouping("block", 1, group)
    )
    got = dense(tensor, turn)
    assert got.dtype == dtype and got.shape == (n, k)
    np.testing.assert_array_equal(np.asarray(tensor.unpack()), codes)
    for row in range(n):
        for col in range(k):
            g = col // group if g_idx is None else g_idx[col]
            want = scales[row, g] * dtype(int(codes[row, col]) - int(zeros[row, g]))
            assert got[row, col] == want


@pytest.mark.parametrize("kind", ["flat", "strided"])
@pytest.mark.parametrize(("n", "k", "group"), [(3, 20, 12), (4, 64, 32), (1, 24, 8), (6, 10, 4)])
def test_groups_of_the_flattened_weight(kind: str, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(0)
    groups = n * k // group
    codes, scales, zeros = (
        rng.integers(0, 16, (n, k)),
        rng.standard_normal(groups).astype(np.float32),
        rng.random(groups).astype(np.float32),
    )
    tensor = Affine.make(codes, scales, zeros=zeros, code_bits=4, grouping=Grouping(kind, 0, group))
    element = np.arange(n * k)
    index = (element // group if kind == "flat" else element % groups).reshape(n, k)
    want = (codes.astype(np.float32) - zeros[index]) * scales[index]
    np.testing.assert_array_equal(tensor.dequantize(), want)


@pytest.mark.parametrize(
    ("n", "k", "rows", "cols"), [(5, 70, 2, 32), (128, 64, 128, 64), (3, 9, 0, 0), (3, 9, 1, 0), (7, 6, 0, 4)]
)
def test_blocks_with_ragged_edges(n: int, k: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(0)
    grid = (1 if not rows else -(-n // rows), 1 if not cols else -(-k // cols))
    codes, scales = rng.integers(0, 126, (n, k)), rng.random(grid).astype(np.float32)
    tensor = NarrowFloat.make(codes, scales, kind="e4m3fn", grouping=Grouping("block", rows, cols), dtype="float32")
    index_n, index_k = np.arange(n) // (rows or n), np.arange(k) // (cols or k)
    want = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[index_n][:, index_k]
    np.testing.assert_array_equal(tensor.dequantize(), want)


@pytest.mark.parametrize("formula", ["mul_sub", "mul_add", "fma"])
def test_formulas_round_where_they_say(formula: str) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (16, 64))
    scales, zeros = rng.standard_normal((16, 2)).astype(np.float16), rng.standard_normal((16, 2)).astype(np.float16)
    tensor = Affine.make(codes, scales, zeros=zeros, code_bits=4, grouping=Grouping("block", 1, 32), formula=formula)
    s, z = np.repeat(scales, 32, 1), np.repeat(zeros, 32, 1)
    q = codes.astype(np.float16)
    wants = {"mul_sub": s * q - z, "mul_add": s * q + z, "fma": exact.fma(q, s, z, np.float16)}
    np.testing.assert_array_equal(tensor.dequantize(), wants[formula])
    np.testing.assert_array_equal(jax.jit(lambda t: t.dequantize())(tensor), wants[formula])
    assert (wants["mul_add"] != wants["fma"]).any()


def test_rows_can_be_sliced_where_blocks_end_with_rows() -> None:
    for tensor in (affine(), codebook(), narrow()):
        np.testing.assert_array_equal(tensor[2:5].dequantize(), np.asarray(tensor.dequantize())[2:5])
    with pytest.raises(ValueError, match="blocks do not end with rows"):
        codebook(n=4, k=96, block=64)[1:2]
    with pytest.raises(TypeError, match="a slice or an integer array"):
        affine()[1]


ROW_MAKERS = {"affine": affine, "codebook": codebook, "narrow": narrow, "packed float": packed_float}


@pytest.mark.parametrize("make", ROW_MAKERS.values(), ids=ROW_MAKERS.keys())
def test_rows_by_number(make) -> None:
    tensor, rows = make(0), np.array([3, 0, 3, 7])
    want = np.asarray(tensor.dequantize())[rows]
    np.testing.assert_array_equal(tensor[rows].dequantize(), want)
    np.testing.assert_array_equal(jax.jit(lambda t, i: t[i].dequantize())(tensor, jnp.asarray(rows)), want)
    for wrong in (np.array([8]), np.array([-9, 0])):
        with pytest.raises(IndexError, match="of a tensor of 8"):
            tensor[wrong]
    for wrong in (np.array([[1]]), np.array([1.0]), [1]):
        with pytest.raises(TypeError, match="a slice or an integer array"):
            tensor[wrong]


@pytest.mark.parametrize("rows", [3, 8, 5])
def test_rows_by_number_of_blocks(rows: int) -> None:
    rng, grouping = np.random.default_rng(0), Grouping("block", rows, 32)
    scales = rng.random((-(-11 // rows), 2)).astype(np.float32)
    float8 = NarrowFloat.make(rng.integers(0, 126, (11, 64)), scales, kind="e4m3fn", grouping=grouping)
    integers = Affine.make(
        rng.integers(0, 16, (11, 64)),
        scales,
        zeros=rng.integers(0, 16, scales.shape),
        zeros_bits=4,
        code_bits=4,
        grouping=grouping,
    )
    for tensor in (float8, integers):
        wanted = np.array([10, 0, 4, -3, -11])
        np.testing.assert_array_equal(tensor[wanted].dequantize(), np.asarray(tensor.dequantize())[wanted])
        with pytest.raises(ValueError, match="blocks do not end with rows"):
            tensor[0:1]


def test_rows_by_number_need_blocks_that_end_with_rows() -> None:
    for tensor in (codebook(n=4, k=96, block=64), nested()):
        with pytest.raises(ValueError, match="blocks do not end with rows"):
            tensor[np.array([1])]


def test_parts_that_do_not_fit_are_named() -> None:
    codes, scales = np.zeros((4, 64), np.int32), np.ones((4, 2), np.float16)
    group = Grouping("block", 1, 32)
    with pytest.raises(FormatError, match=r"a\.b: scales of shape \(4, 1\), expected \(4, 2\)"):
        Affine.make(codes, scales[:, :1], code_bits=4, grouping=group, name="a.b")
    with pytest.raises(FormatError, match=r"a\.b: scales: 1 of 8 values are not finite \(first at \(2, 1\)\)"):
        bad = scales.copy()
        bad[2, 1] = np.nan
        Affine.make(codes, bad, code_bits=4, grouping=group, name="a.b")
    with pytest.raises(FormatError, match=r"a\.b: g_idx: values 0\.\.2 are outside 0\.\.1"):
        Affine.make(codes, scales, code_bits=4, grouping=group, g_idx=np.arange(64, dtype=np.int32) % 3, name="a.b")
    with pytest.raises(FormatError, match=r"g_idx: values -1\.\.1"):
        Affine.make(codes, scales, code_bits=4, grouping=group, g_idx=np.arange(64, dtype=np.int32) % 3 - 1)
    with pytest.raises(FormatError, match="g_idx has 63 entries"):
        Affine.make(codes, scales, code_bits=4, grouping=group, g_idx=np.zeros(63, np.int32))
    with pytest.raises(FormatError, match="unknown dequantization formula 'x'"):
        Affine.make(codes, scales, code_bits=4, grouping=group, formula="x")
    with pytest.raises(FormatError, match="table of 8 entries, expected 16"):
        Codebook.make(codes, np.zeros(8, np.float32), np.ones((4, 1), np.float32), code_bits=4)
    with pytest.raises(FormatError, match=r"absmax of shape \(4, 2\) does not fit"):
        Codebook.make(codes, np.zeros(16, np.float32), np.ones((4, 2), np.float32), code_bits=4)
    with pytest.raises(FormatError, match="unknown float kind 'e9m9'"):
        NarrowFloat.make(codes, np.ones((4, 1), np.float32), kind="e9m9")
    with pytest.raises(FormatError, match=r"scales of shape \(3, 1\), expected \(4, 1\)"):
        NarrowFloat.make(codes, np.ones((3, 1), np.float32), kind="e4m3fn")


def test_matmul_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(2, 63\) does not fit a weight of shape \(8, 64\)"):
        jq.matmul(jnp.zeros((2, 63)), affine())
    with pytest.raises(ValueError, match="impl must be None"):
        jq.matmul(jnp.zeros((2, 64)), affine(), impl="cuda")  # type: ignore[arg-type]
    assert jq.matmul(jnp.zeros((0, 64)), affine()).shape == (0, 8)


def test_sizes_are_told() -> None:
    tensor = affine()
    assert tensor.nbytes == 8 * 64 // 2 + 8 * 2 * 2 + 8 * 1
    assert tensor.bits_per_weight == pytest.approx(8 * tensor.nbytes / 512)
    assert tensor.replace(extras={"bias": np.zeros(8)}).bits_per_weight == tensor.bits_per_weight
    assert tensor.size == 512 and tensor.ndim == 2 and tensor.in_features == 64 and tensor.out_features == 8


def affine_of(**fields):
    codes = np.arange(32, dtype=np.uint8).reshape(4, 8) % 16
    scales = fields.pop("scales", np.ones((4, 2), np.float16))
    return Affine.make(codes, scales, code_bits=4, **{"grouping": Grouping("block", 1, 4), **fields})


FLAT, STRIDED = Grouping("flat", 0, 4), Grouping("strided", 0, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"zeros": np.ones((2, 2), np.float16)},
        {"zeros": np.ones(8, np.float16)},
        {"zeros": np.ones((4, 1), np.float16), "g_idx": np.repeat(np.arange(2, dtype=np.int32), 4)},
        {"scales": np.ones(7, np.float16), "grouping": FLAT},
        {"scales": np.ones(8, np.float16), "zeros": np.ones(7, np.float16), "grouping": FLAT},
        {"scales": np.ones(7, np.float16), "grouping": STRIDED},
        {"scales": np.ones(9, np.float16), "grouping": STRIDED},
    ],
)
def test_scales_and_zeros_that_do_not_fit_are_refused(fields):
    with pytest.raises(FormatError, match=r"layer: (zeros of shape|\d scales|\d zeros)"):
        affine_of(name="layer", **fields)


def test_a_stack_ends():
    stacked = stack([affine_of().to_jax() for _ in range(2)])
    assert [q.shape for q in stacked] == [(4, 8), (4, 8)] and stacked[-2].shape == (4, 8)
    for index in (2, -3, np.int64(2), (2,)):
        with pytest.raises(IndexError, match="of a stack of 2"):
            stacked[index]
    twice = stack([stacked] * 3)
    np.testing.assert_array_equal(twice[2, 1].dequantize(), affine_of().dequantize())
    for index in ((0, 2), (np.int32(3), 0), (slice(None), -3)):
        with pytest.raises(IndexError, match=r"of a stack of [23]"):
            twice[index]
    for index in ((0, 0, 0), ..., None):  # would cut rows and columns of codes and scales alike
        with pytest.raises(IndexError, match=r"indices into 2 leading axes|leading axes are taken by"):
            twice[index]


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64])
def test_matmul_takes_floats(dtype):
    for w in (affine_of(), np.ones((4, 8), np.float32)):
        with pytest.raises(ValueError, match=f"x has dtype {np.dtype(dtype)}, expected float32"):
            jq.matmul(np.ones((2, 8), dtype), w)
