"""What a checkpoint does inside attention, behind transformers: rotated and rounded queries, keys and values.

Keys and values are rounded on their way into transformers' cache, as compressed-tensors does it: the attention module is
handed a stand-in for the cache, whose `update` rounds and passes on. So every cache class of transformers works, and none
saves memory by it: what it holds are the rounded numbers in the model's dtype (`jq.load` holds codes).
Queries are changed by the attention function. Each layer that does so has a copy of the config that names ours, which
calls the function that the model's own config names.

Source: compressed-tensors 0.20.0 (modeling/), whose place in the computation this takes.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from jq import rotation
from jq.checkpoint import Checkpoint
from jq.errors import UnsupportedError
from jq.formats.compressed_tensors_attention import Attentions, Inside, check_scale
from jq.models import kv_cache
from jq_torch.rounding import rounded

logger = logging.get_logger(__name__)

NAME = "jq_inside"  # of the attention function, in the config of a layer whose queries are changed
CACHE = "past_key_values"
KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")


class Matrix:
    """A rotation as a dense matrix float64[n, n], on each device where it was used."""

    def __init__(self, one: rotation.Rotation, arrays: Mapping[str, Any]) -> None:
        made = np.array(rotation.rotate(np.eye(one.size, dtype=np.float32), one, arrays), np.float64)
        if one.kind == "hadamard":
            made = np.sign(made) / np.sqrt(one.size)
        self.value = torch.from_numpy(made)
        self._placed: dict[torch.device, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k * n], each block of n times the matrix, in float64 and rounded once."""
        matrix = self._placed.get(x.device)
        if matrix is None:
            matrix = self._placed[x.device] = self.value.to(x.device)
        return (x.double().unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2).to(x.dtype)


class Changes:
    """The changes of one layer; stored scales lie on the attention module as buffers.

    Args:
      inside: rotations, and how queries are rounded.
      form: how keys and values are rounded, None for not at all.
      arrays: of the rotations.
      config: of the model, which names the attention function.
      at: the cache's place among the arguments of the module's forward.
    """

    def __init__(
        self, inside: Inside, form: kv_cache.Form | None, arrays: Mapping[str, Any], config: Any, at: int
    ) -> None:
        self.query, self.form, self.config, self.at = inside.query, form, config, at
        self.turn_query, self.turn_keys = (
            [Matrix(one, arrays) for one in each] for each in (inside.turn_query, inside.turn_keys)
        )

    def queries(self, module: nn.Module, q: torch.Tensor) -> torch.Tensor:
        for matrix in self.turn_query:
            q = matrix(q)
        return q if self.query is None else rounded(q, self.query, stored(module, "q"))

    def keys_and_values(self, module: nn.Module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for matrix in self.turn_keys:
            k = matrix(k)
        if self.form is None:
            return k, v
        return rounded(k, self.form, stored(module, "k")), rounded(v, self.form, stored(module, "v"))

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the module's forward: puts the stand-in in the cache's place."""
        at = self.at
        if at < len(args):
            return (*args[:at], StandIn(args[at], module, self), *args[at + 1 :]), kwargs
        return args, {**kwargs, CACHE: StandIn(kwargs.get(CACHE), module, self)}


class StandIn:
    """A layer's cache, or none, with rounding before it."""

    def __init__(self, cache: Any, module: nn.Module, changes: Changes) -> None:
        self._cache, self._module, self._changes = cache, module, changes

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        both = self._changes.keys_and_values(self._module, key_states, value_states)
        return both if self._cache is None else self._cache.update(*both, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attend(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The attention function of layers whose queries are changed."""
    changes: Changes = module.jq_changes  # type: ignore[assignment]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own = ALL_ATTENTION_FUNCTIONS.get_interface(changes.config._attn_implementation, eager)
    return own(module, changes.queries(module, query), *args, **kwargs)


def stored(module: nn.Module, which: str) -> dict[str, torch.Tensor]:
    """The parameters of "q", "k" or "v" that lie on an attention module, or (ModelOpt) on its projections."""
    found = {}
    for part in ("scale", "zero_point", "global_scale"):
        for owner in (module, getattr(module, f"{which}_proj", None)):
            value = getattr(owner, f"{which}_{part}", None)
            if part not in found and isinstance(value, torch.Tensor):
                found[part] = value
    return found


def install(model: Any, ckpt: Checkpoint, quantization: Mapping[str, Any], *, quantize: bool) -> None:
    """Changes the attention modules of a model as its checkpoint asks for.

    Args:
      model: before or after its tensors are loaded.
      ckpt: its files.
      quantization: the quantization_config.
      quantize: round queries, keys and values; rotations run in any case.

    Raises:
      UnsupportedError: rotations for attention that takes no other function.
      FormatError: a scale or matrix that the config asks for is not stored, or no number.
    """
    config = {**(ckpt.config or {}), "quantization_config": quantization}
    tensors = Stored(ckpt)
    named = _named_form(quantization, ckpt.label) if quantize else None
    attentions = Attentions(tensors, config, quantize=quantize, cache=True, label=ckpt.label)
    for path, module in model.named_modules():
        if not _is_attention(module):
            continue
        at = _in_file(path, model.base_model_prefix, tensors)
        try:
            found = attentions.layer(at)
        except UnsupportedError as e:
            if attentions.rotates(at):
                raise
            logger.warning_once(f"{e}. The cache stays float here")
            continue
        inside, arrays = found or (Inside(), {})
        form = inside.cache or named
        if form is not None and form is named:
            for name in [f"{at}.{owner}{w}_scale" for w in "kv" for owner in ("", f"{w}_proj.")]:
                if name in tensors:
                    check_scale(tensors[name], f"{ckpt.label}: {name}")
        if form is not None or inside != Inside():
            _change(module, inside, form, arrays, f"{ckpt.label}: {at}")


def holder(model: Any, path: str) -> nn.Module:
    """The module `path` for a tensor that is only carried; made where the model has none (matrices of rotations)."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if not hasattr(owner, name):
        owner.add_module(name, nn.Module())
    return model.get_submodule(path)


class Stored(Mapping[str, np.ndarray]):
    """A checkpoint's tensors by name, read when they are asked for."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.ckpt = ckpt

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.ckpt.entries:
            raise KeyError(name)
        return np.asarray(self.ckpt.read(name))

    def __contains__(self, name: object) -> bool:
        return name in self.ckpt.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.ckpt.entries)

    def __len__(self) -> int:
        return len(self.ckpt.entries)


def _named_form(quantization: Mapping[str, Any], label: str) -> str | None:
    """The 8-bit cache of a config that is not compressed-tensors' own scheme; a warning for one that is not done."""
    try:
        return kv_cache.scheme_of(quantization, label)
    except UnsupportedError:
        inner = quantization.get("quantization")
        everywhere = {**(inner if isinstance(inner, Mapping) else {}), **quantization}
        key = next((k for k in KEYS if everywhere.get(k)), KEYS[0])
        logger.warning_once(
            f"{label}: quantization_config: {key} {everywhere.get(key)!r} is not done here: keys and values stay float"
        )
        return None


def _is_attention(module: nn.Module) -> bool:
    """As compressed-tensors tells: by the class name and a projection of keys or values."""
    return "attention" in type(module).__name__.lower() and any(
        hasattr(module, name) for name in ("k_proj", "v_proj", "qkv_proj")
    )


def _in_file(path: str, base: str, tensors: Stored) -> str:
    """The module's name in the file, which may hold the base model alone, or more than it."""
    for name in (path, f"{base}.{path}", path.removeprefix(f"{base}.")):
        if any(stored.startswith(f"{name}.") for stored in tensors):
            return name
    return path


def _change(
    module: nn.Module, inside: Inside, form: kv_cache.Form | None, arrays: Mapping[str, Any], label: str
) -> None:
    forward = inspect.unwrap(type(module).forward)
    names, used = list(inspect.signature(forward).parameters), forward.__code__.co_names
    turned, of_queries = bool(inside.turn_query or inside.turn_keys), bool(inside.query or inside.turn_query)
    if CACHE not in names or "update" not in used or (of_queries and "ALL_ATTENTION_FUNCTIONS" not in used):
        if turned:
            raise UnsupportedError(f"{label}: {type(module).__name__} has no place for rotated queries and keys")
        logger.warning_once(
            f"{label}: kv_cache_scheme: {type(module).__name__} has no place for rounded keys and values; they stay float"
        )
        return
    changes = Changes(inside, form, arrays, module.config, names.index(CACHE) - 1)
    module.register_forward_pre_hook(changes, with_kwargs=True)
    if of_queries:
        module.jq_changes = changes  # type: ignore[assignment]
        module.config = copy.copy(module.config)  # type: ignore[assignment, arg-type]
        module.config._attn_implementation_internal = NAME  # type: ignore[union-attr, assignment]


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)  # once and for good: models outlive `disable`
