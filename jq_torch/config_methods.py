"""The method of jq that does what a transformers config asks for, or an error that says what is not done."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Callable
from typing import Any

import jq
from jq.errors import CalibrationError, UnsupportedError
from jq_torch import configs


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


# Options that checkpoints may have and that quantizing while loading does not follow.
_ONLY_READ = {
    "bitnet": ("use_rms_norm", "quantization_mode"),
    "fouroversix": ("keep_master_weights", "module_config_overrides", "output_dtype"),
    "fp8": ("modules_to_convert", "expert_dtype"),
    "torchao": ("include_input_output_embeddings", "untie_embedding_weights"),
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


# torchao 0.18's own, where jq.TorchAO has others
_TORCHAO_DEFAULTS: dict[str, dict[str, Any]] = {
    "intx_weight_only": {"weight_dtype": "int8"},
    "int8_dynamic_activation_intx_weight": {
        "weight_dtype": "int8",
        "weight_granularity": {"_type": "PerGroup", "_data": {"group_size": 32}},
    },
    "float8_dynamic_activation_float8_weight": {"granularity": "per_tensor"},
}


def _torchao(config: Any) -> Any:
    """`TorchAoConfig(Int8WeightOnlyConfig())` of an installed torchao, or its name and arguments without one.

    What is asked for must be what the made config says: an option that is not followed would go unnoticed.
    """
    kind, options = config.quant_type, dict(getattr(config, "quant_type_kwargs", None) or {})
    given = options
    if isinstance(kind, dict):
        kind = kind.get("default", kind)
        kind, given = kind["_type"], {**kind.get("_data", {}), **options}
        options = given
    elif not isinstance(kind, str):
        default, values = _default_of(type(kind)), vars(kind)
        given = {k: v for k, v in values.items() if k not in default or repr(default[k]) != repr(v)} | options
        kind, options = type(kind).__name__, {**values, **options}
    scheme = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Config")).lower()
    method = jq.TorchAO(scheme, **_torchao_options({**_TORCHAO_DEFAULTS.get(scheme, {}), **options}))
    try:
        made = method.config()["quant_type"]["default"]["_data"]
    except KeyError:  # an unknown scheme, which quantizing names
        return method
    for name, value in given.items():
        said = _granularity if "granularity" in name else _said
        if value is not None and (name not in made or said(value) != said(made[name])):
            what = f"makes {said(made[name])!r}" if name in made else f"knows {', '.join(made)}"
            raise UnsupportedError(f"TorchAoConfig: {kind}: {name}={value!r}: quantizing while loading {what}")
    return method


def _default_of(kind: type) -> dict[str, Any]:
    try:
        return vars(kind())
    except TypeError:  # it has no defaults
        return {}


def _torchao_options(options: dict[str, Any]) -> dict[str, Any]:
    """torchao's arguments in jq's words: a dtype's width, the kind of a granularity object."""
    found: dict[str, Any] = {}
    if options.get("group_size"):
        found["group_size"] = options["group_size"]
    width = re.search(r"int(\d)$", str(_said(options.get("weight_dtype"))))
    if width:
        found["bits"] = int(width[1])
    kind, size = _granularity(options.get("weight_granularity") or options.get("granularity"))
    if "tensor" in kind:
        found["granularity"] = "tensor"
    elif "group" in kind:
        found["group_size"] = size
    names = ("weight_mapping_type", "mapping_type") if "weight_dtype" in options else ("act_mapping_type",)
    if any(_said(options.get(name)) == "asymmetric" for name in names):
        found["asymmetric"] = True
    if packing := options.get("int4_packing_format"):
        found["packing"] = _said(packing)
    return found


def _granularity(value: Any) -> tuple[str, Any]:
    """("pergroup", 32), ("perrow", None), ... of an object of torchao, of what saves it, or of a pair of these."""
    said = _said(value)
    return said if isinstance(said, tuple) else (str(said).replace("_", ""), None)


def _said(value: Any) -> Any:
    """An option's value as one can compare it: of torchao's enums and dtypes the name, of its objects kind and size."""
    if isinstance(value, (list, tuple)):
        both = [_said(v) for v in value]
        return both[0] if both and all(v == both[0] for v in both) else both
    if isinstance(value, dict) and "_type" in value:
        kind, data = value["_type"], value.get("_data")
    elif isinstance(value, enum.Enum):
        kind, data = type(value).__name__, value.name
    elif value is None or isinstance(value, (bool, int, float, str)):
        kind, data = "", value
    else:
        kind, data = type(value).__name__, vars(value) if hasattr(value, "__dict__") else str(value)
    if isinstance(data, dict):
        return kind.lower(), data.get("group_size")
    return data.rpartition(".")[2].lower() if isinstance(data, str) else data


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
