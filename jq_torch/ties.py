"""Tied weights of which one is packed: an output layer, or another embedding, that computes with a packed table.

transformers ties parameters, which packed layers do not have. Here the other layer becomes a packed one too, which holds
the same parameters (`PackedWeight.tie`), and transformers' own tie is forgotten. A layer that the file holds by itself
is not tied, whatever the config says.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jq.errors import UnsupportedError
from jq_torch.embedding import JqEmbedding
from jq_torch.linear import JqLinear
from jq_torch.plan import Plan
from jq_torch.weight import PackedWeight

_TABLES = ("all_tied_weights_keys", "_tied_weights_keys")


def packed_in_place_of(old: nn.Module, fmt: str = "") -> PackedWeight | None:
    """An empty packed layer for a linear layer or an embedding; None for modules that cannot be packed."""
    if isinstance(old, nn.Embedding):
        return JqEmbedding.in_place_of(old, scale_in_float32=fmt == "gemma")
    return JqLinear.in_place_of(old) if isinstance(old, (nn.Linear, Conv1D)) else None


def follow(model: Any, plan: Plan) -> None:
    """Brings the ties of a model whose layers have been replaced in line with what the file holds.

    The config stays as it is: it may tie other layers, and T5 takes from it whether the decoder's output is scaled.
    """
    followed = []
    for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
        path, source_path = target.removesuffix(".weight"), source.removesuffix(".weight")  # biases are tied too
        if path in plan.modules or (source_path in plan.modules and target in plan.loose_targets):
            _forget(model, target, for_good=True)
        elif source_path in plan.modules:
            _tie(model, path, source_path, plan.label)
            followed.append(target)
    for target in followed:
        _forget(model, target)


def _tie(model: Any, path: str, source_path: str, label: str) -> None:
    """Puts a packed layer in place of the one at `path`, tied to the packed one at `source_path`."""
    old, table = model.get_submodule(path), model.get_submodule(source_path)
    layer = packed_in_place_of(old)
    if layer is None or layer.weight_shape != table.weight_shape:
        raise UnsupportedError(
            f"{label}: {path} is tied to the packed {source_path}, and a {type(old).__name__} of its shape cannot compute "
            "with it"
        )
    layer.tie(table)
    model.set_submodule(path, layer)


class MadeTies:
    """Ties to embeddings that are quantized while loading.

    Args:
      model: before its weights are loaded; transformers forgets its ties to the tables.
      names: of the weights that will be quantized.
      config: with torchao's `untie_embedding_weights`, layers that were tied get the float weights.
    """

    def __init__(self, model: Any, names: Container[str], config: Any) -> None:
        self.unties = bool(getattr(config, "untie_embedding_weights", False))
        self.targets: dict[str, list[str]] = {}
        for target, source in list((getattr(model, "all_tied_weights_keys", None) or {}).items()):
            if source in names:
                self.targets.setdefault(source, []).append(target)
                _forget(model, target)
        if self.unties and self.targets:
            untie(model)

    def follow(self, model: Any, name: str, weight: torch.Tensor) -> list[str]:
        """Ties what was tied to a weight that has just been quantized; returns the names of these weights."""
        path, targets = name.removesuffix(".weight"), self.targets.get(name, [])
        if not targets or not isinstance(model.get_submodule(path), PackedWeight):  # quantizing it has failed
            return []
        for target in targets:
            if self.unties:
                own = nn.Parameter(weight.clone())
                own._is_hf_initialized = True  # type: ignore[attr-defined]
                model.get_submodule(target.rpartition(".")[0]).weight = own
            else:
                _tie(model, target.rpartition(".")[0], path, type(model).__name__)
        return targets


def untie(model: Any) -> None:
    """Says in the model's config that its output layer is not its embedding."""
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _forget(model: Any, target: str, *, for_good: bool = False) -> None:
    """No tie of `target` for transformers, now and when `tie_weights` looks at the classes' tables again.

    Args:
      for_good: not even after `restore`; such ties are forgotten before all others.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        own = target.removeprefix(f"{prefix}.") if prefix else target
        for name in _TABLES:
            keys = getattr(module, name, None)
            if keys and own in keys:
                if not for_good:
                    module.__dict__.setdefault("_jq_ties", {}).setdefault(name, keys)
                setattr(module, name, {k: v for k, v in keys.items() if k != own})


def restore(model: Any) -> None:
    """The ties that `follow` has made transformers forget, once their layers are float again."""
    for module in model.modules():
        for name, keys in module.__dict__.pop("_jq_ties", {}).items():
            setattr(module, name, keys)


def link(model: nn.Module, places: Mapping[str, Any] | None = None) -> list[PackedWeight]:
    """Gives tied layers the parameters of the layer that they are tied to; returns those that got them.

    Args:
      places: device map by which the model is spread; layers on disk borrow at each call what their table has then.
    """
    linked = []
    for path, module in model.named_modules():
        if not isinstance(module, PackedWeight) or module.tied is None or module.is_packed or module.borrows:
            continue
        module.borrows = _place(path, places or {}) == "disk"
        if not module.borrows and module.link():
            linked.append(module)
    return linked


def _place(path: str, places: Mapping[str, Any]) -> Any:
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        name = ".".join(parts[:count])
        if name in places:
            return places[name]
    return None
