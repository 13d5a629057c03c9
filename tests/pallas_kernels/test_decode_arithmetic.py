"""The arithmetic that the decode functions emit, followed in float64 with bfloat16's rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import affine, affine_bytes, codebook
from pallas_kernels.form import Form

CODES = np.arange(256)


def rounded(values):
    return np.asarray(jnp.asarray(np.asarray(values, np.float64).astype(np.float32)).astype(jnp.bfloat16), np.float64)


def number(pair):
    assert pair >> 16 == pair & 0xFFFF
    return float(np.uint32(pair << 16 & 0xFFFFFFFF).view(np.float32))


def test_bits_of_integers_are_numbers():
    """Subnormal below 128, and linear up to 255."""
    values = CODES.astype(np.uint32) << 16
    np.testing.assert_array_equal(values.view(np.float32).astype(np.float64), CODES * 2.0**-133)


@pytest.mark.parametrize("zero", [0, 1, 7, 8, 15, 255])
def test_integers_come_out_exactly(zero):
    term, codes = number(affine.constant_zeros("bf16", zero)[0]), CODES[:16]
    for shift, factor in ((0, 2.0**127), (4, 2.0**123)):
        assert number(affine.pair_of(factor)) == factor
        values = rounded((codes << shift) * 2.0**-133 * factor + term)
        np.testing.assert_array_equal(values * affine.unit(None, "bf16"), codes - float(zero))
    wide = rounded(CODES * 2.0**-133 * 2.0**127 + number(affine_bytes.constant_zeros("bf16", zero)[0]))
    np.testing.assert_array_equal(wide * affine_bytes.unit(None, "bf16"), CODES - float(zero))


@pytest.mark.parametrize("point", [8, 4, 0])
def test_a_folded_scale_rounds_as_a_product(point):
    """(code * 2**-133) * (scale * 2**(133 - q)) - point * scale * 2**-q is the rounded product of scale and code."""
    codes, q = np.arange(16), 8
    mantissas = (1 + np.arange(128) / 128)[:, None]
    for exponent in (-100, -20, -7, 0, 2):
        scale = mantissas * 2.0**exponent
        for shift in (0, 4):
            factor = rounded(scale * 2.0 ** (133 - q - shift))
            assert np.isfinite(factor).all()
            term = rounded(factor * (-point * 2.0 ** (shift - 133)))
            folded = rounded((codes << shift) * 2.0**-133 * factor + term)
            np.testing.assert_array_equal(folded * 2.0**q, rounded(scale * (codes - point)))


@pytest.mark.parametrize("wide", [False, True])
def test_addresses_of_pairs(wide, monkeypatch):
    """A lane finds the pair of a byte of its codes where the table has it, in its own bank."""

    def permute(a, b, pick):
        found = 0
        for i in range(4):
            one = pick >> 4 * i & 15
            byte = (a | b << 32) >> 8 * (one & 7) & 255
            found |= (255 * (byte >> 7) if one & 8 else byte) << 8 * i
        return found

    monkeypatch.setattr(codebook.ptx, "permute", permute)
    monkeypatch.setattr(codebook.ptx, "asm", lambda types, text, a, b, pure: [a & 0x80808080 | b])
    monkeypatch.setattr(codebook.ptx, "i32", lambda: None)
    monkeypatch.setattr(codebook, "Int", int)
    rng, seen = np.random.default_rng(0), set()
    for word in rng.integers(0, 1 << 32, 500).tolist():
        lane = int(rng.integers(32))
        for p, at in enumerate(codebook.Pairs(4096, lane, wide).addresses(word)):
            pair = word >> 8 * p & 255
            assert at == 4096 + codebook.offset(pair, wide) + 4 * lane
            seen.add((codebook.offset(pair, wide), pair))
    places = [at for at, _ in sorted(seen)]
    assert len(places) == 256 and min(np.diff(places)) == codebook.PITCH >> (not wide)
    assert places[-1] + codebook.ENTRY <= codebook.shared_bytes(Form(), wide)


@pytest.mark.parametrize("name", ["nf4", "fp4", "e2m1"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_pairs_of_a_known_codebook(name, dtype, monkeypatch):
    """The permutes that kernels fill their table with, on Python's integers."""

    def permute(a, b, pick):
        pool = [x >> 8 * i & 255 for x in (a, b) for i in range(4)]
        return sum(pool[pick >> 4 * i & 7] << 8 * i for i in range(4))

    monkeypatch.setattr(codebook.ptx, "permute", permute)
    table = codebook.KNOWN[name]
    halves = table.astype({"bf16": jnp.bfloat16, "f16": np.float16}[dtype]).view(np.uint16).tolist()
    for entry in range(256):
        assert codebook.known_pair(table, entry, dtype) == halves[entry & 15] | halves[entry >> 4] << 16
