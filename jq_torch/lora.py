"""peft on packed layers.

A `JqLinear` is an `nn.Linear` to peft, so its adapters attach and train by themselves. What differs is merging: peft
writes into `base_layer.weight`, which a packed layer computes anew each time. Here the base becomes a dense layer
before a merge and the packed one again after an unmerge, whatever the tuner. `install` teaches peft so, once for a process; it looks at
nothing but our layers and stays after `jq_torch.disable`, since loaded models stay too.
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
import sys
from typing import Any

import torch
from torch import nn

from jq.errors import UnsupportedError
from jq_torch.linear import JqLinear
from jq_torch.weight import PackedWeight


def dense_layer(packed: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """A float layer with the numbers of a packed one, in peft's orientation [out_features, in_features]."""
    if not isinstance(packed, JqLinear):
        return packed.to_float(packed.dequantize(dtype).clone()).requires_grad_(False)
    with torch.device("meta"):
        new = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
    new.weight = nn.Parameter(packed.dequantize(dtype).clone(), requires_grad=False)
    new.bias = (
        None if packed.bias is None else nn.Parameter(packed.bias.detach().clone().to(dtype), requires_grad=False)
    )
    if packed.transposed:
        new.__dict__["conv1d"] = packed  # not a submodule
    return new


def _give_back_conv1d(model: nn.Module) -> None:
    """Merged layers that peft leaves in a model become what the float model has there: a Conv1D's weight is [K, N]."""
    for module in model.modules():
        for name, child in module.named_children():
            packed = child.__dict__.get("conv1d")
            if packed is not None:
                new = packed.to_float(child.weight.detach())
                new.bias = child.bias
                setattr(module, name, new.requires_grad_(False))


@functools.cache
def lora_class() -> type:
    """peft's `lora.Linear` without the starts that change the base weight, which packed bits cannot follow."""
    from peft.tuners.lora.layer import Linear

    class JqLoraLinear(Linear):  # type: ignore[misc, unused-ignore]
        """LoRA on a packed layer."""

    def refused(name: str) -> Any:
        def start(self: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(self.get_base_layer(), JqLinear):
                return getattr(Linear, name)(self, *args, **kwargs)
            kind = name.removesuffix("_init")
            raise UnsupportedError(
                f"init_lora_weights={kind!r} writes into the base weight, which a packed layer cannot take; call "
                "model.dequantize() first, or start the adapter otherwise"
            )

        return start

    for name in ("pissa_init", "olora_init", "corda_init", "loftq_init", "lora_ga_init"):
        if hasattr(Linear, name):
            setattr(JqLoraLinear, name, refused(name))
    return JqLoraLinear


def _merges_densely(kind: type) -> None:
    """Gives a tuner's layer a dense base before it merges, and the packed one back after it unmerges."""
    merge, unmerge = vars(kind)["merge"], vars(kind).get("unmerge")

    @functools.wraps(merge)
    def merged(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = getattr(self, "base_layer", None)
        if not isinstance(base, PackedWeight):
            return merge(self, *args, **kwargs)
        dtype = base.float_dtype  # not the adapter's, which peft keeps in float32 beside a bfloat16 model
        if dtype is None:
            inside = {id(p) for p in base.parameters()}
            own = [p.dtype for p in self.parameters() if p.is_floating_point() and id(p) not in inside]
            dtype = own[0] if own else torch.float32
        self.base_layer = dense_layer(base, dtype)
        try:
            return merge(self, *args, **kwargs)
        finally:
            if self.merged:
                self.__dict__["packed_base"] = base  # not a submodule: it is no part of the merged model
            else:
                self.base_layer = base

    kind.merge = merged  # type: ignore[attr-defined]
    if unmerge is None:
        return

    @functools.wraps(unmerge)
    def unmerged(self: Any, *args: Any, **kwargs: Any) -> Any:
        unmerge(self, *args, **kwargs)
        packed = self.__dict__.pop("packed_base", None)
        if packed is not None:
            self.base_layer = packed

    kind.unmerge = unmerged  # type: ignore[attr-defined]


def _unloads_conv1d(kind: Any) -> None:
    """What a tuner gives back has its layers of transformers' own classes."""
    original = kind._unload_and_optionally_merge

    @functools.wraps(original)
    def unloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        _give_back_conv1d(model)
        return model

    kind._unload_and_optionally_merge = unloaded


def _backend() -> Any:
    """peft's interface for some of the tuners other than LoRA (OFT, VeRA, MiSS, BOFT, SHiRA)."""
    from peft.utils.quantization_utils import QuantizationBackend

    class JqBackend(QuantizationBackend):  # type: ignore[misc, unused-ignore]
        supports_merge = True
        backend_name = "jq"
        layer_type = "linear"

        def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
            if isinstance(base_layer, PackedWeight):
                return base_layer.dequantize(torch.float32).clone()
            return base_layer.weight.data  # type: ignore[union-attr, return-value]

        def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
            weight = peft_layer.get_base_layer().weight  # dense by now (`_merges_densely`)
            weight.data = weight_data.to(weight.dtype)

    return JqBackend()


def _saves_float_copies(kind: Any) -> None:
    """`modules_to_save` trains a copy of a layer as a whole, which of a packed one is the float layer."""
    original = kind.update

    @functools.wraps(original)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        packed = self.original_module
        if not isinstance(packed, PackedWeight):
            original(self, adapter_name, *args, **kwargs)
            return
        self.original_module = packed.to_float(packed.dequantize(packed.float_dtype or torch.float32).clone())
        try:
            original(self, adapter_name, *args, **kwargs)
        finally:
            self.original_module = packed

    kind.update = update


_installed = False


def install() -> None:
    """Teaches peft our layers, where it is installed; a second call does nothing."""
    global _installed
    if _installed or importlib.util.find_spec("peft") is None:
        return
    import peft.tuners
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import ModulesToSaveWrapper

    _installed = True
    create = LoraModel._create_new_module

    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, JqLinear) and not lora_config._custom_modules and "parameter_name" not in _given(kwargs):
            lora_config.fan_in_fan_out = False  # a packed Conv1D is an nn.Linear
            if getattr(lora_config, "kasa_config", None) is not None:
                raise UnsupportedError(
                    "kasa_config truncates the base weight, which a packed layer cannot take; call model.dequantize() first"
                )
            return lora_class()(target, adapter_name, config=lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    LoraModel._create_new_module = staticmethod(create_new_module)
    _saves_float_copies(ModulesToSaveWrapper)
    if "_unload_and_optionally_merge" in vars(BaseTuner):
        _unloads_conv1d(BaseTuner)
    names = [f"peft.tuners.{m.name}" for m in pkgutil.iter_modules(peft.tuners.__path__) if m.ispkg]
    for name in names:
        module = sys.modules.get(f"{name}.model")
        for model in list(vars(module).values()) if module is not None else ():
            if isinstance(model, type) and "_unload_and_optionally_merge" in vars(model):
                _unloads_conv1d(model)
            if isinstance(model, type) and "_check_merge_allowed" in vars(model):
                model._check_merge_allowed = _merge_allowed(model._check_merge_allowed)  # type: ignore[attr-defined]
    for name in ("peft.tuners.lycoris_utils", *[f"{n}.layer" for n in names]):
        module = sys.modules.get(name)
        for kind in list(vars(module).values()) if module is not None else ():
            if isinstance(kind, type) and kind.__module__ == name and "merge" in vars(kind):
                _merges_densely(kind)
    _install_backend(names)


def _merge_allowed(original: Any) -> Any:
    """The original refuses every model that calls itself GPTQ; ours can merge."""

    @functools.wraps(original)
    def check(self: Any) -> Any:
        method = getattr(self.model, "quantization_method", None)
        if method != "gptq" or not any(isinstance(m, PackedWeight) for m in self.model.modules()):
            return original(self)
        self.model.quantization_method = None
        try:
            return original(self)
        finally:
            self.model.quantization_method = method

    return check


def _given(kwargs: dict[str, Any]) -> set[str]:
    return {k for k, v in kwargs.items() if v is not None}


def _install_backend(names: list[str]) -> None:
    """`resolve_quantization_backend` is imported by name into each tuner's module."""
    import peft.utils.quantization_utils as source

    original = getattr(source, "resolve_quantization_backend", None)
    if original is None:  # peft before it had backends
        return

    @functools.wraps(original)
    def resolve(base_layer: nn.Module, **kwargs: Any) -> Any:
        return _backend() if isinstance(base_layer, JqLinear) else original(base_layer, **kwargs)

    for name in ("peft.utils", source.__name__, *[f"{n}.{part}" for n in names for part in ("layer", "model")]):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "resolve_quantization_backend", None) is original:
            module.resolve_quantization_backend = resolve  # type: ignore[attr-defined]
