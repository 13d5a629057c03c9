"""The kernels' order of codes and parameters is a bijection, and the plain twin of the decode reads it right."""

import jax
import jax.numpy as jnp
import kernel_weights as weights
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jq.qtensor import Affine, stack
from jq.qtensor.base import Grouping
from pallas_kernels import layout, reference, tensors

# One program each: operation by operation every one of them is compiled.
PACK = jax.jit(layout.pack_codes, static_argnums=1)
UNPACK = jax.jit(layout.unpack_codes, static_argnums=(1, 2))


@settings(max_examples=20, deadline=None)
@given(
    n=st.sampled_from((1, 16, 17, 70)),  # few shapes: each is compiled
    k=st.sampled_from((1, 63, 64, 200)),
    order=st.sampled_from(tuple(layout.BITS)),
    seed=st.integers(0, 99),
)
def test_codes_come_back(n, k, order, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << layout.BITS[order], (n, k), np.uint8)
    packed = PACK(jnp.asarray(codes), order)
    assert packed.shape == (-(-n // 16), -(-k // 64), 32 * layout.BITS[order])
    np.testing.assert_array_equal(UNPACK(packed, order, (n, k)), codes)


def test_position_of_one_code():
    """Row 13 (g = 5, upper half), input 16 * 2 + 8 + 2 * 3 + 1: lane 4g + t = 23, word 2, register 3, element 1."""
    codes = np.zeros((16, 64), np.uint8)
    codes[13, 47] = 15
    split = np.asarray(layout.pack_codes(jnp.asarray(codes), "split")).view(np.uint32).reshape(32, 4)
    natural = np.asarray(layout.pack_codes(jnp.asarray(codes), "natural")).view(np.uint32).reshape(32, 4)
    assert split[23, 2] == 15 << (4 * 3 + 16)
    assert natural[23, 2] == 15 << (8 * 3 + 4)
    wide = np.asarray(layout.pack_codes(jnp.asarray(codes), "bytes")).view(np.uint32).reshape(2, 32, 4)
    assert wide[1, 23, 1] == 15 << (8 + 16)  # step 2: the second piece; the second word of the step
    assert np.count_nonzero(wide) == 1
    assert np.count_nonzero(split) == np.count_nonzero(natural) == 1


def test_parameters_come_back():
    scales = np.random.default_rng(0).random((40, 3), np.float32)
    packed = layout.pack_rows(jnp.asarray(scales))
    np.testing.assert_array_equal(layout.unpack_rows(packed, 40), scales)
    np.testing.assert_array_equal(packed[0, 1, :4], scales[[0, 8, 1, 9], 1])


STACKED = (
    "mxfp4",
    "e4m3_one",
    "w8a16_signed_zeros",
    "w4a16_g128_asym",
    "w4a16_actorder",
    "w4a16_behind",
    "nf4_b64_dq",
    "nf4_b384",
)  # every field has an axis


@pytest.mark.parametrize("kind", weights.KINDS)
def test_restore_inverts_prepare(kind):
    q = weights.make(kind, 52, 4096 if kind == "nf4_b4096" else 512)
    for original in (q, stack([q, q])) if kind in STACKED else (q,):
        w = tensors.prepare(original)
        assert w.shape == original.shape and w.layout
        if original.ndim == 3:  # a kernel finds each array of weight i at i times its size
            assert {a.shape[0] for a in jax.tree.leaves(tensors.packed(w.replace(extras={})))} == {2}
        restored = tensors.restore(w)
        assert jax.tree.structure(restored) == jax.tree.structure(original)
        for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(restored), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", weights.KINDS)
def test_plain_twin_agrees_with_dequantize(kind):
    q = weights.make(kind, 52, 4096 if kind == "nf4_b4096" else 512)
    dense = np.asarray(reference.dense(tensors.packed(tensors.prepare(q))))
    expected = np.asarray(q.dequantize("float32"))
    # dequantize rounds to the tensor's own dtype; a float32 absmax is rounded to bfloat16 by prepare
    np.testing.assert_allclose(dense, expected, rtol=2**-7, atol=1e-3 * np.abs(expected).max())


def test_memory_stays():
    for kind, limit in (("w4a16_g128", 1.0), ("w4a16_g128_asym", 1.02), ("nf4_b64", 1.001), ("nf4_b64_dq", 1.001)):
        q = weights.make(kind, 256, 1024)
        assert tensors.prepare(q).nbytes <= limit * q.nbytes


def test_refusals_say_why():
    codes = jnp.zeros((32, 256), jnp.uint8)
    ones = jnp.ones((32, 2), jnp.bfloat16)
    group = Grouping("block", 1, 128)
    good = Affine.make(codes, ones, code_bits=4, zero_point=8, grouping=group)
    assert tensors.refusal(good) is None
    for q, word in (
        (Affine.make(codes, ones, code_bits=3, zero_point=4, grouping=group), "3-bit codes; kernels take 4 and 8"),
        (Affine.make(codes, ones, code_bits=4, zeros=ones.astype(jnp.int16) * 99, grouping=group), "near the codes"),
        (Affine.make(codes, jnp.ones((32, 11), jnp.bfloat16), code_bits=4, grouping=Grouping("block", 1, 24)), "24"),
        (good.replace(g_idx=jnp.zeros(256, jnp.int32)), "act-order"),
    ):
        assert word in tensors.refusal(q)
        with pytest.raises(ValueError, match=word):
            tensors.prepare(q)


def test_what_is_known_of_the_numbers():
    """Kernels are made for small scales and for codebooks that they hold, where `prepare` could see that it is so."""
    q = weights.make("w4a16_g128", 32, 256)
    assert tensors.packed(tensors.prepare(q)).form.small
    for value in (8.0, -8.0, np.nan, np.inf):
        large = q.replace(scales=q.scales.at[7, 1].set(value))
        prepared = tensors.prepare(large)
        assert not tensors.packed(prepared).form.small, value
        assert np.asarray(tensors.restore(prepared).scales).tobytes() == np.asarray(large.scales).tobytes()
    assert not tensors.packed(tensors.prepare(stack([q, large]))).form.small
    assert not jax.eval_shape(lambda q: tensors.packed(tensors.prepare(q)), q).form.small
    for kind, name in (("nf4_b64", "nf4"), ("nf4_b64_dq", "nf4"), ("mxfp4", "e2m1")):
        packed = tensors.packed(tensors.prepare(weights.make(kind, 32, 256)))
        assert packed.form.table == name and "table" not in packed.tables
    q = weights.make("nf4_b64", 32, 256)
    other = tensors.prepare(q.replace(table=q.table + 1e-4))
    assert tensors.packed(other).form.table == "" and len(tensors.packed(other).tables["table"]) == 16
    np.testing.assert_array_equal(tensors.restore(other).table, q.table + 1e-4)
