"""`JqQuantizer`: one HfQuantizer for every method that `jq.formats` knows.

It goes by what the file holds: `Plan` reads the headers, every quantized layer is replaced by a `JqLinear` with room
for exactly the stored tensors, transformers' loader fills them, and `jq.formats` makes QTensors of them. Saving asks
the same format for the stored tensors again.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from jq.errors import FormatError, UnsupportedError
from jq.formats import torchao
from jq_torch import attention, bridge, config_methods, configs, onthefly, ties
from jq_torch.activation import ScaledActivation
from jq_torch.embedding import JqEmbedding
from jq_torch.packed import Packed
from jq_torch.plan import JqRenaming, Plan, open_files
from jq_torch.settings import Settings, current
from jq_torch.sources import Sides
from jq_torch.ties import packed_in_place_of
from jq_torch.weight import PackedWeight, materialised

logger = logging.get_logger(__name__)


class JqQuantizer(HfQuantizer):
    """Loads, quantizes, runs and saves models of every method; see the module docstring.

    Attributes:
      settings: as `jq_torch.enable` was called when the model was loaded.
      plan: what of the file goes where, while a quantized checkpoint is loaded.
      metadata: safetensors metadata of the file, written back by saving.
      sides: files beside the weights that say how they are quantized, written back by saving.
    """

    requires_calibration = False
    requires_parameters_quantization = False
    required_packages: list[str] = ["jax"]

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings: Settings = current()
        self.plan: Plan | None = None
        self.metadata: dict[str, str] = {}
        self.sides = Sides()
        self.method = None if self.pre_quantized else config_methods.method_of(quantization_config)
        self._targets: dict[str, Any] = {}
        self.made_ties: ties.MadeTies | None = None
        self.failures: list[Exception] = []

    @property
    def method_name(self) -> str:
        """quant_method as the file says it."""
        found = _file_dict(self.quantization_config)
        name = found.get("quant_method") or configs.method_of(found) or self.quantization_config.quant_method
        return str(getattr(name, "value", name))

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises where the request cannot be met; may be called twice and changes nothing."""
        if device_map is not None and importlib.util.find_spec("accelerate") is None:
            raise ImportError("device_map needs the package accelerate: pip install accelerate")
        _check_devices(device_map)
        if isinstance(device_map, Mapping) and not self.pre_quantized and "disk" in device_map.values():
            raise ValueError(
                "quantizing while loading cannot put layers on disk; quantize and save the model first, then load the "
                "result with this device_map"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype asked for; EETQ makes its tensors of float16 alone, as the original does."""
        if self.method is not None and self.method.format == "eetq" and dtype is not torch.float16:
            logger.warning(f"EETQ quantizes float16 weights: loading in float16, not {dtype}")
            return torch.float16
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight will take once it is quantized while loading."""
        return None if self.method is None else onthefly.bits_of(self.method) / 8

    def update_tp_plan(self, config: Any) -> Any:
        """5.17: the plan of the config, before there is a model; every process holds the layers whole."""
        config.base_model_tp_plan = {}
        return config

    def update_ep_plan(self, config: Any) -> Any:
        config.base_model_ep_plan = {}
        return config

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Leaves the rules of the embedding and of an unpacked output layer; every process holds the layers whole.

        A packed layer has no `weight` to shard, and the rules of a block only work together.
        """
        if not plan:
            return  # and the model may not know its embeddings: CLIP's two towers
        ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if not isinstance(m, Packed)]
        kept = {name for name, module in model.named_modules() if any(module is end for end in ends)}
        for pattern in [p for p in plan if p not in kept]:
            del plan[pattern]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._targets = onthefly.targets(model, self.quantization_config, self.method)
            self.made_ties = ties.MadeTies(model, self._targets, self.quantization_config)
            return model
        if not checkpoint_files:
            raise UnsupportedError(
                "from_pretrained(state_dict=...) with a quantized config: packed tensors are read from the files of "
                "the checkpoint; pass its directory"
            )
        ckpt = open_files(checkpoint_files)
        quantization = _file_dict(self.quantization_config)
        self.plan = plan = Plan(model, ckpt, quantization, self.method_name)
        self.metadata, self.sides = plan.metadata, Sides(ckpt.side_files, ckpt.config)
        if torchao.head_is_embedding(ckpt.config, plan.metadata, ckpt.entries):
            model.all_tied_weights_keys["lm_head.weight"] = "model.embed_tokens.weight"
        self._replace_layers(model, plan)
        if plan.shared:  # which layers have taken already
            known = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = known | {f"^{re.escape(name)}$" for name in plan.shared}
        if plan.experts:
            from jq_torch import experts

            experts.replace(model, plan)
        for path, names in plan.carried.items():
            module = attention.holder(model, path)
            if plan.is_activation(path):
                module = ScaledActivation(module)
                model.set_submodule(path, module)
            for name, stored in names.items():
                shape, dtype = plan.entry(stored)
                module.register_buffer(name, torch.empty(shape, dtype=bridge.torch_dtype(dtype), device="meta"))
        plan.check_complete(model)
        return model

    def _replace_layers(self, model: Any, plan: Plan) -> None:
        for path, origin in plan.modules.items():
            old = model.get_submodule(path)
            layer = packed_in_place_of(old, plan.format.name)
            if layer is None:
                raise UnsupportedError(
                    f"{plan.label}: {origin.prefix}: quantized, but the model's module is of class {type(old).__name__}; "
                    "linear layers, embeddings and experts can be packed"
                )
            layer.origin = origin
            if path in plan.biases:
                shape, dtype = plan.entry(plan.biases[path])
                empty = torch.empty(shape, dtype=bridge.torch_dtype(dtype), device="meta")
                layer.bias = nn.Parameter(empty)
            for suffix, name in origin.stored.items():
                layer.reserve(name, *plan.entry(origin.names[suffix]))
            model.set_submodule(path, layer)
        ties.follow(model, plan)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """The model's own renamings, then ours by table. 5.17 calls it without `model`."""
        if self.plan is None:
            return weight_conversions
        return [*weight_conversions, JqRenaming(self.plan.renamed_table())]

    def get_weight_conversions(self) -> list[Any]:
        return []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors keep the dtype of the file, whatever `_keep_in_fp32_modules` says of their layer."""
        if self.plan is not None and converter.target_patterns[0] in self.plan.kept_dtypes:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._targets

    def get_quantize_ops(self) -> Any:
        return onthefly.Quantize(self)

    @bridge.device_kept()
    def pack(self, model: Any, places: Mapping[str, Any] | None = None) -> None:
        """Makes QTensors of the stored tensors that are in memory.

        Args:
          places: the device map that the model is about to be spread by.
        """
        for path, module in list(model.named_modules()):
            if isinstance(module, Packed):
                self._pack_one(model, path, module)
        for layer in ties.link(model, places):
            self.settings.apply(layer)

    def _cast_renamed(self, model: Any) -> None:
        """5.17 leaves float tensors of a quantized file as they are stored where the model calls them otherwise."""
        if hasattr(HfQuantizer, "get_new_dtype") or self.plan is None:
            return
        kept = {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
        for name, wanted in self.plan.renamed_dtypes().items():
            module = model.get_submodule(name.rpartition(".")[0])
            tensor = getattr(module, name.rpartition(".")[2])
            if tensor.dtype != wanted and not tensor.is_meta and not any(k in name for k in kept):
                tensor.data = tensor.data.to(wanted)

    def _pack_one(self, model: Any, path: str, module: Packed) -> None:
        if module.is_packed or any(p.device.type == "meta" for p in module.parameters(recurse=False)):
            return  # already done, or on disk: then every call packs what the hooks bring
        if not isinstance(module, PackedWeight):
            module.pack()  # type: ignore[operator]
        elif module.tied is not None:
            return
        else:
            dense = module.pack()
            if dense is not None:
                if any(getattr(other, "tied", None) is module for other in model.modules()):
                    raise UnsupportedError(f"{path}: not quantized, though stored so, and other layers are tied to it")
                model.set_submodule(path, self._float_layer(module, dense))
                return
            found, is_table = module.qtensor().shape, isinstance(module, JqEmbedding)
            if tuple(found) != module.weight_shape:
                label = module.origin.context.label if module.origin.context is not None else ""
                raise FormatError(
                    f"{label}: {module.origin.prefix}: the stored tensors describe a weight of shape {found}, the model's "
                    f"layer has {module.weight_shape} ({'rows, columns' if is_table else 'out_features, in_features'}); "
                    "config.json and the weights disagree"
                )
            if isinstance(module, JqEmbedding) and not module.looks_up_rows():
                logger.warning(
                    f"{path}: groups of this table run across its rows: each look-up dequantizes all {found[0]} of them"
                )
        self.settings.apply(module)

    def _float_layer(self, module: PackedWeight, parts: Mapping[str, Any]) -> nn.Module:
        """A layer that its format calls not quantized after all; whatever lies beside the weight is carried."""
        device = module._stored_device()
        tensors = {s: bridge.tensor_of(a).to(device) for s, a in parts.items()}
        weight = tensors.pop("weight")
        return module.to_float(weight)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.method is None:
            self.pack(model)
            self._cast_renamed(model)
            if self.plan is not None:
                attention.install(
                    model,
                    self.plan.ckpt,
                    self.plan.context.config["quantization_config"],
                    quantize=self.settings.quantize_activations and not self._dequantizes,
                )
        else:
            onthefly.finish(self, model)
        for module in model.modules():
            if isinstance(module, Packed):
                module.requires_grad_packed(False)
        self.plan = None  # it refers to the model and to every name of the file
        if self._dequantizes:
            self._dequantize(model, model.config.dtype)
        return model

    @property
    def _dequantizes(self) -> bool:
        return bool(getattr(self.quantization_config, "dequantize", False))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if isinstance(dtype, str):  # what save_pretrained leaves in config.dtype
            dtype = getattr(torch, dtype)
        tables: dict[PackedWeight, nn.Parameter] = {}
        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Packed)]
        for path, module in sorted(layers, key=lambda found: getattr(found[1], "tied", None) is not None):
            new: Any
            if not isinstance(module, PackedWeight):
                new = module.to_float(dtype)  # type: ignore[operator]
            elif module.tied is not None:
                new = module.to_float(tables[module.tied].data)
                new.weight = tables[module.tied]
            else:
                wanted = dtype or (module.bias.dtype if getattr(module, "bias", None) is not None else model.dtype)
                with materialised(module):
                    new = module.to_float(module.dequantize(wanted))
                tables[module] = new.weight
            model.set_submodule(path, new)
            _hook_again(module, new)
        ties.restore(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The state dict with the file's own tensors in place of packed parameters, and the file's metadata."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        self.sides.write(model.config)
        state = dict(model.state_dict())
        seen: set[int] = set()
        present = set(model.modules())
        for path, module in model.named_modules():
            if not isinstance(module, Packed):
                continue
            for name in module.packed_names():
                state.pop(f"{path}.{name}", None)
            if isinstance(module, PackedWeight) and module.tied is not None and module.tied not in present:
                module = module.tied  # an adapter merged into the embedding has left the old table to this layer
            with materialised(module):
                for name, array in module.dump(path):
                    tensor = bridge.tensor_of(array)
                    # transformers refuses tensors that share memory, as one array dumped under two names does
                    state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
                    seen.add(tensor.data_ptr())
        return state, dict(self.metadata) if self.method is None else onthefly.metadata(self, model)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters (peft) train on the packed base; the base itself has no gradient."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_sharding(model: Any) -> None:
    """FSDP while loading would shard the stored tensors, of which no part can be packed.

    Raises:
      UnsupportedError: the model has packed layers.
    """
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            raise UnsupportedError(
                f"{path}: to be sharded while loading (DistributedConfig); packed layers are sharded after it: load the "
                "model whole, then torch.distributed.fsdp.fully_shard"
            )


def _check_devices(device_map: Any) -> None:
    """Raises RuntimeError for a CUDA device that torch does not see; what torch itself says names no device."""
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        name = f"cuda:{place}" if isinstance(place, int) else str(place)
        kind, _, index = name.partition(":")
        seen = torch.cuda.device_count()
        if kind == "cuda" and int(index or 0) >= seen:
            there = f"{seen} CUDA devices" if seen else "no CUDA device"
            raise RuntimeError(f"device_map: {name} is asked for, torch sees {there}")


def _hook_again(old: nn.Module, new: nn.Module) -> None:
    """Gives a layer the offload hook of the one in whose place it is; its own tensors are then what is offloaded."""
    hook = getattr(old, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module

    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            one.weights_map = None
    add_hook_to_module(new, hook)


def _file_dict(config: Any) -> dict[str, Any]:
    """quantization_config as the file has it."""
    if isinstance(config, Mapping):
        return dict(config)
    return config.to_dict()
