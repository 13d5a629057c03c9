"""Gradients of `pallas_kernels.matmul` under `shard_map`, on two CPU devices, with plain JAX in place of the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"jax {jax.__version__}: Mosaic GPU of 0.11 is needed"
)

SCRIPT = """
import functools
import jax
import jax.numpy as jnp
import pallas_kernels
from pallas_kernels import api, reference, tune
from pallas_kernels.form import Form

def plain(x, w, choice, bias=None, layer=None):
    w = w if layer is None else jax.tree.map(lambda a: a[layer[0]], w)
    return (reference.product(x, w) + (0 if bias is None else bias)).astype(x.dtype)

api.launch = plain
mesh = jax.make_mesh((2,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
layers = [tune.random_weight(Form(), 64, 128, seed) for seed in range(2)]
stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
x, bias, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 128), (64,), (4, 128)]))
x = x.astype(jnp.bfloat16)
parts, whole = jax.P("parts"), jax.P()
by_rows = jax.shard_map(
    lambda x, w, bias: pallas_kernels.matmul(x, w, bias=bias), mesh=mesh, in_specs=(parts, whole, whole), out_specs=parts
)
by_layer = jax.shard_map(
    functools.partial(pallas_kernels.matmul, layer=0), mesh=mesh, in_specs=(whole, parts), out_specs=jax.P(None, "parts")
)

def total(product):
    def of(x, bias):
        y = product(x, bias).astype(jnp.float32)
        return (y * g[:, : y.shape[1]]).sum()
    return jax.jit(jax.grad(of, argnums=(0, 1)))(x, bias)

alone = total(lambda x, bias: pallas_kernels.matmul(x, layers[0], bias=bias))
shared = total(lambda x, bias: by_rows(x, layers[0], bias))
both = total(lambda x, bias: jnp.concatenate([pallas_kernels.matmul(x, w) for w in layers], -1))
split = total(lambda x, bias: by_layer(x, stacked))
for a, b in ((alone, shared), (both, split)):
    for p, q in zip(a, b):
        p, q = p.astype(jnp.float32), q.astype(jnp.float32)
        assert jnp.linalg.norm(p - q) <= 2**-8 * jnp.linalg.norm(p), (p, q)
assert jnp.linalg.norm(shared[1]) > 0
"""


def test_gradients_are_those_of_one_device():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
