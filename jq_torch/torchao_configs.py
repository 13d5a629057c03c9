"""torchao's config objects as methods of jq: one for all linear layers, or `FqnToConfig`'s for each name.

Source: torchao 0.18.0, quantization/quant_api.py; transformers 5.23.0, integrations/torchao.py (which name a parameter goes by).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

import jq
from jq.errors import UnsupportedError
from jq_torch.by_module import ByModule

# torchao 0.18's own, where jq.TorchAO has others
_TORCHAO_DEFAULTS: dict[str, dict[str, Any]] = {
    "intx_weight_only": {"weight_dtype": "int8"},
    "int8_dynamic_activation_intx_weight": {
        "weight_dtype": "int8",
        "weight_granularity": {"_type": "PerGroup", "_data": {"group_size": 32}},
    },
    "float8_dynamic_activation_float8_weight": {"granularity": "per_tensor"},
}


def method(config: Any) -> Any:
    """`TorchAoConfig(Int8WeightOnlyConfig())` of an installed torchao, or its name and arguments without one.

    Raises:
      UnsupportedError: an option that quantizing here does not follow.
    """
    kind, options = config.quant_type, dict(getattr(config, "quant_type_kwargs", None) or {})
    if isinstance(kind, Mapping):
        kind = kind.get("default", kind)
    names = _by_name(kind)
    if names is None:
        return _one(kind, options)
    return ByFqn({name: None if one is None else _one(one, {}) for name, one in names.items()})


def _by_name(kind: Any) -> Mapping[str, Any] | None:
    """{name: config or None} of an `FqnToConfig` (or `ModuleFqnToConfig`, as it was called), None for other configs."""
    said = kind["_type"] if isinstance(kind, Mapping) else type(kind).__name__
    if said not in ("FqnToConfig", "ModuleFqnToConfig"):
        return None
    data = kind.get("_data", {}) if isinstance(kind, Mapping) else vars(kind)
    names = data.get("fqn_to_config") or data.get("module_fqn_to_config")
    if not names or all(one is None for one in names.values()):
        raise UnsupportedError(f"TorchAoConfig: {said} names nothing to quantize")
    return names


def _one(kind: Any, options: dict[str, Any]) -> jq.TorchAO:
    """What is asked for must be what the made config says: an option that is not followed would go unnoticed."""
    given = options
    if isinstance(kind, Mapping):
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
    if isinstance(value, Mapping) and "_type" in value:
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
class ByFqn(ByModule):
    """`FqnToConfig`: names of parameters, then of modules, then patterns (`re:`) in their order, then `_default`."""

    def of(self, path: str) -> Any:
        for name in (f"{path}.weight", path):
            if name in self.methods:
                return self.methods[name]
        for name, found in self.methods.items():
            pattern = name.removeprefix("re:")
            if name != pattern and (re.fullmatch(pattern, f"{path}.weight") or re.fullmatch(pattern, path)):
                return found
        return self.methods.get("_default")

    def named(self, path: str) -> bool:
        """Whether a name or a pattern is for this module, not `_default` alone."""
        return ByFqn({**self.methods, "_default": _NOT_NAMED}).of(path) is not _NOT_NAMED

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of transformers."""
        first = next(m for m in self.methods.values() if m is not None).config(skip=skip)
        names = {n: None if m is None else m.config()["quant_type"]["default"] for n, m in self.methods.items()}
        data = {"fqn_to_config": names, "module_fqn_to_config": names}
        return first | {"quant_type": {"default": {"_type": "FqnToConfig", "_version": 1, "_data": data}}}


_NOT_NAMED = object()
