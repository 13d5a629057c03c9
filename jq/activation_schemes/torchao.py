"""torchao's activation quantization: int8 by token or tensor, float8 by token, tensor or block.

After torchao 0.18.0 on a CPU (quantize_/workflows/{int8,intx,float8}, quant_primitives.py). Scales are computed in the
input's dtype; Int8Tensor and Float8Tensor widen them to float32 before they quantize, IntxUnpackedToInt8Tensor stays in
the input's dtype throughout (in float32, a third of its codes would differ).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import exact
from jq.activation_schemes.products import float_sums, integer_matmul, plus_bias
from jq.activations import register
from jq.algorithms.torchao import INT8_EPS, NORMAL


@register("torchao_int8", adds_bias=True)
def int8(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """Int8Tensor: x [M, K] -> [M, N]. Options: granularity, asymmetric, reduce_range; maybe static scales."""
    codes, scale, zero = quantize_int8(x, w)
    weights = w.unpack().astype(jnp.int8)
    y = exact.rounded((integer_matmul(codes, weights).astype(jnp.float32) * scale).astype(x.dtype))
    if w.activation.get("asymmetric"):
        sums = jnp.sum(weights.astype(jnp.int32), axis=-1).astype(jnp.float32)
        shift = exact.rounded(((zero.astype(jnp.float32) * scale) * sums).astype(x.dtype))
        y = exact.rounded(y - shift)
    wide = exact.cast(y, jnp.float32) * jnp.asarray(w.scales).astype(jnp.float32).reshape(1, -1)
    return exact.rounded(plus_bias(wide, bias).astype(x.dtype))


def quantize_int8(x: jax.Array, w: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes int8[M, K], scale float32 and zero int8, [M, 1] or [1, 1]."""
    options = w.activation
    low, high = (-64, 63) if options.get("reduce_range") else (-128, 127)
    asymmetric = bool(options.get("asymmetric"))
    if "act_quant_scale" in options.parameters:
        scale = jnp.asarray(w.extras["act_quant_scale"]).reshape(1, 1)
        zero = jnp.zeros((1, 1), jnp.int8)
        if "act_quant_zero_point" in options.parameters:
            zero = jnp.asarray(w.extras["act_quant_zero_point"]).reshape(1, 1)
    else:
        rows = x.reshape(1, -1) if options.get("granularity") == "tensor" else x
        scale, zero = _qparams(rows, low, high, asymmetric, INT8_EPS)
    scale = scale.astype(jnp.float32)
    product = x.astype(jnp.float32) * exact.reciprocal(scale)
    codes = jnp.clip(jnp.round(product) + zero.astype(jnp.float32), low, high)
    return codes.astype(jnp.int8), scale, zero


def _qparams(x: jax.Array, low: int, high: int, asymmetric: bool, eps: float) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point (int8) of each row, [M, 1], in x's dtype."""
    dtype = x.dtype
    smallest = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0)
    largest = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0)
    if not asymmetric:
        peak = jnp.maximum(-smallest, largest)
        scale = exact.rounded(exact.div(peak, jnp.asarray((high - low) / 2, dtype)))
        return jnp.maximum(scale, jnp.asarray(eps, dtype)), jnp.zeros(scale.shape, jnp.int8)
    span = exact.rounded(largest - smallest)
    scale = exact.rounded(exact.div(span, jnp.asarray(high - low, dtype)))
    scale = jnp.maximum(scale, jnp.asarray(eps, dtype))
    shift = jnp.round(exact.rounded(exact.div(smallest, scale)))
    zero = jnp.clip(exact.rounded(jnp.asarray(low, dtype) - shift), low, high)
    return scale, zero.astype(jnp.int8)


@register("torchao_int8_fake", adds_bias=True)
def int8_fake(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """IntxUnpackedToInt8Tensor with int8_asym_per_token: quantized and dequantized in x's dtype, then a plain product."""
    codes, scale, zero = quantize_int8_fake(x)
    difference = exact.rounded(codes.astype(x.dtype) - zero.astype(x.dtype))
    weights = exact.cast(w.dequantize(), x.dtype)
    return plus_bias(float_sums(exact.rounded(difference * scale), weights), bias).astype(x.dtype)


def quantize_int8_fake(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes int8[M, K], scale in x's dtype and zero int8 [M, 1]."""
    scale, zero = _qparams(x, -128, 127, True, NORMAL[str(x.dtype)])
    inverse = exact.rounded(exact.reciprocal(scale))
    rounded = jnp.round(exact.rounded(x * inverse))
    codes = jnp.clip(exact.rounded(rounded + zero.astype(x.dtype)), -128, 127)
    return codes.astype(jnp.int8), scale, zero


@register("torchao_float8", adds_bias=True)
def float8(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """Float8Tensor: x [M, K] -> [M, N], float32 sums times both scales."""
    codes, scale = quantize_float8(x, w)
    weights, block = w.values(), w.activation.get("granularity")
    scales = jnp.asarray(w.scales).astype(jnp.float32)
    if isinstance(block, int) or scales.shape[-1] > 1:  # scales along K: applied before the sum
        groups = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1).astype(jnp.float32) * scale[..., None]
        y = float_sums(groups.reshape(x.shape), w.replace(dtype="float32").dequantize())
    else:
        y = float_sums(codes, weights) * scale * scales.reshape(1, -1)
    return exact.rounded(plus_bias(y, bias).astype(x.dtype))


def quantize_float8(x: jax.Array, w: Any) -> tuple[jax.Array, jax.Array]:
    """Codes float8[M, K] and scales float32: [M, 1], [1, 1], or [M, K / block].

    An all-zero row has scale 0, which gives NaN in torchao; here its codes are 0.
    """
    options = w.activation
    dtype = np.dtype(getattr(ml_dtypes, options.get("dtype")))
    top = float(ml_dtypes.finfo(dtype).max)
    granularity = options.get("granularity")
    rows = x
    if granularity == "tensor":
        rows = x.reshape(1, -1)
    elif isinstance(granularity, int):
        rows = x.reshape(x.shape[0], -1, granularity)
    peak = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    if options.get("low") is not None or options.get("high") is not None:
        peak = jnp.clip(peak, options.get("low"), options.get("high"))
    scale = exact.cast(exact.rounded(exact.div(peak, jnp.asarray(top, x.dtype))), jnp.float32)
    divisor = jnp.where(scale == 0, jnp.float32(1), scale)
    wide = rows.astype(jnp.float32).reshape(x.shape if granularity == "tensor" else rows.shape)
    codes = exact.float8(jnp.clip(exact.div(wide, divisor), -top, top), dtype)
    return codes.reshape(x.shape), scale[..., 0] if isinstance(granularity, int) else scale


@register("torchao_float8_int4")
def float8_int4(x: jax.Array, w: Any) -> jax.Array:
    """Int4Tensor with float8 inputs by token (FBGEMM's f8i4bf16_rowwise; own reading of the source, no GPU oracle)."""
    wide = x.astype(jnp.float32)
    peak = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), jnp.float32(1e-12))
    scale = exact.div(peak, jnp.float32(448))
    codes = exact.float8(jnp.clip(exact.div(wide, scale), -448, 448), jnp.float8_e4m3fn)
    return (float_sums(codes, w.dequantize()) * scale).astype(x.dtype)
