"""The key/value cache: one buffer a layer, of static size, in the compute dtype or as codes in their own width.

Layout [B, kv_heads, S, head_dim], so that each head's keys lie together. Slot i holds the i-th token of the padded
sequence; rows are padded on the left, so slots below `starts[b]` of row b are never attended to.

Codes are made as a token is written and turned back as the cache is read. How, a form says:

    a name of `DTYPES`     floats as they are; int8 and float8 by the layer's scale (value = code * scale), else by one
                           for each token and head, which lies beside the codes
    `Args`                 a scheme of compressed-tensors, with the library's arithmetic: codes of 1 to 8 bits, packed
                           along head_dim (`jq.bits`), with the layer's stored scales and zero points or with those of
                           each token's groups beside the codes

No scheme that depends on several tokens can be held: a token's scale would change with those that come after it, and so
would the numbers that were read before. (The library computes such a scale anew for every call.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jq import bits, exact
from jq.activation_schemes.compressed_tensors import fixed_of, quantize, restored
from jq.activation_schemes.elements import BY_BITS, ELEMENTS
from jq.errors import UnsupportedError
from jq.formats.compressed_tensors_attention import keeps_codes
from jq.formats.compressed_tensors_config import Args, parse_args

Form = str | Args
Static = Mapping[str, Any]  # the layer's stored "scale", "zero_point", "global_scale", as far as there are any

# name -> (dtype of the buffer, largest magnitude of a code); None: codes are the values themselves
DTYPES: dict[str, tuple[Any, float | None]] = {
    "float32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "float16": (jnp.float16, None),
    "int8": (jnp.int8, 127.0),
    "float8_e4m3": (jnp.float8_e4m3fn, 448.0),
}
# name -> scheme, of caches that a user may choose
SCHEMES = {
    "int4": Args(4, "int", symmetric=False, strategy="group", group_size=32, dynamic=True),
    "mxfp4": Args(4, "float", strategy="group", group_size=32, dynamic=True, scale_dtype="uint8"),
}
_NAMES = {"float8_e4m3fn": "float8_e4m3", "fp8": "float8_e4m3", "float8": "float8_e4m3"}
LEAST = 1e-12  # what a scale is made of where every value is smaller


def form_of(name: Any, head_dim: int) -> Form:
    """What a user's `kv_cache` argument means.

    Raises:
      UnsupportedError: nothing that is known, or groups that do not divide head_dim.
    """
    try:
        text = name if isinstance(name, str) else jnp.dtype(name).name
    except TypeError:
        text = repr(name)
    text = _NAMES.get(text, text)
    if text in DTYPES:
        return text
    if text not in SCHEMES:
        raise UnsupportedError(f"kv_cache={name!r} is not known; known: {', '.join((*DTYPES, *SCHEMES))}")
    if head_dim % SCHEMES[text].group_size:
        raise UnsupportedError(
            f"kv_cache={name!r} takes groups of {SCHEMES[text].group_size}, which do not divide this model's head_dim "
            f"of {head_dim}; 'int8' and 'float8_e4m3' take any"
        )
    return SCHEMES[text]


def scheme_of(quantization: Mapping[str, Any], label: str) -> str | None:
    """Cache dtype that a quantization_config's `kv_cache_scheme` (or ModelOpt's `kv_cache_quant_algo`) asks for.

    Args:
      label: file or directory for messages.

    Raises:
      FormatError: a scheme of unknown keys or values.
      UnsupportedError: a cache that is not done here.
    """
    label = f"{label}: quantization_config"
    scheme, inner = quantization.get("kv_cache_scheme"), quantization.get("quantization")
    algo = quantization.get("kv_cache_quant_algo")
    if not algo and isinstance(inner, Mapping):
        algo = inner.get("kv_cache_quant_algo")
    if isinstance(scheme, dict):
        args = parse_args(scheme, f"{label}: kv_cache_scheme")
        if args is not None and keeps_codes(args):
            return "int8" if args.type == "int" else "float8_e4m3"
        if "compress" in str(quantization.get("quant_method") or "compress"):
            return None  # each layer's own: `jq.formats.compressed_tensors_attention`
        raise UnsupportedError(
            f"{label}: kv_cache_scheme {scheme} is not done here, only 8 bits are; kv_cache='bfloat16' takes another"
        )
    algo = algo or (scheme if isinstance(scheme, str) else None)
    if algo in ("FP8", "INT8"):
        return "int8" if algo == "INT8" else "float8_e4m3"
    if algo and str(algo).lower() != "none":
        raise UnsupportedError(
            f"{label}: a key/value cache in {algo!r:.80} is not done here; kv_cache='bfloat16' (or 'int8', "
            "'float8_e4m3') takes another"
        )
    return None


def takes_scale(form: Form) -> bool:
    """Whether a layer's `k_scale` and `v_scale` are used, where they are stored."""
    return isinstance(form, str) and DTYPES[form][1] is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """Keys or values of one layer.

    Fields:
      codes: [B, kv_heads, S, head_dim], or [..., words] of codes narrower than 8 bits.
      scales: of what brings none of its own, else None: float32[B, kv_heads, S] for a name; for `Args`
        [B, kv_heads, S, groups] in the compute dtype, uint8 exponents + 127 (MX) or float8_e4m3fn (NVFP4).
      zeros: int8[B, kv_heads, S, groups] where groups have zero points.
    """

    codes: jax.Array
    scales: jax.Array | None = None
    zeros: jax.Array | None = None


def empty(form: Form, shape: tuple[int, int, int, int], static: Static, dtype: Any) -> Buffer:
    """Zeros for values of shape [B, kv_heads, S, head_dim] in the compute dtype."""
    made = jax.eval_shape(lambda x: encode(form, x, static), jax.ShapeDtypeStruct(shape, dtype))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made)


def encode(form: Form, values: jax.Array, static: Static) -> Buffer:
    """Values [B, kv_heads, T, head_dim] as the cache stores them."""
    if isinstance(form, Args):
        return _encode_scheme(form, values, static)
    dtype, limit = DTYPES[form]
    if limit is None:
        return Buffer(values.astype(dtype))
    wide = values.astype(jnp.float32)
    scales = None
    if "scale" not in static:
        scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), LEAST) / limit
        wide = wide / scales[..., None]
    else:
        wide = wide / static["scale"].astype(jnp.float32)
    wide = jnp.clip(wide, -limit if dtype != jnp.int8 else -128.0, limit)
    return Buffer(jnp.round(wide).astype(dtype) if dtype == jnp.int8 else exact.float8(wide, dtype), scales)


def decode(form: Form, buffer: Buffer, static: Static, head_dim: int, dtype: Any) -> jax.Array:
    """The values [..., head_dim] of a buffer, in `dtype`."""
    if isinstance(form, Args):
        return _decode_scheme(form, buffer, static, head_dim, dtype)
    if DTYPES[form][1] is None:
        return buffer.codes.astype(dtype)
    wide = buffer.codes.astype(jnp.float32)
    if buffer.scales is not None:
        return (wide * buffer.scales[..., None]).astype(dtype)
    return (wide * static["scale"].astype(jnp.float32)).astype(dtype)


def _encode_scheme(args: Args, values: jax.Array, static: Static) -> Buffer:
    found = quantize(values, args, static)
    codes = _codes(found.values, args)
    if args.dynamic is False:
        return Buffer(codes)
    scales = found.scales
    if args.strategy == "tensor_group":
        scales = scales.astype(jnp.float8_e4m3fn)
    elif args.is_mx:  # powers of two: the exponent's bits
        scales = (jax.lax.bitcast_convert_type(scales, jnp.int32) >> 23).astype(jnp.uint8)
    return Buffer(codes, scales, None if found.zeros is None else found.zeros.astype(jnp.int8))


def _decode_scheme(args: Args, buffer: Buffer, static: Static, head_dim: int, dtype: Any) -> jax.Array:
    values = _values(buffer.codes, args, head_dim, jnp.float32 if args.strategy == "tensor_group" else dtype)
    if buffer.scales is None:
        scale, zero = fixed_of(args, static, dtype)
        return restored(values, scale, zero, args, static, dtype)
    scales = buffer.scales[..., None]
    if args.strategy == "tensor_group":
        scales = scales.astype(jnp.float32)
    elif args.is_mx:
        scales = exact.pow2(scales.astype(jnp.int32) - 127)
    zeros = None if buffer.zeros is None else buffer.zeros[..., None].astype(dtype)
    groups = values.reshape(*values.shape[:-1], -1, args.group_size)
    return restored(groups, scales, zeros, args, static, dtype).reshape(values.shape)


def _codes(values: jax.Array, args: Args) -> jax.Array:
    """Quantized numbers as they lie in memory."""
    if args.type == "int":
        return values.astype(jnp.int8) if args.num_bits == 8 else bits.pack(values.astype(jnp.int8), args.num_bits)
    if args.num_bits == 8:
        return values.astype(jnp.float8_e4m3fn)
    mantissa, smallest, *_ = ELEMENTS[BY_BITS[args.num_bits]]
    pattern = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    magnitude = (pattern & 0x7FFFFFFF) >> (23 - mantissa)
    normal = magnitude - ((126 + smallest) << mantissa)
    below = jnp.abs(values.astype(jnp.float32) * 2.0 ** (mantissa - smallest)).astype(jnp.int32)
    code = jnp.where(normal >> mantissa > 0, normal, below)
    return bits.pack(code | ((pattern < 0).astype(jnp.int32) << (args.num_bits - 1)), args.num_bits)


def _values(codes: jax.Array, args: Args, count: int, dtype: Any) -> jax.Array:
    """The inverse of `_codes`: numbers [..., count] in `dtype`, which holds them exactly."""
    if args.num_bits == 8:
        return codes.astype(dtype)
    found = bits.unpack(codes, args.num_bits, count, signed=args.type == "int")
    if args.type == "int":
        return found.astype(dtype)
    mantissa, smallest, *_ = ELEMENTS[BY_BITS[args.num_bits]]
    magnitude = found & ((1 << (args.num_bits - 1)) - 1)
    pattern = (magnitude << (23 - mantissa)) + ((126 + smallest) << 23)
    normal = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    below = magnitude.astype(jnp.float32) * 2.0 ** (smallest - mantissa)
    size = jnp.where(magnitude >> mantissa > 0, normal, below)
    return jnp.where(found >> (args.num_bits - 1) > 0, -size, size).astype(dtype)


def write(buffer: Buffer, new: Buffer, slot: Any) -> Buffer:
    """The buffer with `new` at slots [slot, slot + T). The caller sees to it that they exist: JAX would clamp."""
    if buffer.codes.ndim == 3:
        values = new.codes.reshape(-1, *new.codes.shape[2:])
        return Buffer(jax.lax.dynamic_update_slice(buffer.codes, values, (0, slot, 0)))

    def put(old: jax.Array, values: jax.Array) -> jax.Array:
        start = (0, 0, slot) + (0,) * (old.ndim - 3)
        return jax.lax.dynamic_update_slice(old, values.astype(old.dtype), start)

    return jax.tree.map(put, buffer, new)


def merged(cache: Any) -> Any:
    """A float32 cache for a loop of single tokens on the CPU: codes [B * kv_heads, S, head_dim]; any other as it is.

    XLA's CPU backend takes a dot with one batch axis over the loop's own buffer; with two it would copy the buffer of
    every layer at every token, and a multiply and reduce takes 1.6 ms of 29 a token longer (SmolLM2-135M).
    """
    buffers = jax.tree.leaves(cache, is_leaf=_is_buffer)
    if jax.default_backend() != "cpu" or any(b.codes.dtype != jnp.float32 or b.codes.shape[1] == 1 for b in buffers):
        return cache  # an axis of one head is dropped, and the copies are there again
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), cache)


def apart(cache: Any, batch: int) -> Any:
    """The inverse of `merged`."""

    def one(buffer: Buffer) -> Buffer:
        codes = buffer.codes
        return Buffer(codes.reshape(batch, -1, *codes.shape[1:])) if codes.ndim == 3 else buffer

    return jax.tree.map(one, cache, is_leaf=_is_buffer)


def _is_buffer(node: Any) -> bool:
    return isinstance(node, Buffer)
