"""The kernels on the GPU, against float32 with `dequantize()`; the oracle is tested bit for bit against the originals."""

import functools

import jax
import jax.numpy as jnp
import kernel_weights as weights
import numpy as np
import pytest

import pallas_kernels
from jq.qtensor import stack
from pallas_kernels import reference, tune
from pallas_kernels.form import Form
from pallas_kernels.skeletons import direct, gemm, stream

pytestmark = pytest.mark.gpu


def error(y, ref):
    ref = np.asarray(ref, np.float64)
    return float(np.linalg.norm(np.asarray(y, np.float64) - ref) / max(np.linalg.norm(ref), 1e-30))


def product(x, dense):
    return jnp.dot(x.astype(jnp.float32), dense.astype(jnp.float32).T, precision="highest")


def rows(m, k, dtype=jnp.bfloat16, seed=1):
    return jax.random.normal(jax.random.key(seed), (m, k), dtype)


def hold(x, q, w, allowed=1.5):
    """The kernel's error is below 1e-2 and no worse than 1.5 times that of a dense matmul in x's dtype."""
    ref = product(x, q.dequantize("float32"))
    dense = error((product(x, q.dequantize(x.dtype))).astype(x.dtype), ref)
    got = error(pallas_kernels.matmul(x, w), ref)
    assert got < 1e-2
    assert got <= max(allowed * dense, 1.5 * float(jnp.finfo(x.dtype).eps) / 2), (got, dense)


@pytest.mark.parametrize("kind", weights.KINDS)
def test_every_kind_for_few_and_many_rows(kind):
    k = 4096 if kind == "nf4_b4096" else 1024
    q = weights.make(kind, 512, k)
    w = pallas_kernels.prepare(q)
    assert pallas_kernels.supports(w, rows(1, k)) is None
    for m in (1, 5, 16, 33, 200):
        hold(rows(m, k), q, w)
    # the oracle rounds a bfloat16 weight; the kernel multiplies unrounded
    for m in (7, 40):
        x = rows(m, k, jnp.float16)
        assert error(pallas_kernels.matmul(x, w), product(x, q.dequantize("float32"))) < 3e-3


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.bfloat16, 4e-3), (jnp.float16, 1e-3)])
def test_rows_with_a_mean(dtype, limit):
    """What a decode leaves on the codes would be multiplied by x's mean, often enlarged: nothing may be left."""
    w = tune.random_weight(Form(), 6144, 4096)
    for m, mean in ((2, 1.0), (3, -8.0), (4, 100.0), (6, 0.0), (8, 3.0)):
        x = (rows(m, 4096, jnp.float32) + mean).astype(dtype)
        assert error(pallas_kernels.matmul(x, w), reference.product(x, w)) < limit, (m, mean)


@pytest.mark.parametrize(
    ("n", "k"),
    [(16, 64), (144, 192), (4096, 576), (272, 11008), (48, 4096), (1, 256), (21, 640), (1001, 2048), (52, 100)],
)
def test_ragged_shapes(n, k):
    for kind in ("w4a16_g32" if k % 128 else "w4a16_g128", "w8a16_row"):
        q = weights.make(kind, n, k, seed=n)
        w = pallas_kernels.prepare(q)
        for m in (1, 3, 16, 17, 130):
            hold(rows(m, k), q, w)


@pytest.mark.parametrize("kind", ["w4a16_g128", "w8a16_g128_asym"])
def test_every_m_to_300(kind):
    q = weights.make(kind, 256, 512)
    w = pallas_kernels.prepare(q)
    ref = product(rows(300, 512), q.dequantize("float32"))
    for m in [*range(1, 20), *range(20, 300, 23), 127, 128, 129, 255, 256, 257, 300]:
        assert error(pallas_kernels.matmul(rows(300, 512)[:m], w), ref[:m]) < 4e-3, m


@pytest.mark.parametrize("kind", ["w4a16_g128", "w8a16_g128", "w8a16_g128_asym"])
def test_small_integers_are_exact(kind):
    q = weights.make(kind, 256, 512)
    q = q.replace(scales=jnp.ones_like(q.scales))
    w = pallas_kernels.prepare(q)
    for m in (1, 8, 64):
        x = jax.random.randint(jax.random.key(2), (m, 512), -1, 2).astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            pallas_kernels.matmul(x, w), product(x, q.dequantize("float32")).astype(jnp.bfloat16)
        )


def test_every_code_against_one_hot_rows():
    """x = unit vectors read single weights: all bit patterns, both tables' ends, extreme scales."""
    for kind in (
        "w4a16_g128",
        "nf4_b64",
        "w4a16_g128_asym",
        "w8a16_g128",
        "w8a16_g128_asym",
        "mxfp4",
        "e4m3_g128",
        "e5m2_row",
    ):
        q = weights.make(kind, 128, 256)
        if kind.endswith("g128"):
            q = q.replace(scales=q.scales.at[:2].set(jnp.asarray([[1e-30], [1e30]], q.scales.dtype)))
        w = pallas_kernels.prepare(q)
        for begin in (0, 64, 250):
            x = jnp.eye(256, dtype=jnp.bfloat16)[begin : begin + 6]
            ref = np.asarray(q.dequantize("float32"))[:, begin : begin + 6].T
            np.testing.assert_allclose(np.asarray(pallas_kernels.matmul(x, w), np.float32), ref, rtol=2e-2)


@pytest.mark.parametrize("kind", ["w4a16_g128", "w8a16_g128"])
def test_repeated_runs_are_bit_identical(kind):
    q = weights.make(kind, 4096, 4096)
    w = pallas_kernels.prepare(q)
    for m in (1, 8, 16, 64, 256):
        x = rows(m, 4096)
        first = np.asarray(pallas_kernels.matmul(x, w), np.float32)
        for _ in range(5):
            np.testing.assert_array_equal(np.asarray(pallas_kernels.matmul(x, w), np.float32), first)


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, stream.Config(4, 1, 2, 48 << 10, 16)),
        (1, stream.Config(8, 2, 4, 48 << 10, 16)),
        (8, stream.Config(8, 4, 4, 48 << 10, 16)),
        (9, stream.Config(8, 1, 8, 48 << 10, 16)),
        (16, stream.Config(12, 4, 2, 48 << 10, 16)),
        (16, stream.Config(8, 8, 2, 48 << 10, 16)),
        (16, stream.Config(8, 2, 4, 48 << 10, 16, height=2)),
    ],
    ids=str,
)
def test_ways_to_share_a_stream(m, config):
    """Strips that come out even and loose ones, sums inside a block and over the blocks of a cluster."""
    for n, form in ((2048, Form()), (2064, Form()), (4096, Form()), (2064, Form(bits=8, zero_point=128))):
        w = tune.random_weight(form, n, 1024)
        y = jax.jit(stream.matmul, static_argnums=2)(rows(m, 1024), w, config)
        assert error(y, reference.product(rows(m, 1024), w)) < 4e-3


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, direct.Config(16, 1, 132)),
        (5, direct.Config(8, 1, 20)),
        (13, direct.Config(8, 2, 132)),
        (16, direct.Config(8, 2, 24)),  # many passes
        (16, direct.Config(4, 1, 264)),
        (1, direct.Config(16, 1, 132, held=1)),
        (8, direct.Config(4, 2, 132, held=2)),
        (13, direct.Config(8, 1, 20, held=1)),  # a part of x in registers
        (16, direct.Config(4, 1, 132, held=3)),
        (12, direct.Config(4, 1, 40, held=4)),  # all of it
        (9, direct.Config(8, 2, 20, held=1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(group=32),
        Form(zero="u8"),
        Form("codebook", 4, 64, "bf16"),
        Form("codebook", 4, 64, "u8", table="nf4"),
    ],
    ids=str,
)
def test_ways_to_go_direct(m, config, form):
    for n, k in ((2048, 1024), (2056, 1000), (16, 1024)):
        w = tune.random_weight(form, n, k)
        run = jax.jit(direct.matmul, static_argnums=2)
        y = run(rows(m, k), w, config)
        assert error(y, reference.product(rows(m, k), w)) < 4e-3
        assert not any(bool((run(rows(m, k), w, config) != y).any()) for _ in range(50))


@pytest.mark.parametrize("groups", [64, 128, 224])  # of a row: a second-level scale is for four, two, or parts of rows
def test_nested_scales_go_direct(groups):
    k, form = groups * 64, Form("codebook", 4, 64, "u8", table="nf4")
    w = tune.random_weight(form, 4104, k)
    most = 12 if groups < 224 else 8  # rows of x that shared memory holds
    for m, config in ((1, direct.Config(16, 2)), (8, direct.Config(16, 2, held=2)), (most, direct.Config(8, 2))):
        run = jax.jit(direct.matmul, static_argnums=2)
        y = run(rows(m, k), w, config)
        assert error(y, reference.product(rows(m, k), w)) < 4e-3
        assert not any(bool((run(rows(m, k), w, config) != y).any()) for _ in range(20))


def test_sums_lie_where_x_was():
    """All of x is in registers, and two blocks send each other sums in many passes."""
    w, config = (
        tune.random_weight(Form("codebook", 4, 64, "bf16", table="nf4"), 57344, 8192),
        direct.Config(16, 2, held=4),
    )
    plan = direct.Plan(16, *w.shape, w.form, config, "bf16")
    assert plan.layout["sums"] == plan.layout["x"] and plan.tiles > 50 * plan.clusters
    run = jax.jit(direct.matmul, static_argnums=2)
    y = run(rows(16, 8192), w, config)
    assert error(y, reference.product(rows(16, 8192), w)) < 4e-3
    assert not any(bool((run(rows(16, 8192), w, config) != y).any()) for _ in range(50))


def scales_of_all_sizes(scales, kind):
    """Groups of a row that differ by up to 2**12, rows by 2**200; a row that grows along K; zeros."""
    if kind == "rows":
        rows_ = jax.random.randint(jax.random.key(7), (len(scales), 1, 16), -100, 100)
        return (2.0 ** (rows_ + jax.random.randint(jax.random.key(8), scales.shape, 0, 12))).astype(scales.dtype)
    if kind == "growing":
        return jnp.broadcast_to(2.0 ** (jnp.arange(scales.shape[1])[:, None] * 6.0 - 90), scales.shape).astype(
            scales.dtype
        )
    return scales.at[:, ::2].set(0).at[3].set(0)


@pytest.mark.parametrize("kind", ["rows", "growing", "zeros"])
def test_scales_of_all_sizes(kind):
    """The wgmma kernel holds weights divided by powers of two, which follow the scales."""
    w = tune.random_weight(Form(), 2048, 4096)
    w = w.replace(scales=scales_of_all_sizes(w.scales, kind))
    for m, config in (
        (64, gemm.Config(64, 4, 2, ahead=False)),
        (50, gemm.Config(64, 4, 2, ahead=False, units=7)),
        (64, gemm.Config(64, 4, 2, ahead=False, even=True)),
        (16, gemm.Config(16, 4, 4, split=2, units=1, ahead=False)),
        (200, gemm.Config(128, 2, 2, split=2)),
        (16, direct.Config(16, 2)),
    ):
        matmul = direct.matmul if isinstance(config, direct.Config) else gemm.matmul
        y = np.asarray(jax.jit(matmul, static_argnums=2)(rows(m, 4096), w, config), np.float64)
        ref = np.asarray(reference.product(rows(m, 4096), w), np.float64)
        off = np.linalg.norm(y - ref, axis=0) / np.maximum(
            np.linalg.norm(ref, axis=0), 1e-300
        )  # of each row of the weight
        assert off.max() < 1e-2, (config, off.max())


def test_many_short_runs_are_bit_identical():
    """A weight in the L2 cache and look-ups for every pair of codes: copies come back as soon as they ever do."""
    for form in (Form("codebook", 4, 64, "bf16"), Form(bits=8, zero_point=128)):
        w = tune.random_weight(form, 4096, 4096)
        run = jax.jit(stream.matmul, static_argnums=2)
        config = stream.Config(4, 1, 16 // form.bits, 17 << 10, 264)
        first = run(rows(1, 4096), w, config)
        assert not any(bool((run(rows(1, 4096), w, config) != first).any()) for _ in range(500))


def test_bias_stack_scan_vmap_and_gradient():
    qs = [weights.make("w4a16_g128_asym", 256, 512, seed=i) for i in range(3)]
    stacked = pallas_kernels.prepare(stack(qs))
    dense = [q.dequantize("float32") for q in qs]
    bias = jax.random.normal(jax.random.key(3), (256,))
    for m in (2, 40):
        x = rows(m, 512)
        for i in range(3):
            one = pallas_kernels.prepare(qs[i])
            assert error(pallas_kernels.matmul(x, one, bias=bias), product(x, dense[i]) + bias) < 4e-3
            assert error(pallas_kernels.matmul(x, stacked, layer=i), product(x, dense[i])) < 4e-3

        def body(c, w, x=x):
            return c, pallas_kernels.matmul(x, w)

        _, ys = jax.jit(lambda w, body=body: jax.lax.scan(body, 0, w))(stacked)
        vs = jax.vmap(lambda w, x=x: pallas_kernels.matmul(x, w))(stacked)
        for i in range(3):
            assert error(ys[i], product(x, dense[i])) < 4e-3
            assert error(vs[i], product(x, dense[i])) < 4e-3
        one = pallas_kernels.prepare(qs[0])
        g = jax.grad(lambda x, one=one: pallas_kernels.matmul(x, one).astype(jnp.float32).sum())(x)
        assert error(g, jnp.ones((m, 256)) @ dense[0]) < 1e-2


@pytest.mark.parametrize("kind", ["w4a16_g128_asym", "nf4_b64_dq"])
def test_under_shard_map(kind):
    """All devices share the rows of x, or the parts of a stack."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    qs = [weights.make(kind, 256, 512, seed=i) for i in range(count)]
    one, stacked = pallas_kernels.prepare(qs[0]), pallas_kernels.prepare(stack(qs))
    parts, whole = jax.P("parts"), jax.P()
    layers = functools.partial(pallas_kernels.matmul, layer=0)
    for m in (count, 64 * count):
        x = rows(m, 512)
        shared = jax.shard_map(pallas_kernels.matmul, mesh=mesh, in_specs=(parts, whole), out_specs=parts)
        assert error(jax.jit(shared)(x, one), product(x, qs[0].dequantize("float32"))) < 4e-3
        split = jax.shard_map(layers, mesh=mesh, in_specs=(whole, parts), out_specs=jax.P(None, "parts"))
        dense = jnp.concatenate([q.dequantize("float32") for q in qs])
        assert error(jax.jit(split)(x, stacked), product(x, dense)) < 4e-3


def test_memory_after_prepare():
    for kind, limit in (
        ("w8a16_g128", 1.0),
        ("w4a16_g128", 1.0),
        ("w4a16_g128_asym", 1.02),
        ("nf4_b64", 1.001),
        ("nf4_b64_dq", 1.001),
    ):
        q = weights.make(kind, 1024, 4096)
        assert pallas_kernels.prepare(q).nbytes <= limit * q.nbytes
