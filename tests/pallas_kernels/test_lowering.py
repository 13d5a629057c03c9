"""Every kernel lowers for CUDA without a GPU: layouts, shared memory, dtypes and the whole MLIR are checked by it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import api, select, tune
from pallas_kernels.form import Form
from pallas_kernels.skeletons import direct, gemm, stream

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"jax {jax.__version__}: Mosaic GPU of 0.11 is needed"
)

FORMS = {
    "g128": Form(),
    "small": Form(scale="f16", small=True),
    "g32": Form(group=32),
    "row": Form(group=0),
    "asym": Form(zero="u8"),
    "hqq": Form(group=64, scale="f16", zero="f16"),
    "w8_g128": Form(bits=8, zero_point=128),
    "w8_g32": Form(bits=8, group=32, zero_point=3),
    "w8_row": Form(bits=8, group=0, scale="f32", zero_point=128),
    "w8_asym": Form(bits=8, zero="u8"),
    "w8_hqq": Form(bits=8, group=64, scale="f16", zero="f16", zero_point=128),
    "mxfp4": Form("codebook", 4, 32, "e8m0", table="e2m1"),
    "e4m3_row": Form("e4m3", 8, 0, "f32"),
    "e5m2_g128": Form("e5m2", 8, 128, "bf16"),
    "nf4": Form("codebook", 4, 64, "bf16"),
    "fp4": Form("codebook", 4, 64, "bf16", table="fp4"),
    "nf4_dq": Form("codebook", 4, 64, "u8", table="nf4"),
}


def lower(form, n, k, m, choice, dtype=jnp.bfloat16, perm=False, bias=False, stack=0):
    w = jax.eval_shape(functools.partial(tune.random_weight, form, n, k))
    if perm:
        w = w.replace(perm=jax.ShapeDtypeStruct((k,), jnp.int32))
    if stack:
        w = jax.tree.map(lambda a: jax.ShapeDtypeStruct((stack, *a.shape), a.dtype), w)
    x = jax.ShapeDtypeStruct((m, k), dtype)
    b = jax.ShapeDtypeStruct((n,), jnp.float32) if bias else None
    layer = jax.ShapeDtypeStruct((1,), jnp.int32) if stack else None
    traced = jax.jit(api.launch, static_argnames="choice").trace(x, w, choice, b, layer)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


STREAM = select.Choice("stream", stream.Config(cluster=2))
DIRECT = select.Choice("direct", direct.Config(8, 1, 16))
GEMM = select.Choice("gemm", gemm.Config(64, 2, 2, 0, 1, 2, ahead=False))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("choice", [DIRECT, STREAM, GEMM], ids=["direct", "stream", "gemm"])
def test_skeleton_times_decode(name, choice):
    if choice is DIRECT and FORMS[name].bits != 4:
        assert not select.fits(DIRECT, 5, 256, 512, FORMS[name])
        return
    m = 70 if choice is GEMM else 5
    assert "mosaic_gpu_v2" in lower(FORMS[name], 256, 512, m, choice)


@pytest.mark.parametrize("name", ["g128", "asym", "nf4", "mxfp4"])
@pytest.mark.parametrize("choice", [DIRECT, STREAM, GEMM], ids=["direct", "stream", "gemm"])
def test_a_kernel_is_one_call(name, choice):
    """Nothing beside it, not even a reshape: torch launches what JAX lowers without XLA."""
    w = jax.eval_shape(functools.partial(tune.random_weight, FORMS[name], 256, 512))
    x = jax.ShapeDtypeStruct((5, 512), jnp.bfloat16)
    matmul = functools.partial(select.KERNELS[choice.kernel].matmul, config=choice.config)
    text = jax.jit(matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"stablehlo\.(\w+)", text) == ["custom_call"]


@pytest.mark.parametrize("name", ["g128", "nf4_dq"])
@pytest.mark.parametrize("m", [2, 64])
def test_under_shard_map(name, m):
    """Two devices share the rows of x, or the parts of a stack; the gradient too."""
    mesh = jax.sharding.AbstractMesh((2,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.eval_shape(functools.partial(tune.random_weight, FORMS[name], 256, 512))
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), w)
    x = jax.ShapeDtypeStruct((m, 512), jnp.bfloat16)
    rows, whole, outputs = (jax.P(*spec) for spec in (("parts",), (), (None, "parts")))
    ways = (
        (pallas_kernels.matmul, w, (rows, whole), rows),
        (functools.partial(pallas_kernels.matmul, layer=0), stacked, (whole, rows), outputs),
    )
    for matmul, weight, given, result in ways:
        sharded = jax.shard_map(matmul, mesh=mesh, in_specs=given, out_specs=result)

        def total(x, weight, sharded=sharded):
            return sharded(x, weight).astype(jnp.float32).sum()

        for function in (sharded, jax.value_and_grad(total)):
            text = jax.jit(function).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu_v2" in text


def test_options():
    for choice, m in ((STREAM, 3), (STREAM, 12), (GEMM, 33)):
        lower(Form(), 200, 584, m, choice, jnp.float16, bias=True, stack=2)
        lower(Form(), 100, 250, m, choice)  # neither is a multiple of 8
        lower(Form(), 256, 512, m, choice, perm=True)
    lower(Form(), 256, 512, 1, STREAM, perm=True)
    for m, choice in ((1, STREAM), (16, STREAM), (33, GEMM)):
        lower(FORMS["w8_asym"], 200, 584, m, choice, jnp.float16, bias=True, stack=2)
        lower(FORMS["w8_g128"], 256, 512, m, choice, perm=True)
    for m, config in ((1, direct.Config(4, 1, 5)), (3, direct.Config(4, 1, 264)), (12, direct.Config(4, 2, 6))):
        lower(FORMS["g32"], 200, 504, m, select.Choice("direct", config), jnp.float16, bias=True, stack=2)
        lower(FORMS["hqq"], 200, 512, m, select.Choice("direct", config))
    for name in ("g128", "nf4", "nf4_dq"):  # x in registers, all of it or a part
        for held in (1, 2):
            lower(FORMS[name], 200, 1024, 12, select.Choice("direct", direct.Config(4, 2, 132, held=held)))
    for m, config in (
        (1, stream.Config(4, 1, 2, 16 << 10, 264)),
        (8, stream.Config(8, 4, 2, 32 << 10, 8)),  # loose strips and whole ones
        (16, stream.Config(12, 8, 1, 32 << 10, 16)),
        (16, stream.Config(8, 2, 4, 32 << 10, 8, height=2)),
    ):
        lower(FORMS["nf4_dq"], 4096, 512, m, select.Choice("stream", config))


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (16, gemm.Config(16, 4, 4, split=2, units=1, ahead=False)),
        (100, gemm.Config(112, 2, 2, units=1)),
        (60, gemm.Config(64, 4, 2, units=2, ahead=False)),
        (60, gemm.Config(64, 4, 2, units=7, ahead=False)),
        (16, gemm.Config(16, 7, 2, ahead=False)),
    ],
    ids=str,
)
def test_units_that_warpgroups_share_or_collect(m, config):
    for name in ("g128", "w8_asym", "nf4"):
        lower(FORMS[name], 2000, 1024, m, select.Choice("gemm", config), bias=True)
    for k in (1024, 14336, 20480):  # second-level scales of four rows, two of a row, and more
        lower(FORMS["nf4_dq"], 2000, k, m, select.Choice("gemm", config), jnp.float16, bias=True, stack=2)


@pytest.mark.parametrize("k", [29568, 53248])  # of the largest Qwen2 and Llama models: few blocks can share it
def test_rows_of_x_that_shared_memory_cannot_hold(k):
    for name in ("g128", "nf4_dq", "w8_asym"):
        for m in range(1, 17):
            assert select.choose(m, 8192, k, FORMS[name])
        choice = select.choose(8, 8192, k, FORMS[name])
        assert choice.kernel == "gemm"
        lower(FORMS[name], 8192, k, 8, choice)


def tuned():
    rows = {}
    for device in ("h100", "h200"):
        for (kind, bits, n, k), entries in select.table(device).items():
            for m, choice in entries:
                rows.setdefault(((kind, bits), choice), (n, k, m))
    return rows


@pytest.mark.parametrize(("kind", "choice"), tuned(), ids=str)
def test_tuned_configurations(kind, choice):
    n, k, m = tuned()[kind, choice]
    lower(tune.FORMS[kind], n, k, m, choice)


def test_a_choice_exists_for_any_shape():
    for m in (1, 2, 7, 16, 17, 100, 257, 5000):
        for n, k in ((16, 64), (576, 576), (49152, 576), (8192, 28672), (128256, 4096), (1000, 200)):
            for form in FORMS.values():
                choice = select.choose(m, n, k, form)
                assert select.fits(choice, m, n, k, form)


def test_what_a_kernel_cannot_run_takes_the_next_row():
    """The direct kernel is the first row for some rows of x; fused products pass it over, nested scales have their own."""
    for m in (4, 8):
        assert select.choose(m, 4096, 4096, Form()).kernel == "direct"
        assert select.choose(m, 4096, 4096, Form(), kernels=("stream", "gemm")).kernel != "direct"
    assert select.choose(1, 4096, 14336, FORMS["nf4"]).kernel == "direct"
    assert select.choose(1, 4096, 14336, FORMS["nf4_dq"]).kernel == "stream"
    assert select.choose(2000, 4096, 4096, FORMS["nf4_dq"]) == select.choose(2000, 4096, 4096, Form())
    assert not select.fits(DIRECT, 1, 4096, 4096, Form(), gathered=True)


def test_shared_memory_is_counted():
    with pytest.raises(ValueError, match="shared memory"):
        lower(Form(), 256, 65536, 16, select.Choice("stream", stream.Config(cluster=1)))


@pytest.mark.parametrize(("n", "k"), [(1, 256), (21, 640), (52, 100)])
def test_ragged_sides_are_padded(n, k):
    """A weight whose rows or columns are no whole copies: a kernel is found, and the product has the weight's N."""
    w = tune.random_weight(Form(group=0), n, k)
    for m in (1, 40):
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        lowered = jax.jit(pallas_kernels.matmul).trace(x, w).lower(lowering_platforms=("cuda",))
        assert lowered.out_info.shape == (m, n) and "mosaic_gpu_v2" in lowered.as_text()
