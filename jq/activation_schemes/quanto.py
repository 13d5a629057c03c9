"""Static activation quantization of optimum-quanto: input and output per tensor, with stored scales.

After optimum-quanto 0.2.7 on a CPU (nn/qmodule.py, tensor/weights/qbytes.py, library/{quantize,qbytes_mm}.py). The
output is quantized with `output_scale` after the bias. A calibrated model leaves some outputs unquantized
("streamline"), but that is not saved: a reloaded one quantizes all, and so does this.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import exact
from jq.activation_schemes.products import float_sums, integer_matmul
from jq.activations import register
from jq.matmul import dense_matmul
from jq.qtensor import Affine, NarrowFloat

TINYGEMM_GROUP = 128


@register("quanto", adds_bias=True)
def matmul(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]; option "dtype" is int8 or a float8, parameters are input_scale and output_scale."""
    kind = w.activation.get("dtype")
    dtype = np.dtype(w.dtype)
    scale = _scalar(w, "input_scale", dtype)
    codes = quantize(x, scale, kind)
    if isinstance(w, Affine) and w.code_bits == 8 and kind == "int8":
        y = _integer_product(codes, scale, w)
    elif isinstance(w, NarrowFloat) or w.code_bits == 8:
        weights = w.values(dtype) if isinstance(w, NarrowFloat) else w.unpack().astype(dtype)
        scaled = exact.rounded(exact.rounded(scale * w.scales) * weights)
        y = dense_matmul(codes.astype(dtype), scaled)
    elif w.code_bits == 4 and dtype == jnp.bfloat16 and w.grouping.cols == TINYGEMM_GROUP:
        y = float_sums(exact.rounded(codes.astype(dtype) * scale), _tinygemm(w)).astype(dtype)
    else:  # 4 and 2 bit weights: both sides are dequantized
        y = dense_matmul(exact.rounded(codes.astype(dtype) * scale), w.dequantize())
    if bias is not None:
        y = exact.rounded(y + bias.astype(dtype))
    scale = _scalar(w, "output_scale", dtype)
    return exact.rounded(quantize(y, scale, kind).astype(dtype) * scale)


def _tinygemm(w: Affine) -> jax.Array:
    """Weights float32[N, K] as tinygemm multiplies with them: (code - 8) * scale + (8 * scale - shift), never rounded.

    quanto holds bfloat16 weights of 4 bits in groups of 128 for that kernel, on a CPU and on a GPU.
    """
    dtype = jnp.dtype(w.dtype)
    scale, shift = jnp.asarray(w.scales), jnp.asarray(w.zeros)
    if not jnp.issubdtype(shift.dtype, jnp.floating):
        shift = exact.rounded(scale * shift.astype(dtype))
    middle = exact.rounded(8 * scale - shift.astype(dtype))
    spread = [jnp.repeat(exact.cast(a, jnp.float32), TINYGEMM_GROUP, axis=-1) for a in (scale, middle)]
    return (w.unpack().astype(jnp.float32) - 8) * spread[0] + spread[1]


def quantize(x: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
    """int8 or float8 numbers of x: the quotient rounds to x's dtype, then half to even, clipped to the dtype's range."""
    quotient = exact.rounded(exact.div(x, scale.astype(x.dtype)))
    if kind == "int8":
        return jnp.clip(jnp.round(quotient), -128, 127).astype(jnp.int8)
    target = np.dtype(getattr(ml_dtypes, kind))
    limit = jnp.asarray(float(ml_dtypes.finfo(target).max), x.dtype)
    return exact.float8(jnp.clip(quotient, -limit, limit), target)


def _integer_product(codes: jax.Array, scale: jax.Array, w: Affine) -> jax.Array:
    """dtype(float32(int32 sum) * float32(dtype(input_scale * weight_scale)))."""
    sums = integer_matmul(codes, w.unpack().astype(jnp.int8)).astype(jnp.float32)
    factors = exact.cast(exact.rounded(scale * jnp.asarray(w.scales).reshape(1, -1)), jnp.float32)
    return exact.rounded((sums * factors).astype(np.dtype(w.dtype)))


def _scalar(w: Any, name: str, dtype: np.dtype) -> jax.Array:
    return jnp.asarray(w.extras[name]).astype(dtype).reshape(())
