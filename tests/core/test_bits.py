"""Packing: inverse of itself for every width and shape, equal to a slow bit-by-bit version, the same under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jq import bits as jbits

PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}


def slow_stream(row: np.ndarray, bits: int) -> bytes:
    """Little-endian bit stream of a row, built with Python integers."""
    value = sum((int(c) & ((1 << bits) - 1)) << (i * bits) for i, c in enumerate(row))
    return value.to_bytes(-(-len(row) * bits // 8), "little")


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 16), count=st.integers(1, 70), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_pack_is_a_little_endian_stream(bits: int, count: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    packed = jbits.pack(codes, bits)
    assert packed.dtype == jbits.word_dtype(bits, count) and packed.shape[-1] == -(
        -count * bits // (8 * packed.dtype.itemsize)
    )
    for row, words in zip(codes, packed):
        assert words.tobytes()[: -(-count * bits // 8)] == slow_stream(row, bits)
    np.testing.assert_array_equal(jbits.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", ["i1", "u1", "i2", "u2", "i4", "u4"])
def test_streams_in_words_of_any_kind_along_either_axis(bits: int, word: str) -> None:
    """The stream is bytes in memory: how wide and how signed a file calls its words changes no code."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 32))
    codes[0], codes[1, ::2] = (1 << bits) - 1, 0  # every sign bit set, and none beside some
    words = np.frombuffer(b"".join(slow_stream(row, bits) for row in codes), word).reshape(3, -1)

    def both_ways(words, codes):
        rows, columns = jbits.unpack(words, bits), jbits.unpack(words.T, bits, axis=0)
        return rows, columns, jbits.unpack(words.T, bits, 31, axis=0), jbits.pack(codes.T, bits, axis=0)

    compiled = [jax.jit(both_ways)] if word == "u4" or bits in (3, 8) else []  # over words, and inside them
    for function in (both_ways, *compiled):
        rows, columns, fewer, packed = function(words, codes)
        np.testing.assert_array_equal(rows, codes)
        np.testing.assert_array_equal(columns, codes.T)
        np.testing.assert_array_equal(fewer, codes.T[:31])
        assert packed.shape == (bits, 3) and np.ascontiguousarray(packed.T).tobytes() == words.tobytes()


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("word", ["u1", "u4"])
def test_streams_without_a_gather(bits: int, word: str) -> None:
    """The form that runs on GPUs, with every number of words up to two periods: the last period may be cut anywhere."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 64))
    codes[0] = (1 << bits) - 1
    words = np.frombuffer(b"".join(slow_stream(row, bits) for row in codes), word).reshape(2, -1)
    width = 8 * words.dtype.itemsize
    for count in {width * kept // bits for kept in (1, 2, 3, bits, bits + 1, words.shape[1])} - {0}:
        kept = min(-(-count * bits // width), words.shape[1])
        count = min(count, kept * width // bits, 64)
        got = jbits._select_stream(jnp.asarray(words[:, :kept]), bits, count)
        np.testing.assert_array_equal(got, codes[:, :count])


def test_words_that_are_no_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="words are float32, expected integers"):
        jbits.unpack(np.ones((2, 3), np.float32), 4)


@settings(deadline=None, max_examples=30)
@given(bits=st.integers(1, 8), count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_signed_codes_come_back(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-(1 << (bits - 1)), 1 << (bits - 1), (2, count))
    np.testing.assert_array_equal(jbits.unpack(jbits.pack(codes, bits), bits, count, signed=True), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 32, 33, 96])
def test_jax_equals_numpy_eagerly_and_under_jit(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, count))
    want = jbits.pack(codes, bits)
    eagerly = [jbits.pack] if count == 33 else []  # each operation compiles for each shape: the hardest count alone
    for pack in (*eagerly, jax.jit(jbits.pack, static_argnums=1)):
        got = pack(jnp.asarray(codes), bits)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)

    def unpack(words: jax.Array) -> jax.Array:
        return jbits.unpack(words, bits, count)

    eagerly = [unpack, jax.vmap(unpack)] if count == 33 else []
    for function in (*eagerly, jax.jit(unpack), jax.jit(jax.vmap(unpack))):
        np.testing.assert_array_equal(function(jnp.asarray(want)), codes)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_order_of_codes_in_a_word(data) -> None:
    width = data.draw(st.sampled_from([8, 16, 32]))
    bits = data.draw(st.integers(1, 8))
    shifts = tuple(data.draw(st.permutations([bits * i for i in range(width // bits)])))
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, 3 * len(shifts)))
    words = jbits.pack_words(codes, shifts, bits, f"i{width // 8}")
    for word, group in zip(words.reshape(-1), codes.reshape(-1, len(shifts))):
        want = sum(int(c) << s for c, s in zip(group, shifts))
        assert int(word) % (1 << width) == want
    np.testing.assert_array_equal(jbits.unpack_words(words, shifts, bits), codes)
    np.testing.assert_array_equal(jbits.unpack_words(jnp.asarray(words), shifts, bits), codes)


@pytest.mark.parametrize("bits", PLANES)
def test_planar_words(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 64))
    words = jbits.pack_planar(codes, PLANES[bits], bits)
    assert words.shape == (3, 2 * bits)
    for code in range(32):  # each plane's bits lie where the docstring says
        row, value = 0, 0
        for width, offset in PLANES[bits]:
            per = 32 // width
            field = int(words[1].view(np.uint32)[row + code // per]) >> (width * (code % per)) & ((1 << width) - 1)
            value |= field << offset
            row += width
        assert value == codes[1, code]
    np.testing.assert_array_equal(jbits.unpack_planar(words, PLANES[bits], bits), codes)
    np.testing.assert_array_equal(jbits.unpack_planar(jnp.asarray(words), PLANES[bits], bits), codes)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"bits must be 1\.\.16, got 17"):
        jbits.pack(np.zeros((1, 4), np.int32), 17)
    with pytest.raises(ValueError, match="9 codes of 4 bits"):
        jbits.unpack(np.zeros((1, 1), np.uint32), 4, 9)
    with pytest.raises(ValueError, match="5 codes do not fill words of 8"):
        jbits.pack_words(np.zeros((1, 5), np.int32), tuple(range(0, 32, 4)), 4, np.int32)
