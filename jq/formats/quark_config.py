"""AMD Quark's quantization_config: which settings a layer has."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from jq.errors import FormatError
from jq.formats.base import Context, true_or_false


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one tensor of a layer is quantized; names as in the config, and:

    Fields:
      wide: dynamic scales are formed in float32, not in the input's dtype.
      element: dtype of the numbers in an "mx" container.
      scales: how the scales themselves are quantized (a list of two stages, the second with is_scale_quant).
      first: what the tensor was rounded to before (two stages of values).
    """

    dtype: str
    qscheme: str = "per_tensor"
    group_size: int = 0
    block_size: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_format: str = "float"
    float_zeros: bool = False
    axis: int | None = None
    element: str = ""
    wide: bool = False
    scales: Spec | None = None
    first: Spec | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's settings; None where a tensor is not quantized."""

    weight: Spec | None
    inputs: Spec | None
    outputs: Spec | None
    why_not: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings by pattern of names, in order, and for the rest.

    Fields:
      rotated: names of layers whose inputs are rotated at run time; () where the file's own matrices tell.
      rotation_size: inputs that are rotated together, 0: all of a layer.
    """

    patterns: tuple[tuple[str, Layer], ...]
    default: Layer
    reorder: bool = True
    rotated: tuple[str, ...] = ()
    rotation_size: int = 0

    def of(self, prefix: str) -> Layer:
        return next((layer for pattern, layer in self.patterns if fnmatch.fnmatch(prefix, pattern)), self.default)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: settings that are missing or of the wrong kind.
    """
    label = f"{context.label}: quantization_config"
    layers = config.get("layer_quant_config") or {}
    types = config.get("layer_type_quant_config") or {}
    export = config.get("export") or {}
    if not all(isinstance(v, Mapping) for v in (layers, types, export)):
        raise FormatError(f"{label}: layer_quant_config, layer_type_quant_config and export must be objects")
    base = types.get("Linear") or config.get("global_quant_config")
    if base is None:
        raise FormatError(f"{label}.global_quant_config: missing; Quark writes the settings of its layers there")
    method = export.get("pack_method", "reorder")
    if method not in ("reorder", "order"):
        raise FormatError(f"{label}.export.pack_method is {method!r}, expected 'reorder' or 'order'")
    patterns = tuple((name, _layer(f"{label}.layer_quant_config[{name!r}]", conf)) for name, conf in layers.items())
    rotated, size = _rotation(f"{label}.algo_config", config.get("algo_config"))
    return Options(patterns, _layer(f"{label}.global_quant_config", base), method == "reorder", rotated, size)


def _rotation(label: str, algorithms: Any) -> tuple[tuple[str, ...], int]:
    """(online_rotation_layers, rotation_size) of the algorithm "rotation"."""
    algorithms = algorithms if isinstance(algorithms, list) else [algorithms]
    found: Any = next((a for a in algorithms if isinstance(a, Mapping) and a.get("name") == "rotation"), {})
    online, size = found.get("online_config") or {}, found.get("rotation_size") or 0
    layers = online.get("online_rotation_layers") or [] if isinstance(online, Mapping) else None
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise FormatError(f"{label}: online_rotation_layers must be a list of names, found {online!r:.80}")
    if type(size) is not int or size < 0:
        raise FormatError(f"{label}: rotation_size is {size!r:.60}, expected a positive integer or null")
    return tuple(layers), size


def _layer(label: str, conf: Any) -> Layer:
    if not isinstance(conf, Mapping):
        raise FormatError(f"{label}: must be an object of settings, found {type(conf).__name__}")
    why = f"{label}.bias is quantized" if conf.get("bias") else ""
    specs = {}
    for key in ("weight", "input_tensors", "output_tensors"):
        value = conf.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list) and len(value) != 2:
            why, value = f"{label}.{key} has {len(value)} stages", None
        specs[key] = None if value is None else _stages(f"{label}.{key}", value)
    return Layer(specs["weight"], specs["input_tensors"], specs["output_tensors"], why)


def _stages(label: str, conf: Any) -> Spec:
    if not isinstance(conf, list):
        return _spec(label, conf)
    one, two = (_spec(f"{label}[{i}]", c) for i, c in enumerate(conf))
    if conf[1].get("is_scale_quant"):
        return dataclasses.replace(one, scales=two)
    return dataclasses.replace(two, first=one)


def _spec(label: str, conf: Any) -> Spec:
    if not isinstance(conf, Mapping) or not isinstance(conf.get("dtype"), str):
        raise FormatError(f"{label}: must be an object with a dtype, found {conf!r:.80}")
    group, block = conf.get("group_size") or 0, conf.get("block_size")
    if type(group) is not int or group < 0:
        raise FormatError(f"{label}.group_size is {group!r}, expected a positive integer")
    if block is not None and not (isinstance(block, list | tuple) and len(block) == 2):
        raise FormatError(f"{label}.block_size is {block!r}, expected two integers")
    return Spec(
        dtype=conf["dtype"],
        qscheme=str(conf.get("qscheme") or "per_tensor"),
        group_size=group,
        block_size=tuple(block) if block else None,
        symmetric=true_or_false(conf, "symmetric", label),
        dynamic=true_or_false(conf, "is_dynamic" if "is_dynamic" in conf else "dynamic", label, default=False),
        scale_format=str(conf.get("scale_format") or "float"),
        float_zeros=str(conf.get("zero_point_type") or "int32") == "float32",
        axis=conf["ch_axis"] if type(conf.get("ch_axis")) is int else None,
        element=str(conf.get("mx_element_dtype") or ""),
        wide=conf.get("scale_type") == "float32",
    )
