"""The direct kernel with looked up codes, computed on the CPU thread by thread (`lockstep`), against plain JAX."""

import types

import jax
import jax.numpy as jnp
import lockstep
import numpy as np
import pytest
from lockstep_memory import Memory, stands_in

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from pallas_kernels import reference, tune
from pallas_kernels.decode import codebook, scaled
from pallas_kernels.form import Form
from pallas_kernels.launch import arguments
from pallas_kernels.skeletons import direct, direct_params, nested, output


@pytest.fixture(autouse=True)
def in_lockstep(monkeypatch):
    engine = types.SimpleNamespace(uniform=lambda value: value, tensor_copy=lockstep.copy_box)
    monkeypatch.setattr(direct, "hopper", engine)
    monkeypatch.setattr(lockstep, "barrier_expect", lockstep.nothing)
    monkeypatch.setattr(lockstep, "barrier_wait", lockstep.nothing)
    with stands_in(monkeypatch, direct, direct_params, nested, output, codebook, scaled):
        yield


NF4 = Form("codebook", 4, 64, "bf16", table="nf4")
NESTED = Form("codebook", 4, 64, "u8", table="nf4")


def product(form, m, n, k, config, dtype, bias=False):
    """What the kernel writes over a y of NaN, and what it should."""
    w = tune.random_weight(form, n, k)
    if form.scale == "u8":  # neighbours that no one takes for one another
        second = 0.01 * 4.0 ** (jnp.arange(len(w.tables["absmax2"])) % 3)
        w = w.replace(tables={**w.tables, "absmax2": second, "offset": jnp.float32(0.001)})
    x = np.random.default_rng(0).standard_normal((m, k), np.float32).astype(dtype)
    shift = np.arange(n, dtype=np.float32) if bias else None
    plan = direct.Plan(m, n, k, form, config, {"bfloat16": "bf16", "float16": "f16"}[str(jnp.dtype(dtype))])
    assert plan.reason() is None
    arrays = {name: np.asarray(a) for name, a in arguments(x, w, shift, None).items()}
    arrays["y"] = np.full((m, n), np.nan, dtype)
    memory = Memory(arrays)
    for unit in range(plan.clusters):
        pointers, shared = memory.start(plan.layout["bytes"], config.warps * 32, config.cluster, unit)
        direct._Kernel(plan, (memory.at["x"], m, k), pointers, shared).run()
    want = np.asarray(reference.product(jnp.asarray(x), w), np.float32)
    return plan, memory["y"].astype(np.float32), want if shift is None else want + shift


def near(y, want):
    """In each row of the weight."""
    return bool((np.linalg.norm(y - want, axis=0) < 1e-2 * np.linalg.norm(want, axis=0)).all())


@pytest.mark.parametrize("held", [0, 1, 2, 3])
@pytest.mark.parametrize("form", [NF4, NESTED, Form("codebook", 4, 32, "e8m0", table="e2m1")], ids=str)
def test_x_in_registers(form, held):
    """12 groups of 64 in a row: second-level scales end within rows."""
    _, y, want = product(form, 5, 72, 768, direct.Config(4, 1, 3, held=held), jnp.bfloat16)
    assert near(y, want)


@pytest.mark.parametrize(
    ("m", "config", "k"),
    [
        (1, direct.Config(4, 1, 2, held=2), 504),
        (3, direct.Config(4, 1, 2, held=1), 504),
        (16, direct.Config(4, 2, 4, held=1), 1024),
        (12, direct.Config(4, 1, 2, held=1), 512),
        (16, direct.Config(4, 2, 4, held=2), 1024),
        (9, direct.Config(4, 2, 2), 1024),
        (8, direct.Config(8, 2, 6, held=0), 1024),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [NF4, NESTED, Form("codebook", 4, 64, "f32")], ids=str)
def test_shapes(m, config, k, form):
    _, y, want = product(form, m, 56, k, config, jnp.float16, bias=True)
    assert near(y, want)


@pytest.mark.parametrize("config", [direct.Config(4, 2, 2, held=2), direct.Config(4, 1, 2, held=4)], ids=str)
def test_sums_lie_where_x_was(config):
    """All of x is in registers before the first of many passes."""
    plan, y, want = product(NF4, 16, 144, 1024, config, jnp.bfloat16)
    assert plan.layout["sums"] == plan.layout["x"] and plan.tiles > 4 * plan.clusters
    assert near(y, want)


@pytest.mark.parametrize("config", [direct.Config(16, 2, 2, held=2), direct.Config(8, 2, 2)], ids=str)
def test_long_rows(config):
    """Warps of 7 and 14 chunks; parts of rows of 224 groups share a second-level scale."""
    _, y, want = product(NESTED, 8, 24, 14336, config, jnp.bfloat16)
    assert np.linalg.norm(y - want) < 4e-3 * np.linalg.norm(want)
