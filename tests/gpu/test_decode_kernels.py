"""The kernels of a decode step on the GPU, against float64 on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kernel_weights as weights
import numpy as np
import pytest

pytestmark = pytest.mark.gpu


def error(got, want) -> float:
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / max(np.linalg.norm(want), 1e-30))


def normal(shape, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def attention_float64(q, k, v, seen, scale, softcap, sinks):
    """q [H, D], k and v [KH, S, D], seen [S] -> [H, D]."""
    group = q.shape[0] // k.shape[0]
    out = np.zeros(q.shape)
    for h in range(q.shape[0]):
        scores = k[h // group][seen] @ q[h] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        top = scores.max()
        powers = np.exp(scores - top)
        total = powers.sum() + (np.exp(sinks[h] - top) if sinks is not None else 0)
        out[h] = powers / total @ v[h // group][seen]
    return out


# batch, heads, kv_heads, head_dim, slots, slot, options
ATTENTION = [
    (1, 32, 8, 128, 768, 512, {}),
    (1, 32, 8, 128, 768, 0, {}),
    (1, 32, 8, 128, 768, 1, {}),
    (1, 32, 8, 128, 768, 17, {}),
    (1, 32, 8, 128, 768, 767, {}),
    (2, 32, 8, 128, 768, 300, {"starts": [0, 299]}),
    (32, 32, 8, 128, 256, 200, {"starts": list(range(0, 192, 6))}),
    (5, 32, 8, 128, 640, 513, {"window": 100, "starts": [0, 500, 513, 413, 412]}),
    (3, 32, 8, 128, 640, 513, {"window": 1}),
    (3, 9, 3, 64, 256, 200, {"dtype": jnp.float16}),
    (7, 14, 2, 64, 256, 200, {"three": True}),
    (16, 12, 1, 64, 128, 77, {}),
    (64, 8, 8, 64, 64, 63, {}),
    (4, 16, 16, 128, 256, 130, {"rope": False, "sinks": True}),
    (2, 64, 8, 128, 4096, 4000, {}),
    (2, 8, 4, 256, 512, 411, {"softcap": 30.0, "three": True}),
    (1, 16, 8, 256, 256, 100, {}),
]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "dim", "slots", "slot", "options"), ATTENTION)
def test_attention_of_one_token(batch, heads, kv_heads, dim, slots, slot, options):
    from pallas_kernels.attention import Heads, decode_attention

    dtype = options.get("dtype", jnp.bfloat16)
    q, k, v = (normal((batch, n, dim), dtype, seed) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    keys, values = (normal((batch, kv_heads, slots, dim), dtype, seed) for seed in (3, 4))
    # what is not written yet must not be read
    keys, values = (a.at[:, :, slot:].set(jnp.nan) for a in (keys, values))
    rope = None
    if options.get("rope", True):
        angles = normal((batch, dim // 2), jnp.float32, 5)
        rope = jnp.cos(angles), jnp.sin(angles)
    sinks = normal((heads,), jnp.float32, 6) if options.get("sinks") else None
    starts = options.get("starts")
    window, softcap, scale = options.get("window"), options.get("softcap"), dim**-0.5
    parts = tuple(a.reshape(batch, -1) for a in (q, k, v))
    parts = parts if options.get("three") else (jnp.concatenate(parts, -1),)
    spec = Heads(heads, kv_heads, dim, scale, window, softcap)
    given = None if starts is None else jnp.asarray(starts, jnp.int32)
    results = [decode_attention(parts, keys, values, rope, jnp.int32(slot), given, sinks, spec=spec) for _ in range(2)]
    out, new_keys, new_values = (np.array(a.astype(jnp.float32)) for a in results[0])
    np.testing.assert_array_equal(out, np.asarray(results[1][0].astype(jnp.float32)))

    def rotated(x):
        x = np.asarray(x.astype(jnp.float32))
        if rope is None:
            return x
        cos, sin = (np.asarray(a)[:, None] for a in rope)
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        x = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))

    all_keys, all_values = (np.array(a.astype(jnp.float32)) for a in (keys, values))
    all_keys[:, :, slot], all_values[:, :, slot] = rotated(k), np.asarray(v.astype(jnp.float32))
    np.testing.assert_allclose(new_keys[:, :, slot], all_keys[:, :, slot], rtol=1e-2, atol=1e-3)
    new_keys[:, :, slot] = all_keys[:, :, slot]
    np.testing.assert_array_equal(new_keys, all_keys)
    np.testing.assert_array_equal(new_values, all_values)
    slot_numbers = np.arange(slots)
    turned = rotated(q).astype(np.float64)
    want = np.stack(
        [
            attention_float64(
                turned[b],
                all_keys[b].astype(np.float64),
                all_values[b].astype(np.float64),
                (slot_numbers <= slot)
                & (slot_numbers >= (starts[b] if starts else 0))
                & (slot_numbers > slot - (window or slots)),
                scale,
                softcap,
                None if sinks is None else np.asarray(sinks),
            )
            for b in range(batch)
        ]
    )
    assert error(out, want.reshape(batch, -1)) < (4e-4 if dtype == jnp.float16 else 3e-3)


def plain_norm(a, b, gain, eps, offset=0.0):
    from jq.nn import RMSNorm

    total = a if b is None else a + b
    return RMSNorm(gain, eps, offset)(total), total


def plain_gate(a):
    gate, up = jnp.split(a, 2, axis=-1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(a.dtype) * up


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (32, 4096), (3, 576), (2, 5120)])
def test_norm_and_gate_alone(m, k):
    from pallas_kernels import norm
    from pallas_kernels.prologue import Gate, Norm

    a, b, gain, both = normal((m, k)), normal((m, k), seed=1), normal((k,), seed=2), normal((m, 2 * k), seed=3)
    y, total = norm.add_norm(a, b, gain, prologue=Norm(1e-5))
    want, want_total = plain_norm(a, b, gain, 1e-5)
    np.testing.assert_array_equal(total, want_total)
    assert error(y, want) < 1e-3  # a last bit here and there
    assert error(norm.gate(both, prologue=Gate()), plain_gate(both)) < 1e-3


def prologues(m, k):
    """(prologue, its inputs, x that it makes) of each kind."""
    from pallas_kernels.prologue import Gate, Norm, Plain

    a, b, gain, both = normal((m, k)), normal((m, k), seed=1), normal((k,), seed=2), normal((m, 2 * k), seed=3)
    yield Norm(1e-5), (a, b, gain), plain_norm(a, b, gain, 1e-5)
    yield Norm(1e-6, 1.0, False), (a, None, gain), plain_norm(a, None, gain, 1e-6, 1.0)
    yield Gate(), (both, None, None), (plain_gate(both),)
    yield Plain(), (a, None, None), (a,)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 6144, 4096), (1, 4096, 14336), (2, 576, 1536), (1, 1152, 576)])
@pytest.mark.parametrize("kind", ["w4a16_g128", "w8a16_row", "nf4_b64"])
def test_packed_product_makes_its_input(kind, m, n, k):
    from pallas_kernels import fused, prepare, tensors
    from pallas_kernels.prologue import Plain

    if kind == "w4a16_g128" and k % 128:
        kind = "w4a16_g32"
    q = weights.make(kind, n, k)
    dense, w = np.asarray(q.dequantize("float32"), np.float64), tensors.packed(prepare(q))
    taken = 0
    for prologue, (a, b, gain), made in prologues(m, k):
        choice = None if prologue == Plain() else fused.choice_for(prologue, m, w)
        if choice is None:
            continue
        taken += 1
        bias = normal((n,), jnp.float32, 7)
        y, *total = fused.matmul(a, w, b, gain, bias, prologue=prologue, config=choice.config)
        want = np.asarray(made[0].astype(jnp.float32), np.float64) @ dense.T + np.asarray(bias)
        assert error(y, want) < 5e-3, prologue
        if total:
            np.testing.assert_array_equal(total[0], made[1])
    assert taken


@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (3072, 576), (64, 512), (6144, 2048)])
@pytest.mark.parametrize("kind", ["w4a16_g32", "w8a16_row", "nf4_b64"])
def test_packed_product_with_a_gate_behind_it(kind, n, k):
    from pallas_kernels import fused, prepare, tensors
    from pallas_kernels.prologue import Gate, Norm

    q = weights.make(kind, n, k)
    dense, w = q.dequantize("float32"), tensors.packed(prepare(q))
    prologue, bias = Norm(1e-5), normal((n,), jnp.float32, 7)
    a, b, gain = normal((1, k)), normal((1, k), seed=1), normal((k,), seed=2)
    choice = fused.gated_choice(prologue, 1, w)
    assert choice is not None
    x, want_total = plain_norm(a, b, gain, 1e-5)
    product = jnp.dot(x.astype(jnp.float32), dense.T, precision="highest") + bias
    want = plain_gate(product.astype(jnp.bfloat16))
    results = [
        fused.matmul(a, w, b, gain, bias, prologue=prologue, epilogue=Gate(), config=choice.config) for _ in range(2)
    ]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], want_total)
    # both factors are rounded before they are multiplied, and one of 32 outputs may hold most of the norm
    assert error(results[0][0], want) < (1e-2 if n == 64 else 5e-3)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 6144, 4096), (1, 4096, 14336), (3, 576, 1536), (8, 256, 2048)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dense_product_makes_its_input(dtype, m, n, k):
    from pallas_kernels import dense

    w = normal((n, k), dtype, 9)
    taken = 0
    for prologue, inputs, made in prologues(m, k):
        plan = dense.plan_for(prologue, m, n, k, jnp.dtype(dtype))
        if plan is None:
            continue
        taken += 1
        a, b, gain = (None if x is None else x.astype(dtype) for x in inputs)
        bias = normal((n,), jnp.float32, 7)
        results = [dense.matmul(a, w, b, gain, bias, prologue=prologue, plan=plan) for _ in range(2)]
        np.testing.assert_array_equal(results[0][0], results[1][0])
        if dtype == jnp.float16:
            continue  # the inputs of `made` are bfloat16
        want = np.asarray(made[0].astype(jnp.float32), np.float64) @ np.asarray(w.astype(jnp.float32), np.float64).T
        assert error(results[0][0], want + np.asarray(bias)) < 4e-3, prologue
        if len(results[0]) > 1:
            np.testing.assert_array_equal(results[0][1], made[1])
    assert taken
