"""Rotary position embeddings: every scaling that a config.json can name, as cos and sin tables in float32.

Both spellings are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5). The
inverse frequencies follow transformers' `modeling_rope_utils.py` (5.23), operation by operation in float32, so that
the angles of long positions agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.errors import CheckpointError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding, static.

    Fields:
      kind: key of `KINDS`.
      theta: base wavelength.
      dim: rotated dimensions of a head (the first ones; the rest pass through).
      max_positions: `max_position_embeddings`.
      options: the other parameters of the config, sorted pairs (lists as tuples).
    """

    kind: str = "default"
    theta: float = 10000.0
    dim: int = 64
    max_positions: int = 2048
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        value = dict(self.options).get(key)
        return default if value is None else value

    def need(self, key: str) -> float:
        """A parameter that must be a positive number.

        Raises:
          ValueError: it is missing or something else.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{key} is {value!r:.80}, expected a positive number")
        return float(value)


def read(config: Mapping[str, Any], head_dim: int, *, theta: float = 10000.0, layer_type: str | None = None) -> Rope:
    """The rotary embedding that a config.json describes.

    Args:
      config: config.json of a decoder.
      head_dim: dimensions of a head.
      theta: the family's default base.
      layer_type: which entry of a `rope_parameters` that is nested by layer type.

    Raises:
      UnsupportedError: a `rope_type` that is not in `KINDS`.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: rope_parameters is {found!r:.80}, expected an object")
    params = dict(found)
    if layer_type in params:
        params = dict(params[layer_type] or {})
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    base = params.pop("rope_theta", None) or config.get("rope_theta") or theta
    partial = params.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    max_positions = config.get("max_position_embeddings") or 2048
    original = config.get("original_max_position_embeddings")
    if original is not None:
        params["original_max_position_embeddings"] = original
    if kind not in KINDS:
        raise UnsupportedError(f"config.json: rope_type {kind!r} is not known here; known: {', '.join(KINDS)}")
    options = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items()))
    rope = Rope(kind, float(base), int(head_dim * partial), int(max_positions), options)
    _check(rope, head_dim)
    return rope


def _check(rope: Rope, head_dim: int) -> None:
    """Computes the frequencies once, so that a wrong parameter is an error here and no NaN among the logits.

    Raises:
      CheckpointError: parameters that are missing, of a wrong type, or give frequencies that are not finite.
    """
    what = (
        f"config.json: rope of type {rope.kind!r} over {rope.dim} of {head_dim} dimensions, {dict(rope.options)!r:.200}"
    )
    for key, value in rope.options:  # an object would be the parameters of one kind of layers
        if not all(isinstance(v, int | float | str | None) for v in (value if isinstance(value, tuple) else (value,))):
            raise CheckpointError(f"{what}: {key} is neither a number nor a list of numbers")
    if not 0 < rope.dim <= head_dim or rope.dim % 2:
        raise CheckpointError(f"{what}: the dimensions must be an even part of the head")
    try:
        with np.errstate(all="ignore"), jax.ensure_compile_time_eval():
            frequencies, scale = KINDS[rope.kind](rope, jnp.int32(1))
            good = bool(np.isfinite(np.asarray(frequencies)).all()) and math.isfinite(scale)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise CheckpointError(f"{what}: a parameter is missing or wrong ({type(e).__name__}: {e})") from e
    if not good or np.shape(frequencies) != (rope.dim // 2,):
        raise CheckpointError(f"{what}: gives no finite frequency for each pair of dimensions")


def tables(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32[B, T, dim / 2], of positions int32[B, T]."""
    frequencies, scale = KINDS[rope.kind](rope, jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + dim/2) of the first `dim` dimensions of each head.

    Args:
      x: [B, T, heads, head_dim].
      cos, sin: float32[B, T, dim / 2].

    Returns:
      float32[B, T, heads, head_dim].
    """
    half = cos.shape[-1]
    x = x.astype(jnp.float32)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _powers(rope: Rope) -> np.ndarray:
    """theta ** (2i / dim), float32[dim / 2]."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return np.float32(rope.theta) ** exponents


def _default(rope: Rope, length: Any) -> tuple[Any, float]:
    del length
    return np.float32(1.0) / _powers(rope), 1.0


def _linear(rope: Rope, length: Any) -> tuple[Any, float]:
    del length
    return np.float32(1.0) / _powers(rope) / np.float32(rope.need("factor")), 1.0


def _dynamic(rope: Rope, length: Any) -> tuple[Any, float]:
    """NTK scaling: the base grows with the longest position of the batch beyond `max_positions`."""
    factor, dim = rope.need("factor"), rope.dim
    length = jnp.maximum(length, rope.max_positions).astype(jnp.float32)
    growth = (factor * length / rope.max_positions) - (factor - 1)
    base = rope.theta * growth ** (dim / (dim - 2))
    return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)), 1.0


def _yarn(rope: Rope, length: Any) -> tuple[Any, float]:
    del length
    original = rope.get("original_max_position_embeddings", rope.max_positions)
    factor = rope.get("factor") or rope.max_positions / original
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and all_dim:
            scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
        else:
            scale = _yarn_scale(factor)

    def dimension(rotations: float) -> float:
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high  # a ramp of no width divides by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = _powers(rope)
    keep = 1 - ramp
    near, far = np.float32(1.0) / powers, np.float32(1.0) / (np.float32(factor) * powers)
    return far * (1 - keep) + near * keep, float(scale)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def switch(rope: Rope) -> int:
    """The longest sequence that LongRoPE gives its short factors."""
    return rope.get("original_max_position_embeddings", rope.max_positions)


def _longrope(rope: Rope, length: Any) -> tuple[Any, float]:
    original = switch(rope)
    factor = rope.get("factor") or rope.max_positions / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(rope)
    short, long = (np.float32(1.0) / (np.float32(rope.get(k)) * powers) for k in ("short_factor", "long_factor"))
    return jnp.where(length > original, long, short), float(scale)


def _llama3(rope: Rope, length: Any) -> tuple[Any, float]:
    del length
    frequencies = np.float32(1.0) / _powers(rope)
    factor, low, high = (np.float32(rope.need(k)) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(rope.get("original_max_position_embeddings", rope.max_positions))
    wavelengths = np.float32(2 * math.pi) / frequencies
    slow = np.where(wavelengths > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * slow / factor + smooth * slow
    medium = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(medium, blended, slow), 1.0


# rope_type -> (rope, longest position + 1) -> (inverse frequencies float32[dim / 2], factor of cos and sin)
KINDS: dict[str, Callable[[Rope, Any], tuple[Any, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
