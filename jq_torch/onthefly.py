"""Quantizing while loading: `from_pretrained(float_model, quantization_config=...)` with a method of jq.

`METHODS` says which method of jq does what a transformers config asks for. The loader hands over one float weight at
a time; it is quantized where it lies and freed, so that the float model is never in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

import jq
from jq.errors import CalibrationError, JqError, UnsupportedError
from jq.formats import table
from jq_torch import bridge, configs, experts
from jq_torch.linear import JqLinear
from jq_torch.packed import Packed
from jq_torch.plan import Origin
from jq_torch.sources import Sides

logger = logging.get_logger(__name__)


def _dtype_name(dtype: Any, default: str) -> str:
    return default if dtype is None else str(dtype).removeprefix("torch.")


def _bnb(config: Any) -> Any:
    if config.load_in_8bit:
        return jq.Int8(threshold=config.llm_int8_threshold)
    if not config.load_in_4bit:
        raise UnsupportedError("BitsAndBytesConfig: neither load_in_4bit nor load_in_8bit is set")
    if config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise UnsupportedError(f"bnb_4bit_quant_type must be nf4 or fp4, got {config.bnb_4bit_quant_type!r}")
    kind = jq.NF4 if config.bnb_4bit_quant_type == "nf4" else jq.FP4
    return kind(
        double_quant=config.bnb_4bit_use_double_quant,
        quant_storage=_dtype_name(config.bnb_4bit_quant_storage, "uint8"),
        compute_dtype=_dtype_name(config.bnb_4bit_compute_dtype, "float32"),
    )


def _hqq(config: Any) -> Any:
    options = config.quant_config
    if "weight_quant_params" in options:
        return _hqq_one(options)
    return ByName({tag: _hqq_one(o) for tag, o in options.items()})


def _hqq_one(options: dict[str, Any]) -> Any:
    if options.get("scale_quant_params") or options.get("zero_quant_params"):
        raise UnsupportedError(
            "HqqConfig: quantized scales or zeros are read, not made: leave quant_zero/quant_scale off"
        )
    p = options["weight_quant_params"]
    return jq.HQQ(
        bits=p["nbits"],
        group_size=p["group_size"],
        axis=p["axis"],
        optimize=p.get("optimize", True),
        view_as_float=p.get("view_as_float", False),
    )


def _quanto(config: Any) -> Any:
    if config.activations is not None:
        raise UnsupportedError("QuantoConfig(activations=...) needs calibration: quantize with optimum-quanto and load")
    return jq.Quanto(config.weights)


def _calibrated(name: str) -> Callable[[Any], Any]:
    def refuse(config: Any) -> Any:
        raise CalibrationError(
            f"{name} needs calibration data, which from_pretrained does not have: quantize with its own library and load "
            "what that saves. JqConfig(jq.RTN(...)) rounds without data"
        )

    return refuse


def _jq(config: Any) -> Any:
    if config.method is None:
        raise ValueError("JqConfig: method is missing, e.g. JqConfig(jq.NF4())")
    if not hasattr(config.method, "quantize"):
        raise CalibrationError(
            f"JqConfig: {config.method!r} needs calibration data, and jaxq does not calibrate: quantize with its own library "
            "and load what that saves. jq.RTN(...) rounds without data"
        )
    return config.method


# quant_method -> the method of jq for a config.
METHODS: dict[str, Callable[[Any], Any]] = {
    "jq": _jq,
    "bitsandbytes": _bnb,
    "hqq": _hqq,
    "quanto": _quanto,
    "gptq": _calibrated("GPTQ"),
    "awq": _calibrated("AWQ"),
    "auto-round": _calibrated("AutoRound"),
    "eetq": lambda config: jq.EETQ(),
    "fbgemm_fp8": lambda config: jq.FbgemmFp8(activation_scale_ub=config.activation_scale_ub),
    "fp8": lambda config: _fp8(config),
    "mxfp4": lambda config: jq.MXFP4(),
    "bitnet": lambda config: jq.BitNet(config.linear_class),
    "torchao": lambda config: _torchao(config),
    "metal": lambda config: jq.Metal(bits=config.bits, group_size=config.group_size),
    "higgs": lambda config: jq.HIGGS(config.bits, config.p, config.group_size, config.hadamard_size),
    "sinq": lambda config: _sinq(config),
    "fp_quant": lambda config: _fp_quant(config),
    "fouroversix": lambda config: _four_over_six(config),
}
# Methods whose config must say more than its arguments do: it is made anew from what was quantized.
_DESCRIBED = ("jq", "torchao", "higgs", "fp_quant")


def _sinq(config: Any) -> Any:
    if config.method != "sinq":
        raise CalibrationError(f"SinqConfig(method={config.method!r}) needs calibration data: method='sinq' does not")
    return jq.SINQ(config.nbits, config.group_size, config.tiling_mode)


def _fp_quant(config: Any) -> Any:
    if config.store_master_weights:
        raise UnsupportedError("FPQuantConfig(store_master_weights=True): packed layers keep no float weight")
    return jq.FPQuant(
        config.forward_dtype,
        config.forward_method,
        config.hadamard_group_size,
        transform_init=config.transform_init,
        pseudoquantization=config.pseudoquantization,
    )


def _four_over_six(config: Any) -> Any:
    for name in ("keep_master_weights", "module_config_overrides"):
        if getattr(config, name, None):
            raise UnsupportedError(f"FourOverSixConfig({name}=...) is read, not made while loading")
    rule, dtype = config.weight_scale_rule or config.scale_rule, config.weight_dtype or config.dtype
    return jq.FourOverSix(rule, weight_scale_2d=config.weight_scale_2d, dtype=dtype)


def _fp8(config: Any) -> Any:
    block = config.weight_block_size
    return jq.FP8(
        block_size=None if block is None else tuple(block),
        scale_fmt=getattr(config, "scale_fmt", None) or "float",
        activation_scheme=config.activation_scheme,
    )


def _torchao(config: Any) -> Any:
    """`TorchAoConfig(Int8WeightOnlyConfig())` of an installed torchao, or its name and arguments without one."""
    kind, options = config.quant_type, dict(getattr(config, "quant_type_kwargs", None) or {})
    if isinstance(kind, dict):
        kind = kind.get("default", kind)
        kind, options = kind["_type"], {**kind.get("_data", {}), **options}
    elif not isinstance(kind, str):
        kind, options = type(kind).__name__, {**vars(kind), **options}
    scheme = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Config")).lower()
    return jq.TorchAO(scheme, **_torchao_options(options))


def _torchao_options(options: dict[str, Any]) -> dict[str, Any]:
    """torchao's arguments in jq's words: a dtype's width, the kind of a granularity object."""
    found: dict[str, Any] = {}
    if options.get("group_size"):
        found["group_size"] = options["group_size"]
    width = re.search(r"int(\d)$", str(options.get("weight_dtype", "")))
    if width:
        found["bits"] = int(width[1])
    granularity = options.get("granularity")
    name = type(granularity).__name__.lower()
    if "tensor" in name or "tensor" in str(granularity).lower():
        found["granularity"] = "tensor"
    elif "group" in name:
        found["group_size"] = granularity.group_size  # type: ignore[union-attr]
    return found


@dataclasses.dataclass(frozen=True)
class ByName:
    """A method for each of several module names (HQQ's `dynamic_config`): the longest name that a path ends with."""

    methods: dict[str, Any]

    @property
    def bits(self) -> float:
        return max(m.bits for m in self.methods.values())

    @property
    def format(self) -> str:
        return next(iter(self.methods.values())).format

    def of(self, path: str) -> Any:
        plain = re.sub(r"\.\d+", "", path)
        found = [tag for tag in self.methods if plain == tag or plain.endswith("." + tag)]
        return self.methods[max(found, key=len)] if found else None


def method_of(config: Any) -> Any:
    """The method of jq that does what a config asks for.

    Raises:
      CalibrationError: a method that needs data.
      UnsupportedError: a method that jq reads and does not make.
    """
    name = str(getattr(config.quant_method, "value", config.quant_method))
    if name not in METHODS:
        known = ", ".join(sorted(k for k in METHODS))
        raise UnsupportedError(
            f"quantizing while loading with {type(config).__name__} ({name}) is not done here; it works with {known}"
        )
    if unknown := configs.unknown_options(config):
        raise UnsupportedError(f"{type(config).__name__}: unknown option {', '.join(map(repr, unknown))}")
    try:
        return METHODS[name](config)
    except AttributeError as e:
        if "jq" not in str(e):
            raise
        raise UnsupportedError(f"quantizing while loading with {type(config).__name__} is not done here: {e}") from e


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
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    shared = {*tied, *tied.values()}
    found = {}
    for path, module in model.named_modules():
        if (
            type(module) not in (nn.Linear, Conv1D)
            or f"{path}.weight" in shared
            or not should_convert_module(path, skip)
        ):
            continue
        one = method.of(path) if isinstance(method, ByName) else method
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
        if should_convert_module(path, skip) and not isinstance(method, ByName):
            found |= dict.fromkeys((f"{path}.{parameter}" for parameter in parts), method)
    if not found:
        raise ValueError(f"{type(model).__name__}: no linear layer to quantize; all are skipped by {sorted(skip)}")
    return found


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
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}

    @property
    def reverse_op(self) -> ConversionOps:
        raise UnsupportedError("saving goes by the format of the packed layers, not back through this operation")


def quantize_layer(model: Any, path: str, weight: torch.Tensor, method: Any) -> None:
    """Replaces the linear layer at `path` by a packed one with the given float weight, quantized."""
    old = model.get_submodule(path)
    layer = JqLinear.in_place_of(old)
    dense = weight.T.contiguous() if layer.transposed else weight
    layer.put("q", method.quantize(bridge.array_of(dense), name=path))
    layer.origin = Origin(table()[method.format], path, {}, {})
    layer.train(old.training)
    model.set_submodule(path, layer.to(weight.device))


def finish(quantizer: Any, model: Any) -> None:
    """Gives the model the quantization_config that describes what was made; raises what went wrong on the way."""
    if quantizer.failures:
        raise quantizer.failures[0]
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
    refine = getattr(quantizer.method, "refine_config", None)
    if refine is not None:  # what the config says of each module
        tensors = {f"{p}.weight": m.qtensor() for p, m in model.named_modules() if isinstance(m, JqLinear)}
        found = refine(found, [name.removesuffix(".weight") for name in tensors], skip, tensors)
    key = str(found["quant_method"])
    if key == "bitsandbytes":
        key += "_4bit" if found.get("load_in_4bit") else "_8bit"
    quantizer.quantization_config = KNOWN[key].from_dict(found)
    model.config.quantization_config = quantizer.quantization_config
    model.quantization_method = quantizer.quantization_config.quant_method


def _side_files(method: Any, model: Any) -> dict[str, bytes]:
    """The map without which optimum-quanto reads nothing."""
    if method.format != "quanto":
        return {}
    kind = {"weights": method.qtype, "activations": "none"}
    found = {path: kind for path, module in model.named_modules() if isinstance(module, JqLinear)}
    return {"quanto_qmap.json": json.dumps(found, indent=4).encode()}


def metadata(quantizer: Any, model: Any) -> dict[str, str]:
    """Safetensors metadata that the format wants beside newly quantized tensors."""
    hook = table()[quantizer.method.format].metadata
    if hook is None:
        return {}
    tensors: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, JqLinear):
            tensors[f"{path}.weight"] = module.qtensor()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            tensors[f"{path}.{name}" if path else name] = bridge.array_of(parameter)
    return dict(hook(tensors))
