"""Activation quantization of compressed-tensors: the input is quantized and dequantized, then multiplied as a float.

After compressed-tensors 0.20.0 (quantization/lifecycle/forward_helpers.py, quantization/utils/helpers.py), whose CPU
forward is the oracle. Every operation rounds to the input's dtype (bfloat16 in a bfloat16 model): scale, quotient,
product. Doing the same in float32 changes 2 to 7 % of the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes

from jq import exact
from jq.activation_schemes.elements import BY_BITS, to_element
from jq.activation_schemes.products import float_sums
from jq.activations import register
from jq.algorithms.minmax import EPS, MANTISSA, MX_SCALE
from jq.errors import UnsupportedError
from jq.formats.compressed_tensors_config import Args


class Quantized(NamedTuple):
    """A quantized activation.

    Fields:
      values: the quantized numbers as floats, shape of x, in x's dtype or float32 (integers, e4m3 or e2m1 values).
      scales: as the library computes (dynamic) or stores (static) them; NVFP4's local scales are e4m3 values.
      zeros: zero points or None.
      dequantized: the input of the product, in x's dtype.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    dequantized: jax.Array


@register("compressed_tensors", adds_bias=True)
def matmul(x: jax.Array, w: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [M, K] -> [M, N]. Options: "input" and "output" are `Args`; parameters are the stored static scales."""
    inputs, outputs = w.activation.get("input"), w.activation.get("output")
    if inputs is not None:
        x = quantize(x, inputs, parameters_of(w.extras, "input")).dequantized
    sums = float_sums(x, w.dequantize())
    if bias is not None:  # added to the float32 sums, as torch's linear does
        sums = sums + bias.astype(x.dtype).astype(jnp.float32)
    y = sums.astype(x.dtype)
    if outputs is not None:
        y = quantize(exact.rounded(y), outputs, parameters_of(w.extras, "output")).dequantized
    return y


def parameters_of(extras: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The stored parameters of `name` ("input", "k", ...) without that prefix: scale, zero_point, global_scale."""
    return {k.removeprefix(f"{name}_"): v for k, v in extras.items() if k.startswith(f"{name}_")}


def quantize(x: jax.Array, args: Args, static: Mapping[str, Any]) -> Quantized:
    """Quantizes an activation [..., M, K] as the library's `fake_quantize` does.

    Args:
      x: bfloat16, float16 or float32.
      args: how.
      static: "scale", "zero_point", "global_scale" where they are stored.

    Raises:
      UnsupportedError: a strategy that the library does not run, or K that is no multiple of the group size.
    """
    dtype = x.dtype
    if args.dynamic is False:
        return _apply(x, *fixed_of(args, static, dtype), args)
    if args.strategy == "token":
        return _apply(x, *_qparams(x, args), args)
    if args.strategy == "tensor":
        scale, zero = _qparams(x.reshape(-1), args)
        return _apply(x, scale, zero, args)
    if args.strategy not in ("group", "tensor_group") or x.shape[-1] % args.group_size:
        raise UnsupportedError(f"dynamic activation quantization {args} of {x.shape[-1]} inputs is not done here")
    groups = x.reshape(*x.shape[:-1], -1, args.group_size)
    if args.strategy == "tensor_group":
        found = _nvfp4(groups, static, args)
    elif args.is_mx:
        found = _mx(groups, args)
    else:
        found = _apply(groups, *_qparams(groups, args), args)
    zeros = None if found.zeros is None else found.zeros[..., 0]
    return Quantized(found.values.reshape(x.shape), found.scales[..., 0], zeros, found.dequantized.reshape(x.shape))


def fixed_of(args: Args, static: Mapping[str, Any], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The stored scale and zero point in `dtype`: [1], or [heads, 1, 1] beside [..., heads, T, head_dim]."""
    scale = jnp.asarray(static["scale"]).astype(dtype)
    shape = scale.shape if args.strategy == "attn_head" else (-1,)
    if args.strategy != "attn_head" and (args.strategy != "tensor" or scale.size != 1):
        raise UnsupportedError(f"static activation quantization per {args.strategy} is not done here: {args}")
    zero = None if args.symmetric else jnp.asarray(static["zero_point"]).reshape(shape).astype(dtype)
    return scale.reshape(shape), zero


def _qparams(x: jax.Array, args: Args) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point [..., 1] from the smallest and largest value along the last axis, in x's dtype."""
    dtype = x.dtype
    low, high = args.limits
    smallest = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0)
    largest = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0)
    if args.symmetric:
        scale = exact.rounded(exact.div(jnp.maximum(-smallest, largest), jnp.asarray((high - low) / 2, dtype)))
        zero = None
    else:
        scale = exact.rounded(exact.div(exact.rounded(largest - smallest), jnp.asarray(high - low, dtype)))
        shift = exact.rounded(exact.div(smallest, jnp.where(scale == 0, jnp.ones_like(scale), scale)))
        zero = jnp.round(jnp.clip(exact.rounded(jnp.asarray(low, dtype) - shift), low, high)).astype(dtype)
        zero = jnp.where(scale == 0, jnp.zeros_like(zero), zero)  # the library's 0 / 0 ends as the integer 0
    return jnp.where(scale == 0, jnp.asarray(EPS[str(dtype)], dtype), scale), zero


def _apply(x: jax.Array, scale: jax.Array, zero: jax.Array | None, args: Args) -> Quantized:
    """x / scale (+ zero) -> clamp -> round -> (- zero) * scale, each rounded to x's dtype."""
    scaled = exact.rounded(exact.div(x, scale))
    if zero is not None:
        scaled = exact.rounded(scaled + zero)
    values = round_to(scaled, args)
    return Quantized(values, scale, zero, restored(values, scale, zero, args, {}, x.dtype))


def restored(
    values: jax.Array, scales: jax.Array, zeros: jax.Array | None, args: Args, static: Mapping[str, Any], dtype: Any
) -> jax.Array:
    """What quantized numbers stand for, in `dtype`: scales and zero points as `Quantized` has them, broadcast to `values`."""
    if args.strategy == "tensor_group":
        return exact.rounded((values * exact.div(scales, _whole(static))).astype(dtype))
    if args.is_mx and args.dynamic is True:
        return exact.rounded((exact.cast(values, jnp.float32) * scales).astype(dtype))
    return exact.rounded((values if zeros is None else values - zeros) * scales)


def round_to(x: jax.Array, args: Args) -> jax.Array:
    """Clamps and rounds half to even onto the numbers that `args` can hold; same dtype."""
    low, high = args.limits
    x = jnp.clip(x, jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype))
    if args.type == "int":
        return jnp.round(x)
    if args.num_bits == 8:
        return exact.float8(x, ml_dtypes.float8_e4m3fn).astype(x.dtype)
    return to_element(exact.cast(x, jnp.float32), BY_BITS[args.num_bits]).astype(x.dtype)


def _mx(x: jax.Array, args: Args) -> Quantized:
    """Power-of-two scales from the exponent of the largest magnitude; x [..., groups, 32]."""
    dtype = str(x.dtype)
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    exponent = mx_exponent(peak, args.num_bits)
    if dtype == "float16":  # 2**exponent underflows in the library's float16, and a scale of zero becomes one
        exponent = jnp.where(exponent < -24, 0, exponent)
    # A power of two: multiplying by the inverse is the exact quotient. (2**-127 itself would be flushed to zero.)
    scaled = exact.rounded((exact.cast(x, jnp.float32) * exact.pow2(-exponent)).astype(x.dtype))
    values = round_to(scaled, args)
    scales = exact.pow2(exponent)
    return Quantized(values, scales, None, restored(values, scales, None, args, {}, x.dtype))


def mx_exponent(peak: jax.Array, bits: int) -> jax.Array:
    """Exponent of an MX scale, int32, -127..128: the exponent of `peak` rounded up from a significand of 1.75.

    Half a step of the element's mantissa is added to the bit pattern, so the carry decides (mxfp_utils.py).
    """
    mantissa = MANTISSA[str(peak.dtype)]
    width = {7: jnp.int16, 10: jnp.int16, 23: jnp.int32}[mantissa]
    pattern = jax.lax.bitcast_convert_type(peak, width).astype(jnp.int32)
    kept, largest = MX_SCALE[bits]
    field = (pattern + (1 << (mantissa - kept - 1))) >> mantissa
    bias = 15 if mantissa == 10 else 127
    exponent = field - bias - largest
    return jnp.clip(jnp.where(field == 0, -127, exponent), -127, 128)


def _nvfp4(x: jax.Array, static: Mapping[str, Any], args: Args) -> Quantized:
    """E4M3 scales of groups of 16 under a stored global scale; x [..., groups, 16]."""
    whole = _whole(static)
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    local = exact.cast(exact.div(peak, jnp.asarray(args.limits[1], x.dtype)), jnp.float32) * whole
    scales = exact.float8(jnp.clip(local, -448, 448), ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    scales = jnp.where(scales == 0, jnp.float32(EPS["float8_e4m3fn"]), scales)
    values = round_to(exact.div(exact.cast(x, jnp.float32), exact.div(scales, whole)), args)
    return Quantized(values, scales, None, restored(values, scales, None, args, static, x.dtype))


def _whole(static: Mapping[str, Any]) -> jax.Array:
    return jnp.asarray(static["global_scale"]).astype(jnp.float32).reshape(-1)
