"""What compressed-tensors does inside attention: queries, keys and values are rotated and quantized behind the rotary embedding.

    kv_cache_scheme               keys and values, with `self_attn.k_scale`, `.k_zero_point`, `.k_global_scale` (and v_)
    a group that targets attention modules ("LlamaAttention", "re:.*self_attn$") with input_activations and no weights:
                                  queries as well, `self_attn.q_scale` ...
    transform_config              locations q_attn and k_cache, see `compressed_tensors_transforms`

Scales are [1], or [heads, 1, 1] (strategy attn_head); a global scale [1] with dynamic "local" (NVFP4). The library
quantizes and dequantizes on the way into the cache; `jq.models.kv_cache` keeps the codes.

Source: compressed-tensors 0.20.0 (modeling/, quantization/lifecycle/{apply,initialize}.py), which runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jq import rotation
from jq.errors import FormatError, JqWarning, UnsupportedError
from jq.formats import stored_config
from jq.formats.base import Context
from jq.formats.compressed_tensors_config import Args, Options, matches_name, parse
from jq.formats.compressed_tensors_transforms import LOCATIONS
from jq.rotation import Rotation

INSIDE = ("q_attn", "k_cache")


@dataclasses.dataclass(frozen=True)
class Inside:
    """What happens to queries and to keys (and values) of one layer: rotations, then quantization. Hashable.

    Fields:
      query: how queries are quantized.
      cache: how keys and values are held.
      turn_query, turn_keys: rotations before that.
    """

    query: Args | None = None
    cache: Args | None = None
    turn_query: tuple[Rotation, ...] = ()
    turn_keys: tuple[Rotation, ...] = ()

    def __call__(self, q: jax.Array, k: jax.Array, arrays: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """q and k [B, heads, T, head_dim] as they enter attention and cache, in their dtype."""
        for one in self.turn_query:
            q = rotation.rotate(q, one, arrays)
        for one in self.turn_keys:
            k = rotation.rotate(k, one, arrays)
        if self.query is not None:
            from jq.activation_schemes.compressed_tensors import parameters_of, quantize

            q = quantize(q, self.query, parameters_of(arrays, "q")).dequantized
        return q, k


class Attentions:
    """The attention layers of a checkpoint.

    Args:
      tensors: its stored tensors by name.
      config: its config.json.
      quantize: whether queries, keys and values are quantized; they are rotated in any case.
      cache: whether keys and values are (not where the caller chose another cache).
      label: file or directory for messages.

    Attributes:
      names: stored tensors that attention reads.
    """

    def __init__(
        self, tensors: Mapping[str, Any], config: Mapping[str, Any], *, quantize: bool, cache: bool, label: str
    ) -> None:
        self._tensors, self._quantize, self._cache, self._label = tensors, quantize, cache, label
        self._options: Options | None = None
        self.names: set[str] = set()
        stored = stored_config(config, label)
        found = {} if stored is None else stored[1]
        if "compress" in str(found.get("quant_method") or "compress"):
            self._options = self._parsed(found, config)

    def _parsed(self, found: Mapping[str, Any], config: Mapping[str, Any]) -> Options | None:
        relevant = {
            k: found[k] for k in ("config_groups", "ignore", "kv_cache_scheme", "transform_config") if found.get(k)
        }
        schemes = (relevant.get("transform_config") or {}).get("config_groups") or {}
        ends = tuple(
            f".{name}_{where}.{part}" for name in schemes for where in LOCATIONS for part in ("weight", "perm")
        )
        shapes = {n: tuple(np.shape(self._tensors[n])) for n in self._tensors if ends and n.endswith(ends)}
        return parse(relevant, Context(config=config, shapes=shapes, label=self._label)) if relevant else None

    def layer(self, path: str) -> tuple[Inside, dict[str, np.ndarray]] | None:
        """What happens inside the attention module `path`, and its arrays; None: nothing.

        Raises:
          FormatError: a scale or a matrix that the config asks for is not stored.
          UnsupportedError: scales that depend on all tokens of a call.
        """
        if self._options is None:
            return None
        arrays: dict[str, np.ndarray] = {}
        query, cache = self._schemes(path)
        if not self._quantize:
            query = cache = None
        for which, args in (("q", query), ("k", cache), ("v", cache)):
            if args is not None:
                arrays |= self._static(path, which, args)
        turned: dict[str, list[Rotation]] = {where: [] for where in INSIDE}
        transforms = self._options.transforms
        assert transforms is not None
        around = transforms.around(path, INSIDE) if transforms.schemes else []
        parts = (
            {k: np.asarray(self._tensors[n]) for k, n in transforms.borrowed(path, INSIDE).items()} if around else {}
        )
        self.names.update(transforms.borrowed(path, INSIDE).values() if around else ())
        for i, (scheme, apply) in enumerate(around):
            if not scheme.size:
                raise FormatError(f"{path}: transform_config.{scheme.name}: queries and keys need a head_dim")
            made, found = transforms.rotation(path, scheme, apply, scheme.size, parts, f"~{i}.")
            turned[apply.location].append(made)
            arrays |= found
        inside = Inside(query, cache, tuple(turned["q_attn"]), tuple(turned["k_cache"]))
        return None if inside == Inside() else (inside, arrays)

    def rotates(self, path: str) -> bool:
        """Whether queries or keys are rotated: what a model cannot run without."""
        transforms = None if self._options is None else self._options.transforms
        return transforms is not None and bool(transforms.around(path, INSIDE))

    def _schemes(self, path: str) -> tuple[Args | None, Args | None]:
        """How queries, and keys and values, are quantized; no cache where no scale is stored and each token takes its own."""
        options = self._options
        assert options is not None
        own = next(
            (
                g.inputs
                for g in options.groups
                if g.weights is None and g.inputs is not None and any(_means_attention(path, t) for t in g.targets)
            ),
            None,
        )
        if any(_means_attention(path, t) for t in options.ignore):
            own = None
        cache = own or options.kv_cache
        if cache is not None and (
            not self._cache or (own is None and keeps_codes(cache) and not self._fixed(path, cache))
        ):
            if self._cache and cache.dynamic is True and self._quantize:
                warnings.warn(
                    f"{self._label}: kv_cache_scheme is dynamic: the library forms one scale of a head from all tokens of a "
                    "call, those to come included; here each token has its own",
                    JqWarning,
                    stacklevel=2,
                )
            cache = None
        return own, cache

    def _fixed(self, path: str, args: Args) -> bool:
        """Whether the scales of a layer's keys and values are stored, and used."""
        stored = all(f"{path}.{which}_scale" in self._tensors for which in "kv")
        return stored and args.dynamic is False and args.strategy in ("tensor", "attn_head")

    def _static(self, path: str, which: str, args: Args) -> dict[str, np.ndarray]:
        if args.dynamic is True:
            if args.strategy != "group":
                raise UnsupportedError(
                    f"{self._label}: {path}: {args} of {which}: its scale depends on all tokens of a call, padding "
                    "included, which is not done here; quantize_activations=False leaves attention in float"
                )
            return {}
        if args.strategy not in ("tensor", "attn_head", "tensor_group") or (
            args.strategy == "tensor_group" and args.dynamic is False
        ):
            raise UnsupportedError(f"{self._label}: {path}: {args} of {which} is nothing that the library runs")
        needed = ["global_scale"] if args.dynamic == "local" else ["scale", *([] if args.symmetric else ["zero_point"])]
        found = {}
        for part in needed:
            name = f"{path}.{which}_{part}"
            if name not in self._tensors:
                raise FormatError(f"{self._label}: {name}: missing; the config asks for {args}")
            value = np.asarray(self._tensors[name])
            if value.size != 1 and (value.ndim != 3 or value.shape[1:] != (1, 1)):
                raise FormatError(f"{self._label}: {name}: found shape {value.shape}, expected (1,) or (heads, 1, 1)")
            if part != "zero_point":
                check_scale(value, f"{self._label}: {name}")
            self.names.add(name)
            found[f"{which}_{part}"] = value
        return found


def check_scale(value: np.ndarray, label: str) -> None:
    """Raises FormatError for a scale inside attention that nothing can be divided by."""
    if not (np.isfinite(value.astype(np.float64)) & (value != 0)).all():
        raise FormatError(
            f"{label}: is 0 or no number; the file is damaged. quantize_activations=False leaves attention in float"
        )


def keeps_codes(args: Args) -> bool:
    """Whether a scale for each token and head can stand in for those of a kv_cache_scheme that the file does not hold."""
    return args.symmetric and args.num_bits == 8 and args.strategy in ("tensor", "attn_head", "token", "channel")


def _means_attention(path: str, target: str) -> bool:
    return matches_name(path, target) or (not target.startswith("re:") and target.endswith("Attention"))
