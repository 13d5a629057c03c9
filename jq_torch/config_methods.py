"""The method of jq that does what a transformers config asks for, or an error that says what is not done."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import jq
from jq.errors import CalibrationError, UnsupportedError
from jq_torch import configs, torchao_configs
from jq_torch.by_module import ByModule


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
    return ByEnding({tag: _hqq_one(o) for tag, o in options.items()})


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


@dataclasses.dataclass(frozen=True)
class ByEnding(ByModule):
    """HQQ's `dynamic_config`: the longest name that a path ends with."""

    def of(self, path: str) -> Any:
        plain = re.sub(r"\.\d+", "", path)
        found = [tag for tag in self.methods if plain == tag or plain.endswith("." + tag)]
        return self.methods[max(found, key=len)] if found else None


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
    "torchao": torchao_configs.method,
    "metal": lambda config: jq.Metal(bits=config.bits, group_size=config.group_size),
    "higgs": lambda config: jq.HIGGS(config.bits, config.p, config.group_size, config.hadamard_size),
    "sinq": lambda config: _sinq(config),
    "fp_quant": lambda config: _fp_quant(config),
    "fouroversix": lambda config: _four_over_six(config),
}


# Options that checkpoints may have and that quantizing while loading does not follow.
_ONLY_READ = {
    "bitnet": ("use_rms_norm", "quantization_mode"),
    "fouroversix": ("keep_master_weights", "module_config_overrides", "output_dtype"),
    "fp8": ("modules_to_convert", "expert_dtype"),
}


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
    found = []
    for what, whole in (("scale_rule", config.scale_rule), ("dtype", config.dtype)):
        weight, inputs = (getattr(config, f"{side}_{what}") or whole for side in ("weight", "activation"))
        if weight != inputs:
            raise UnsupportedError(
                f"FourOverSixConfig: weight_{what} {weight!r} beside activation_{what} {inputs!r} is read, not made while loading"
            )
        found.append(weight)
    return jq.FourOverSix(found[0], weight_scale_2d=config.weight_scale_2d, dtype=found[1])


def _fp8(config: Any) -> Any:
    block = config.weight_block_size
    return jq.FP8(
        block_size=None if block is None else tuple(block),
        scale_fmt=getattr(config, "scale_fmt", None) or "float",
        activation_scheme=config.activation_scheme,
    )


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
    arguments = inspect.signature(type(config)).parameters
    for option in _ONLY_READ.get(name, ()):
        default = arguments[option].default if option in arguments else None
        if (given := getattr(config, option, None)) is not None and given != default:
            raise UnsupportedError(f"{type(config).__name__}({option}={given!r}) is read, not made while loading")
    try:
        return METHODS[name](config)
    except AttributeError as e:
        if "jq" not in str(e):
            raise
        raise UnsupportedError(f"quantizing while loading with {type(config).__name__} is not done here: {e}") from e
