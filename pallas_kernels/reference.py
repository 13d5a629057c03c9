"""The kernels' arithmetic in plain JAX: decode of a packed weight, for tests, gradients and as documentation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.decode import DECODES, codebook
from pallas_kernels.form import Packed

FLOATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def dense(w: Packed) -> jax.Array:
    """float32 [N, K] of an unstacked packed weight, in the order of the original inputs."""
    n, k = w.shape
    form = w.form
    codes = layout.unpack_codes(w.codes, DECODES[form.decode].order, (n, k))
    scales = layout.unpack_rows(w.scales, n)
    if form.scale == "u8":
        block = (jnp.arange(n * scales.shape[1]) // 256).reshape(n, -1)
        scales = w.tables["table2"][scales.astype(jnp.int32)] * w.tables["absmax2"][block] + w.tables["offset"]

    def spread(params: jax.Array) -> jax.Array:
        return jnp.repeat(params.astype(jnp.float32), form.group or k, 1)[:, :k]

    if form.scale == "e8m0":
        scales = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    scale = spread(scales)
    if form.kind in FLOATS:
        weight = jax.lax.bitcast_convert_type(codes, FLOATS[form.kind]).astype(jnp.float32) * scale
    elif form.kind == "codebook":
        table = jnp.asarray(codebook.KNOWN[form.table]) if form.table else w.tables["table"]
        weight = table[codes.astype(jnp.int32)] * scale
    elif not form.zero:
        weight = (codes.astype(jnp.float32) - form.zero_point) * scale
    else:
        assert w.zeros is not None
        zero, code = spread(layout.unpack_rows(w.zeros, n)), codes.astype(jnp.float32)
        if form.zero_form == "code":
            weight = (code - zero) * scale
        else:
            weight = code * scale + (zero if form.zero_form == "plus" else -zero)
    return weight if w.perm is None else weight[:, jnp.argsort(w.perm)]


def product(x: jax.Array, w: Packed) -> jax.Array:
    """x @ w.T in float32, nothing rounded to 16 bits."""
    return jnp.dot(x.astype(jnp.float32), dense(w).T, precision="highest")
