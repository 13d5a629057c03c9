"""The key/value cache: one buffer a layer, of static size, in the compute dtype or in 8 bits.

Layout [B, kv_heads, S, head_dim], so that each head's keys lie together. Slot i holds the i-th token of the padded
sequence; rows are padded on the left, so slots below `starts[b]` of row b are never attended to.

8-bit values need scales: the checkpoint's own (`k_scale`, `v_scale`: value = code * scale), else one for each token
and head, written beside the codes. Other quantizations of compressed-tensors (with zero points, NVFP4, fewer bits) are
rounded before they get here, and held in the compute dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.errors import UnsupportedError
from jq.formats.compressed_tensors_attention import keeps_codes
from jq.formats.compressed_tensors_config import parse_args

# name -> (dtype of the buffer, largest magnitude of a code); None: codes are the values themselves
DTYPES: dict[str, tuple[Any, float | None]] = {
    "float32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "float16": (jnp.float16, None),
    "int8": (jnp.int8, 127.0),
    "float8_e4m3": (jnp.float8_e4m3fn, 448.0),
}
_NAMES = {"float8_e4m3fn": "float8_e4m3", "fp8": "float8_e4m3", "float8": "float8_e4m3"}


def dtype_name(name: Any) -> str:
    """The key of `DTYPES` that a user's `kv_cache` argument means.

    Raises:
      UnsupportedError: none of them.
    """
    text = name if isinstance(name, str) else jnp.dtype(name).name
    text = _NAMES.get(text, text)
    if text not in DTYPES:
        raise UnsupportedError(f"kv_cache={name!r} is not known; known: {', '.join(DTYPES)}")
    return text


def scheme_of(quantization: dict[str, Any]) -> str | None:
    """Cache dtype that a quantization_config's `kv_cache_scheme` (or ModelOpt's `kv_cache_quant_algo`) asks for."""
    scheme = quantization.get("kv_cache_scheme")
    algo = quantization.get("kv_cache_quant_algo") or (quantization.get("quantization") or {}).get(
        "kv_cache_quant_algo"
    )
    if isinstance(scheme, dict):
        args = parse_args(scheme, "quantization_config: kv_cache_scheme")
        if args is not None and keeps_codes(args):
            return "int8" if args.type == "int" else "float8_e4m3"
        if "compress" in str(quantization.get("quant_method") or "compress"):
            return None  # rounded before it gets here: `jq.formats.compressed_tensors_attention`
        raise UnsupportedError(f"kv_cache_scheme {scheme} is not done here: only 8 bits; kv_cache='bfloat16'")
    algo = algo or (scheme if isinstance(scheme, str) else None)
    if algo in ("FP8", "INT8"):
        return "int8" if algo == "INT8" else "float8_e4m3"
    if algo and str(algo).lower() != "none":
        raise UnsupportedError(
            f"quantization_config: a key/value cache in {algo} is not done here; kv_cache='bfloat16' (or 'int8', "
            "'float8_e4m3') takes another"
        )
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """Keys or values of one layer.

    Fields:
      codes: [B, kv_heads, S, head_dim].
      scales: float32[B, kv_heads, S] of 8-bit codes without a fixed scale, else None.
    """

    codes: jax.Array
    scales: jax.Array | None = None


def empty(name: str, shape: tuple[int, int, int, int], fixed: bool) -> Buffer:
    """Zeros of shape [B, kv_heads, S, head_dim]; `fixed`: the layer brings its own scale."""
    dtype, limit = DTYPES[name]
    scales = jnp.zeros(shape[:-1], jnp.float32) if limit is not None and not fixed else None
    return Buffer(jnp.zeros(shape, dtype), scales)


def encode(name: str, values: jax.Array, scale: jax.Array | None) -> Buffer:
    """Values [B, kv_heads, T, head_dim] as the cache stores them; `scale`: the layer's own, or None."""
    dtype, limit = DTYPES[name]
    if limit is None:
        return Buffer(values.astype(dtype))
    wide = values.astype(jnp.float32)
    scales = None
    if scale is None:
        scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-12) / limit
        wide = wide / scales[..., None]
    else:
        wide = wide / scale.astype(jnp.float32)
    wide = jnp.clip(wide, -limit if dtype != jnp.int8 else -128.0, limit)
    return Buffer(jnp.round(wide).astype(dtype) if dtype == jnp.int8 else exact.float8(wide, dtype), scales)


def decode(buffer: Buffer, scale: jax.Array | None, dtype: Any) -> jax.Array:
    """The values of a buffer, in `dtype`."""
    if not jnp.issubdtype(buffer.codes.dtype, jnp.signedinteger) and buffer.codes.dtype.itemsize > 1:
        return buffer.codes.astype(dtype)
    wide = buffer.codes.astype(jnp.float32)
    if buffer.scales is not None:
        return (wide * buffer.scales[..., None]).astype(dtype)
    return (wide * (1.0 if scale is None else scale.astype(jnp.float32))).astype(dtype)


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
