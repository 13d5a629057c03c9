"""Quantizing while loading: `from_pretrained(float_model, quantization_config=...)` with a method of jq.

`jq_torch.config_methods` says which method of jq does what a transformers config asks for. The loader hands over one
float weight at a time; it is quantized where it lies and freed, so that the float model is never in memory as a whole.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from jq.errors import JqError, UnsupportedError
from jq.formats import table
from jq_torch import bridge, experts, ties
from jq_torch.by_module import ByModule
from jq_torch.packed import Packed
from jq_torch.plan import Origin
from jq_torch.sources import Sides
from jq_torch.torchao_configs import ByFqn
from jq_torch.weight import PackedWeight

logger = logging.get_logger(__name__)
# Methods whose config must say more than its arguments do: it is made anew from what was quantized.
_TORCHAO_FLAGS = ("include_input_output_embeddings", "untie_embedding_weights")
_DESCRIBED = ("jq", "torchao", "higgs", "fp_quant")


def bits_of(method: Any) -> float:
    """Bits that a weight will take, for estimates of memory."""
    return float(getattr(method, "bits", 8)) + 0.5


def _skip_list(config: Any) -> list[str] | None:
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        found = getattr(config, name, None)
        if found is not None:
            return list(found)
    return None


def targets(model: Any, config: Any, method: Any) -> dict[str, Any]:
    """{name of a weight: method} of everything that is quantized while loading."""
    skip = HfQuantizer.get_modules_to_not_convert(model, _skip_list(config), model._keep_in_fp32_modules)
    ends: list[Any] = []
    if getattr(config, "include_input_output_embeddings", False):  # torchao's
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        names = [path for path, module in model.named_modules() if any(module is end for end in ends)]
        skip = [name for name in skip if name not in names]
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    shared = {*tied} if ends else {*tied, *tied.values()}
    found = {}
    for path, module in model.named_modules():
        if f"{path}.weight" in shared or not should_convert_module(path, skip):
            continue
        one = _method_for(path, module, method, tables=bool(ends))
        if one is not None:
            found[f"{path}.weight"] = one
    makeable = experts.makeable(model)
    for path, module in model.named_modules():
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if hasattr(module, "num_experts") and stacked and path not in makeable and should_convert_module(path, skip):
            logger.warning(
                f"{path}: experts of {type(module).__name__} stay float: no format holds them as the model does"
            )
    for path, parts in makeable.items():
        if should_convert_module(path, skip) and not isinstance(method, ByModule):
            found |= dict.fromkeys((f"{path}.{parameter}" for parameter in parts), method)
    if not found:
        raise ValueError(f"{type(model).__name__}: no linear layer to quantize; all are skipped by {sorted(skip)}")
    return found


def _method_for(path: str, module: Any, method: Any, *, tables: bool) -> Any:
    """The method for a module, None where it stays float: torchao quantizes embeddings that its config names, or all."""
    if type(module) in (nn.Linear, Conv1D):
        return method.of(path) if isinstance(method, ByModule) else method
    if isinstance(module, nn.Embedding) and isinstance(method, ByFqn) and (tables or method.named(path)):
        return method.of(path)
    return None


class Quantize(ConversionOps):
    """The loader's operation: a float weight becomes a packed layer in its place."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    @bridge.device_kept()
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, (list, tuple)) else value
            method = self.hf_quantizer._targets[name]
            try:
                if name.endswith(".weight"):
                    quantize_layer(model, name.removesuffix(".weight"), tensor, method)
                else:
                    experts.quantize(model, name, tensor, method)
            except (JqError, ValueError) as e:
                # the loader would turn it into a RuntimeError that points to a log; `finish` raises it as it is
                self.hf_quantizer.failures.append(e)
            done = [name, *self.hf_quantizer.made_ties.follow(model, name, tensor)]
            if missing_keys is not None:
                missing_keys.difference_update(done)
        return {}

    @property
    def reverse_op(self) -> ConversionOps:
        raise UnsupportedError("saving goes by the format of the packed layers, not back through this operation")


def quantize_layer(model: Any, path: str, weight: torch.Tensor, method: Any) -> None:
    """Replaces the layer at `path` by a packed one with the given float weight, quantized."""
    old = model.get_submodule(path)
    layer = ties.packed_in_place_of(old)
    assert layer is not None
    dense = weight.T.contiguous() if getattr(layer, "transposed", False) else weight
    layer.put("q", method.quantize(bridge.array_of(dense), name=path), weight.device)
    layer.origin = Origin(table()[method.format], path, {}, {})
    layer.train(old.training)
    model.set_submodule(path, layer)


def finish(quantizer: Any, model: Any) -> None:
    """Gives the model the quantization_config that describes what was made; raises what went wrong on the way."""
    if quantizer.failures:
        raise quantizer.failures[0]
    ties.link(model)
    for module in model.modules():
        if isinstance(module, Packed):
            quantizer.settings.apply(module)
    quantizer.sides = Sides(_side_files(quantizer.method, model))
    config = quantizer.quantization_config
    if str(getattr(config.quant_method, "value", config.quant_method)) not in _DESCRIBED:
        return  # a config of transformers says already what the original would write
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    skip = [p for p, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    found = quantizer.method.config(skip=skip)
    found |= {name: getattr(config, name, False) for name in _TORCHAO_FLAGS if name in found}
    refine = getattr(quantizer.method, "refine_config", None)
    if refine is not None:  # what the config says of each module
        tensors = {f"{p}.weight": m.qtensor() for p, m in model.named_modules() if _has_own(m)}
        found = refine(found, [name.removesuffix(".weight") for name in tensors], skip, tensors)
    key = str(found["quant_method"])
    if key == "bitsandbytes":
        key += "_4bit" if found.get("load_in_4bit") else "_8bit"
    quantizer.quantization_config = KNOWN[key].from_dict(found)
    model.config.quantization_config = quantizer.quantization_config
    model.quantization_method = quantizer.quantization_config.quant_method


def _has_own(module: Any) -> bool:
    """Whether a packed layer has a weight in the file: it is not tied to another."""
    return isinstance(module, PackedWeight) and module.tied is None


def _side_files(method: Any, model: Any) -> dict[str, bytes]:
    """The map without which optimum-quanto reads nothing."""
    if method.format != "quanto":
        return {}
    kind = {"weights": method.qtype, "activations": "none"}
    found = {path: kind for path, module in model.named_modules() if _has_own(module)}
    return {"quanto_qmap.json": json.dumps(found, indent=4).encode()}


def metadata(quantizer: Any, model: Any) -> dict[str, str]:
    """Safetensors metadata that the format wants beside newly quantized tensors."""
    hook = table()[quantizer.method.format].metadata
    if hook is None:
        return {}
    tensors: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedWeight):
            if not _has_own(module):
                continue
            tensors[f"{path}.weight"] = module.qtensor()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            tensors[f"{path}.{name}" if path else name] = bridge.array_of(parameter)
    return dict(hook(tensors))
