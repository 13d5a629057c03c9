"""Every way in which the blocks of the wgmma kernel share work, on the GPU: right, and the same bits in each run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, reference, tune
from pallas_kernels.form import Form
from pallas_kernels.select import Choice
from pallas_kernels.skeletons.gemm_plan import Config

pytestmark = pytest.mark.gpu

NARROW, WIDE, LARGE = Config(64, 4, 2, ahead=False), Config(128, 2, 2), Config(256, 2, 1)


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (64, 8192, 2048, NARROW),
        (64, 9000, 2048, dataclasses.replace(NARROW, even=True)),  # an odd unit for some pairs of blocks
        (64, 28672, 2048, dataclasses.replace(NARROW, even=True)),
        (200, 4096, 4096, WIDE),
        (200, 4096, 4096, dataclasses.replace(WIDE, ahead=False, split=2)),
        (300, 16384, 1024, dataclasses.replace(WIDE, ahead=False, split=2)),  # sums are exchanged in several passes
        (200, 4096, 4096, dataclasses.replace(WIDE, split=2, tail=2)),
        (300, 16384, 1024, dataclasses.replace(WIDE, ahead=False, split=2, tail=4)),
        (150, 9000, 1984, Config(96, 3, 2, split=2, tail=3, ahead=False)),
        (200, 1000, 4096, dataclasses.replace(WIDE, share=2, split=2, blocks=120)),
        (100, 4096, 1992, dataclasses.replace(WIDE, wn=1, split=4, blocks=120)),
        (16, 4096, 4096, Config(16, 4, 4, split=2, units=1, ahead=False)),
        (13, 1000, 1992, Config(16, 2, 8, split=2, units=1, ahead=False)),
        (40, 20000, 2048, Config(48, 2, 4, units=1, ahead=False)),  # more than one turn of each block
        (100, 6144, 1600, Config(64, 4, 2, units=2, ahead=False)),
        (128, 4096, 2048, dataclasses.replace(WIDE, split=2, units=1)),
        (64, 57344, 1024, dataclasses.replace(NARROW, units=7)),
        (150, 30000, 1000, dataclasses.replace(NARROW, units=7)),
        (300, 28672, 2048, dataclasses.replace(LARGE, even=True)),
        (600, 6144, 2048, dataclasses.replace(LARGE, even=True)),
        (600, 6144, 2048, dataclasses.replace(LARGE, share=2)),
    ],
    ids=str,
)
def test_shared_work(m, n, k, config):
    w = tune.random_weight(Form(), n, k)
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    run = jax.jit(lambda x, w: api.launch(x, w, Choice("gemm", config)))
    y = run(x, w)
    expected = np.asarray(jax.jit(reference.product)(x, w))
    assert np.linalg.norm(np.asarray(y, np.float32) - expected) < 4e-3 * np.linalg.norm(expected)
    for _ in range(50):
        assert bool(jnp.array_equal(run(x, w), y))


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (64, 28672, 2048, dataclasses.replace(NARROW, even=True)),
        (64, 4096, 4096, Config(64, 2, 2, split=2, units=1, ahead=False)),  # a wide table, steps looked up whole
        (48, 1000, 1992, Config(48, 3, 2, ahead=False)),
        (16, 9000, 1984, Config(16, 7, 2, ahead=False)),
        (64, 9000, 2048, Config(64, 7, 1, ahead=False)),
        (16, 9000, 2048, Config(16, 4, 4, ahead=False)),
        (200, 4096, 2048, dataclasses.replace(WIDE, split=2, tail=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_looked_up(m, n, k, config, dtype):
    for form in (
        Form("codebook", 4, 64, "bf16", table="nf4"),
        Form("codebook", 4, 64, "f32"),
        Form("codebook", 4, 128, "bf16", table="fp4"),
        Form("codebook", 4, 32, "e8m0", table="e2m1"),
    ):
        w = tune.random_weight(form, n, k)
        x = jax.random.normal(jax.random.key(1), (m, k), dtype)
        run = jax.jit(lambda x, w: api.launch(x, w, Choice("gemm", config)))
        y, expected = run(x, w), np.asarray(jax.jit(reference.product)(x, w))
        assert np.linalg.norm(np.asarray(y, np.float32) - expected) < 4e-3 * np.linalg.norm(expected)
        for _ in range(20):
            assert bool(jnp.array_equal(run(x, w), y))


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (64, 2048, 4096, NARROW),  # four rows share a second-level scale
        (100, 2000, 14336, WIDE),  # a row has several
        (100, 2000, 4160, WIDE),  # one ends within a step along K
        (70, 1000, 1088, dataclasses.replace(NARROW, even=True)),
        (16, 4096, 14336, Config(16, 4, 4, split=2, units=1, ahead=False)),
        (200, 4096, 14336, dataclasses.replace(WIDE, split=2, tail=2)),
        (64, 28672, 1600, dataclasses.replace(NARROW, units=7)),
        (300, 1024, 20480, dataclasses.replace(LARGE, share=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_nested_scales(m, n, k, config, dtype):
    form = Form("codebook", 4, 64, "u8", table="nf4")
    layers = [tune.random_weight(form, n, k, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = jax.random.normal(jax.random.key(1), (m, k), dtype)
    run = jax.jit(lambda x, w, layer: api.launch(x, w, Choice("gemm", config), layer=layer))
    for i, w in enumerate(layers):
        expected = np.asarray(jax.jit(reference.product)(x, w))
        single = jax.jit(lambda x, w: api.launch(x, w, Choice("gemm", config)))(x, w)
        assert np.linalg.norm(np.asarray(single, np.float32) - expected) < 4e-3 * np.linalg.norm(expected)
        for _ in range(20):
            assert bool(jnp.array_equal(run(x, stacked, jnp.asarray([i], jnp.int32)), single))
