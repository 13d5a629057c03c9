"""The kernels of a decode step, computed on the CPU thread by thread (`lockstep`), against plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lockstep_memory import Memory, stands_in

from jq.models import attention as plain
from jq.models import rope
from jq.nn import RMSNorm

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from pallas_kernels import attention, attention_sums, dense, norm, prologue


@pytest.fixture(autouse=True)
def in_lockstep(monkeypatch):
    with stands_in(monkeypatch, attention, attention_sums, dense, norm, prologue):
        yield


def normal(shape, dtype=jnp.bfloat16, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "dim", "slots", "slot", "options"),
    [
        (1, 8, 2, 64, 128, 100, {}),
        (1, 4, 1, 128, 256, 37, {}),
        (1, 4, 1, 128, 512, 500, {"window": 50, "starts": [3]}),
        (3, 16, 2, 64, 64, 40, {"starts": [0, 40, 17], "sinks": True, "dtype": jnp.float16, "three": True}),
        (2, 12, 1, 128, 64, 0, {"rope": False}),
        (2, 2, 2, 256, 64, 33, {"softcap": 20.0}),
    ],
)
def test_attention(batch, heads, kv_heads, dim, slots, slot, options):
    dtype = jnp.dtype(options.get("dtype", jnp.bfloat16))
    q, k, v = (normal((batch, n, dim), dtype, seed) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    keys, values = (normal((batch, kv_heads, slots, dim), dtype, seed) for seed in (3, 4))
    keys[:, :, slot:] = values[:, :, slot:] = np.nan  # not written yet
    parts = [a.reshape(batch, -1) for a in (q, k, v)]
    parts = parts if options.get("three") else [np.concatenate(parts, -1)]
    arrays = {f"p{i}": a for i, a in enumerate(parts)}
    tables = None
    if options.get("rope", True):
        angles = normal((batch, dim // 2), np.float32, 5)
        tables = np.cos(angles), np.sin(angles)
        arrays |= {"cos": tables[0], "sin": tables[1]}
    starts, window, softcap = (options.get(name) for name in ("starts", "window", "softcap"))
    arrays["slot"] = np.array([slot], np.int32)
    if starts:
        arrays["starts"] = np.array(starts, np.int32)
    sinks = normal((heads,), np.float32, 6) if options.get("sinks") else None
    if sinks is not None:
        arrays["sinks"] = sinks
    memory = Memory(arrays | {"keys": keys, "values": values, "out": np.full((batch, heads * dim), np.nan, dtype)})
    spec = attention.Heads(heads, kv_heads, dim, dim**-0.5, window, softcap)
    widths = tuple(a.shape[-1] for a in parts)
    plan = attention.Plan(spec, batch, slots, attention.DTYPES[str(dtype)], widths, tables is not None)
    for unit in range(plan.units):
        pointers, shared = memory.start(plan.layout["bytes"], plan.warps * 32, plan.cluster, unit)
        attention._Kernel(plan, pointers, shared).run()

    q, k = q[:, None], k[:, None]
    if tables is not None:
        rotate = jax.jit(rope.rotate)
        q, k = (np.asarray(rotate(a, tables[0][:, None], tables[1][:, None])).astype(dtype) for a in (q, k))
    want_keys, want_values = keys.copy(), values.copy()
    want_keys[:, :, slot], want_values[:, :, slot] = k[:, 0], v
    for name, want in (("keys", want_keys), ("values", want_values)):
        np.testing.assert_array_equal(np.isnan(memory[name]), np.isnan(want))
        np.testing.assert_allclose(
            np.nan_to_num(memory[name].astype(np.float32)), np.nan_to_num(want.astype(np.float32)), rtol=1e-2
        )
    wide = (np.nan_to_num(a.astype(np.float32)) for a in (q, want_keys, want_values))

    @jax.jit
    def attend(q, keys, values, slot, starts, sinks):
        mask = plain.causal_mask(slot, jnp.arange(slots), starts, window)
        return plain.attend(q, keys, values, mask, scale=spec.scale, softcap=softcap, sinks=sinks)

    want = attend(*wide, arrays["slot"], arrays.get("starts"), sinks)
    assert error(memory["out"], np.asarray(want).reshape(batch, -1)) < 3e-3


def plain_gate(a):
    gate, up = jnp.split(jnp.asarray(a), 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(a.dtype) * up


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 80, 2048), (3, 64, 2048), (8, 48, 256)])
@pytest.mark.parametrize(
    "kind", [prologue.Norm(1e-5), prologue.Gate(), prologue.Plain()], ids=lambda p: type(p).__name__
)
def test_dense_products(kind, m, n, k, large):
    plan = dense.plan_for(kind, m, n, k, jnp.dtype(jnp.bfloat16))
    if plan is not None and large:  # what weights of many rows get
        plan = dataclasses.replace(plan, warps=8, steps=8, blocks=3)
    if plan is None or plan.reason():
        pytest.skip("does not pay or fit")
    a, b, gain = normal((m, k)), normal((m, k), seed=1), normal((k,), seed=2)
    arrays = {"a": a, "w": normal((n, k), seed=3), "bias": normal((n,), np.float32, 4)}
    x = jnp.asarray(a)
    if isinstance(kind, prologue.Norm):
        arrays |= {"b": b, "norm": gain, "total": np.zeros_like(a)}
        x = RMSNorm(jnp.asarray(gain), 1e-5)(jnp.asarray(a) + jnp.asarray(b))
    elif isinstance(kind, prologue.Gate):
        arrays["a"] = normal((m, 2 * k), seed=5)
        x = plain_gate(arrays["a"])
    memory = Memory(arrays | {"y": np.zeros((m, n), jnp.bfloat16)})
    maker = {
        prologue.Norm: dense._NormedProduct,
        prologue.Gate: dense._GatedProduct,
        prologue.Plain: dense._PlainProduct,
    }
    for block in range(min(plan.blocks, plan.tiles)):
        pointers, shared = memory.start(plan.bytes, plan.warps * 32, 1, block)
        maker[type(kind)](plan, pointers, shared, kind).run()
    want = np.asarray(x, np.float64) @ arrays["w"].astype(np.float64).T + arrays["bias"]
    assert error(memory["y"], want) < 3e-3
    if "total" in arrays:
        np.testing.assert_array_equal(memory["total"], jnp.asarray(a) + jnp.asarray(b))


@pytest.mark.parametrize("k", [576, 4096])
def test_norm_alone(k):
    a, b, gain = normal((2, k)), normal((2, k), seed=1), normal((k,), seed=2)
    memory = Memory({"a": a, "b": b, "norm": gain, "y": np.zeros_like(a), "total": np.zeros_like(a)})
    for row in range(2):
        pointers, shared = memory.start(128, 128, 1, row)
        kernel = norm._Row(k, "bf16", 4, pointers, shared, prologue.Norm(1e-5))
        kernel.make(kernel.load(range(kernel.rounds)))
    total = jnp.asarray(a) + jnp.asarray(b)
    np.testing.assert_array_equal(memory["total"], total)
    assert error(memory["y"], RMSNorm(jnp.asarray(gain), 1e-5)(total)) < 1e-3
