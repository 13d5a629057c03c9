"""Config classes: the names and arguments of transformers, none of its libraries.

`replacements()` makes a subclass of every config class that transformers knows, with the same name. A replacement
- can be constructed without the library of its method (four originals cannot: hqq, quark, compressed-tensors, torchao;
  GPTQConfig not with `modules_in_block_to_quantize`),
- takes and keeps the options that older versions document (`KEPT`),
- remembers the dict of a file (`from_dict`) and gives exactly it back (`to_dict`), so that saving loses no key.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from typing import Any

from transformers.quantizers import auto
from transformers.utils import quantization_config as hf

# Options of kernels and of older versions: accepted and kept, without effect here. Class name -> names and defaults.
KEPT: dict[str, dict[str, Any]] = {
    "GPTQConfig": {
        "use_cuda_fp16": False,
        "use_exllama": None,
        "exllama_config": None,
        "disable_exllama": None,
        "checkpoint_format": "gptq",
    },
    "AwqConfig": {"do_fuse": None, "fuse_max_seq_len": None, "modules_to_fuse": None, "exllama_config": None},
    "CompressedTensorsConfig": {"sparsity_config": None},
    "TorchAoConfig": {"quant_type_kwargs": None},
}


class Verbatim:
    """Mixin in front of a transformers config class: remembers the dict of a file."""

    _file: dict[str, Any] | None = None  # the dict as the checkpoint has it
    _unknown: tuple[str, ...] = ()  # arguments that the original drops without a word
    quant_method: Any

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from the `quantization_config` of a file (or a user's dict)."""
        config = cls._of_file(config_dict)
        unused = config.update(**kwargs)
        config.__dict__["_file"] = copy.deepcopy(dict(config_dict))
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _of_file(cls, config_dict: dict[str, Any]) -> Any:
        try:
            return super().from_dict(dict(config_dict))  # type: ignore[misc]
        except (TypeError, ValueError, KeyError, AssertionError, ImportError, NotImplementedError, AttributeError):
            # the original refuses values that its library does not know; `jq.formats` judges the dict when it loads
            config = cls.__new__(cls)
            for key, value in config_dict.items():
                try:
                    setattr(config, key, copy.deepcopy(value))
                except AttributeError:  # a read-only property of the original
                    continue
            config.quant_method = method_of(config_dict)
            return config

    def to_dict(self) -> dict[str, Any]:
        """The file's dict, or the arguments for a config made by the user."""
        if self._file is not None:
            return copy.deepcopy(self._file)
        return {k: v for k, v in super().to_dict().items() if k not in ("_file", "_unknown")}  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        if self._file is not None:
            return self.to_dict()
        return {k: v for k, v in super().to_diff_dict().items() if k not in ("_file", "_unknown")}  # type: ignore[misc]

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)}"

    def to_json_string(self, use_diff: bool = True) -> str:
        found = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(found, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """JSON for what a user may put into a config: enums, dtypes, library objects."""
    if hasattr(value, "value"):
        return value.value
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return str(value).removeprefix("torch.")


def method_of(config_dict: dict[str, Any]) -> Any:
    """`quant_method` of a dict as transformers' enum where it knows it; old bitsandbytes dicts do not name it."""
    name = config_dict.get("quant_method")
    if name is None and (config_dict.get("load_in_4bit") or config_dict.get("load_in_8bit")):
        name = "bitsandbytes"
    try:
        return hf.QuantizationMethod(name)
    except ValueError:
        return name


def _hqq_init(
    self: Any,
    nbits: int = 4,
    group_size: int | None = 64,
    view_as_float: bool = False,
    axis: int | None = None,
    dynamic_config: dict | None = None,
    skip_modules: list[str] | None = None,
    **kwargs: Any,
) -> None:
    axis = 1 if axis is None else axis
    if axis not in (0, 1):
        raise ValueError(f"HqqConfig: axis must be 0 or 1, got {axis}")
    if dynamic_config is not None:
        self.quant_config = {key: hqq_options(**options) for key, options in dynamic_config.items()}
    else:
        self.quant_config = hqq_options(nbits, group_size, view_as_float=view_as_float, axis=axis)
    self.quant_method = hf.QuantizationMethod.HQQ
    self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
    _note_unknown(self, kwargs, {"quant_zero", "quant_scale", "offload_meta"})  # of older versions


def _hqq_of_file(cls: Any, config_dict: dict[str, Any]) -> Any:
    """A file has hqq's own dict; a user may give the arguments as a dict."""
    if "quant_config" in config_dict:
        return Verbatim._of_file.__func__(cls, config_dict)  # type: ignore[attr-defined]
    return cls(**config_dict)


def _note_unknown(config: Any, given: dict[str, Any], known: Any) -> None:
    """Remembers arguments that mean nothing, for `unknown_options`; a file may have such keys, a user mistypes them."""
    found = tuple(key for key in given if key not in known and key != "quant_method" and not key.startswith("_"))
    if found:
        config.__dict__["_unknown"] = found


def unknown_options(config: Any) -> tuple[str, ...]:
    """Arguments of a config that its class does not have."""
    return getattr(config, "_unknown", ())


def hqq_options(
    nbits: int = 4,
    group_size: int | None = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: bool = False,
    axis: int = 1,
) -> dict[str, Any]:
    """What hqq's `BaseQuantizeConfig` returns (hqq 0.2.8).

    Raises:
      ValueError: a width, axis or group size that hqq does not have.
    """
    if nbits not in (8, 6, 5, 4, 3, 2, 1.58, 1):
        raise ValueError(f"HqqConfig: nbits must be 8, 6, 5, 4, 3, 2, 1.58 or 1, got {nbits}")
    if group_size is not None and group_size % 8:
        raise ValueError(f"HqqConfig: group_size must be a multiple of 8 or None, got {group_size}")
    scale = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    zero = {"nbits": 8, "channel_wise": offload_meta, "group_size": 128 if offload_meta else None, "optimize": False}
    return {
        "weight_quant_params": {
            "nbits": nbits,
            "channel_wise": True,
            "group_size": group_size,
            "optimize": True,
            "round_zero": nbits == 4,
            "axis": axis,
            "view_as_float": view_as_float,
        },
        "scale_quant_params": scale if quant_scale else None,
        "zero_quant_params": zero if quant_zero else None,
        "offload_meta": offload_meta,
    }


def _compressed_init(
    self: Any,
    config_groups: dict | None = None,
    format: str = "dense",
    quantization_status: str = "initialized",
    kv_cache_scheme: Any = None,
    global_compression_ratio: float | None = None,
    ignore: list[str] | None = None,
    quant_method: str = "compressed-tensors",
    run_compressed: bool | None = None,
    dequantize: bool = False,
    use_optimized_inference: bool = False,
    **kwargs: Any,
) -> None:
    self.dequantize = dequantize or run_compressed is False
    self.use_optimized_inference = use_optimized_inference
    self.run_compressed = run_compressed
    self.quantization_config = None
    if config_groups or kv_cache_scheme:
        self.quantization_config = {
            "config_groups": config_groups,
            "format": format,
            "global_compression_ratio": global_compression_ratio,
            "ignore": ignore,
            "kv_cache_scheme": kv_cache_scheme,
            "quant_method": quant_method,
            "quantization_status": quantization_status,
            **kwargs,
        }
    self.quant_method = hf.QuantizationMethod.COMPRESSED_TENSORS


def _compressed_dict(self: Any) -> dict[str, Any]:
    return copy.deepcopy(self.quantization_config or {"quant_method": "compressed-tensors"})


def _compressed_diff(self: Any) -> dict[str, Any]:
    return {k: v for k, v in self.to_dict().items() if k != "quant_method" or self._file is not None}


def _torchao_init(
    self: Any,
    quant_type: Any,
    modules_to_not_convert: list | None = None,
    include_input_output_embeddings: bool = False,
    untie_embedding_weights: bool = False,
    **kwargs: Any,
) -> None:
    self.quant_method = hf.QuantizationMethod.TORCHAO
    self.quant_type = quant_type
    self.modules_to_not_convert = modules_to_not_convert
    self.include_input_output_embeddings = include_input_output_embeddings
    self.untie_embedding_weights = untie_embedding_weights
    self.quant_type_kwargs = kwargs


def _torchao_dict(self: Any) -> dict[str, Any]:
    kind = self.quant_type
    if not isinstance(kind, (str, dict)):  # an AOBaseConfig of an installed torchao
        kind = {"_type": type(kind).__name__, "_data": {k: _plain(v) for k, v in vars(kind).items()}}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": self.modules_to_not_convert,
        "include_input_output_embeddings": self.include_input_output_embeddings,
        "untie_embedding_weights": self.untie_embedding_weights,
    }


def _quark_init(self: Any, **kwargs: Any) -> None:
    self.custom_mode = kwargs.get("quant_method", "quark")
    self.legacy = "export" not in kwargs
    self.quant_config = kwargs
    self.quant_method = hf.QuantizationMethod.QUARK


def _quark_dict(self: Any) -> dict[str, Any]:
    return copy.deepcopy(self.quant_config)


def _gptq_post_init(self: Any) -> None:
    """The original's checks, without its look at optimum's version."""
    modules, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
    super(type(self), self).post_init()
    self.modules_in_block_to_quantize = modules


# Class name -> methods in place of those that need a library.
_OWN: dict[str, dict[str, Any]] = {
    "HqqConfig": {"__init__": _hqq_init, "_of_file": classmethod(_hqq_of_file)},
    "CompressedTensorsConfig": {
        "__init__": _compressed_init,
        "_arguments": _compressed_dict,
        "_diff": _compressed_diff,
    },
    "TorchAoConfig": {"__init__": _torchao_init, "_arguments": _torchao_dict},
    "QuarkConfig": {"__init__": _quark_init, "_arguments": _quark_dict},
    "GPTQConfig": {"post_init": _gptq_post_init},
}
_cache: dict[type, type] = {}


def replacement(original: type) -> type:
    """Our class of the same name and arguments, a subclass of the original."""
    if issubclass(original, Verbatim):
        return original
    if original in _cache:
        return _cache[original]
    name = original.__name__
    body: dict[str, Any] = {"__module__": __name__, "__doc__": original.__doc__}
    own = dict(_OWN.get(name, {}))
    arguments, diff = own.pop("_arguments", None), own.pop("_diff", None)
    body.update(own)
    kept = KEPT.get(name, {})
    made: type

    if "__init__" not in own:
        arguments_of = inspect.signature(original.__init__).parameters  # type: ignore[misc]

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            extra = {key: kwargs.pop(key) for key in kept if key in kwargs and key != "checkpoint_format"}
            original.__init__(self, *args, **kwargs)  # type: ignore[misc]
            self.__dict__.update(extra)
            _note_unknown(self, kwargs, {*arguments_of, *vars(self)})

        init.__wrapped__ = original.__init__  # type: ignore[attr-defined,misc]  # inspect.signature shows its arguments
        body["__init__"] = init
    if arguments is not None:

        def to_dict(self: Any) -> dict[str, Any]:
            return copy.deepcopy(self._file) if self._file is not None else arguments(self)

        body["to_dict"], body["to_diff_dict"] = to_dict, diff or to_dict
    made = type(name, (Verbatim, original), body)
    _cache[original] = made
    return made


LED: dict[type, type] = {}  # original -> the subclass that its name makes while its method is taken over


def lead(original: type) -> None:
    """Lets `original` make objects of `LED[original]`: a name imported before `enable` does the same as after."""
    if "__new__" in vars(original):
        return

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(LED.get(cls, cls))

    new.__wrapped__ = original.__init__  # type: ignore[attr-defined,misc]  # what inspect.signature shows
    original.__new__ = new  # type: ignore[method-assign,assignment]  # stays: Python remembers one that was removed
    inner = original.from_dict.__func__  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def from_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        led = LED.get(cls)
        return inner(cls, *args, **kwargs) if led is None else led.from_dict(*args, **kwargs)  # type: ignore[attr-defined]

    original.from_dict = classmethod(from_dict)  # type: ignore[attr-defined]


class StoredConfig(Verbatim, hf.QuantizationConfigMixin):
    """Config of a method that jq reads and transformers does not know (e.g. NVIDIA's "modelopt")."""

    def __init__(self, quant_method: str = "", **kwargs: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.__dict__.update(kwargs)


class JqConfig(Verbatim, hf.QuantizationConfigMixin):
    """Quantizes while loading with a method of jq: `JqConfig(jq.NF4())`.

    The model that comes out is of the method's own format (bitsandbytes for `jq.NF4`), in memory and saved.

    Args:
      method: `jq.NF4()`, `jq.RTN(bits=4, group_size=128)`, ... (`jq.formats()` lists them). Methods that need
        calibration data are refused: quantize with `jq.quantize` first and load the result.
      skip: module names or patterns that stay in float; None for the usual ones (the output layer, tied weights).
    """

    def __init__(self, method: Any = None, skip: list[str] | None = None, **kwargs: Any) -> None:
        self.quant_method = "jq"  # type: ignore[assignment]
        self.method, self.modules_to_not_convert = method, skip
        self.__dict__.update(kwargs)
        _note_unknown(self, kwargs, {"modules_to_not_convert"})

    def to_dict(self) -> dict[str, Any]:
        if self._file is not None:
            return copy.deepcopy(self._file)
        return {
            "quant_method": "jq",
            "method": repr(self.method),
            "modules_to_not_convert": self.modules_to_not_convert,
        }


def replacements() -> dict[str, type]:
    """quant_method (transformers' mapping key) -> our config class."""
    return {key: replacement(cls) for key, cls in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items()}


def __getattr__(name: str) -> type:
    """The replacements by name, which is also how pickle finds them."""
    for cls in replacements().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
