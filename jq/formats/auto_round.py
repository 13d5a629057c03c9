"""AutoRound exports (auto-round 0.16.1): integers in the storage of GPTQ or AWQ, told apart by `packing_format`.

    "gptqmodel"       the arrangement of GPTQ, qzeros as they are, with g_idx
    contains "gptq"   GPTQ v1 (qzeros hold zero - 1), mostly without g_idx; "auto" means it too
    contains "awq"    AWQ gemm
    contains "fake"   plain weights
    otherwise         AutoRound's own: the arrangement of GPTQ, qzeros as they are
    other data_type   floats and shared exponents, whatever the packing is called: `auto_round_floats`

`extra_config` names modules (or patterns) with other bits, group_size or sym. Loaded tensors are GPTQ or AWQ tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jq.errors import FormatError, UnsupportedError
from jq.formats import awq, gptq
from jq.formats.auto_round_floats import FloatOptions, dump_floats, load_floats, parse_floats
from jq.formats.auto_round_floats import group as float_group
from jq.formats.base import Context, Format, Parts, group_by_prefix, true_or_false
from jq.formats.gptq_config import Options as GptqOptions
from jq.formats.gptq_config import checked_group, first, whole_number
from jq.qtensor import NarrowFloat, QTensor

INTEGERS = ("qweight", "qzeros", "scales", "g_idx")
ROTATIONS = ("rotation", "hadamard", "spinquant", "quarot")  # in keys of a config


@dataclasses.dataclass(frozen=True)
class Options:
    """Defaults of all modules, the storage ("gptq", "awq", "own"), and what `extra_config` overrides, by name and pattern."""

    bits: int
    group_size: int
    sym: bool
    storage: str
    floats: FloatOptions | None = None
    exact: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    patterns: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = ()

    def of(self, module: str) -> Options:
        """The options of one module: its own entry of `extra_config`, else the first pattern found in its name."""
        found = self.exact.get(module)
        if found is None:
            found = next((overrides for pattern, overrides in self.patterns if pattern.search(module)), {})
        return dataclasses.replace(self, **found)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config.

    Raises:
      FormatError: no or impossible bits or group_size.
      UnsupportedError: quantized activations of integers, packings of other libraries.
    """
    label = context.label
    packing = str(first(config, "packing_format", "backend", default="auto_round:gptq")).lower()
    kind = str(first(config, "data_type", default="int"))
    if "mlx" in packing or (kind.startswith("int") and "llm_compressor" in packing):
        raise UnsupportedError(
            f"{label}: AutoRound with data_type {kind!r}, packing_format {packing!r}, which is the storage of another "
            "library under AutoRound's name. Export it in auto-round as auto_round or llm_compressor"
        )
    floats = not kind.startswith("int")
    for key, value in config.items():
        if value and any(word in key for word in ROTATIONS) and not (floats and key == "rotation_config"):
            raise UnsupportedError(
                f"{label}: quantization_config.{key} = {value!r:.80}: the inputs of each layer are rotated, which is not done here"
            )
    if floats:
        return Options(int(config.get("bits") or 8), -1, True, "floats", parse_floats(config, kind, label))
    if "fake" in packing:
        return Options(int(config.get("bits") or 8), -1, True, "fake")
    if config.get("act_bits") and whole_number(config["act_bits"], "act_bits", label) < 16:
        raise UnsupportedError(f"{label}: AutoRound with {config['act_bits']}-bit activations is not done here")
    if config.get("bits") is None:
        raise FormatError(f"{label}: quantization_config.bits is missing; AutoRound always writes it")
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"{label}: quantization_config.extra_config is {type(extra).__name__}, expected an object")
    exact = {
        name: _overrides(found, f"{label}: quantization_config.extra_config[{name!r}]") for name, found in extra.items()
    }
    options = Options(
        bits=whole_number(config["bits"], "bits", label),
        group_size=checked_group(first(config, "group_size", default=128), label),
        sym=true_or_false(config, "sym", f"{label}: quantization_config"),
        storage=_storage(packing, label),
        exact=exact,
        patterns=tuple((_pattern(name, label), overrides) for name, overrides in exact.items()),
    )
    if options.bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"{label}: AutoRound with {options.bits} bits; its packings have 2, 3, 4, 8")
    return options


def _storage(packing: str, label: str) -> str:
    if "gptqmodel" in packing:  # inference/backend.py, GPTQ_FORMAT_NO_ZP
        return "own"
    if "gptq" in packing or packing == "auto":
        return "gptq"
    if "awq" in packing:
        return "awq"
    if "auto_round" not in packing and "autoround" not in packing:
        raise UnsupportedError(
            f"{label}: AutoRound with packing_format {packing!r:.80}, which says nothing of the zero points; known: auto_round, "
            "auto_round:auto_gptq, auto_round:gptqmodel, auto_round:auto_awq"
        )
    return "own"


def _pattern(name: str, label: str) -> re.Pattern[str]:
    try:
        return re.compile(name)
    except re.error as e:
        raise FormatError(
            f"{label}: quantization_config.extra_config: {name!r:.80} is neither a module nor a regular expression ({e})"
        ) from e


def _overrides(found: Any, label: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise FormatError(f"{label} is {found!r:.60}, expected an object of settings")
    changed: dict[str, Any] = {}
    if found.get("bits") is not None:
        changed["bits"] = whole_number(found["bits"], "bits", label)
    if found.get("group_size") is not None:
        changed["group_size"] = checked_group(found["group_size"], label)
    if found.get("sym") is not None:
        changed["sym"] = true_or_false(found, "sym", label)
    return changed


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules with words of integers, or with floats and their scales; none where weights are plain."""
    if options.floats is not None:
        return float_group(names, options, context)
    return group_by_prefix(names, ("qweight",), INTEGERS)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module's tensors, through the format whose storage they have."""
    if options.floats is not None:
        return load_floats(prefix, parts, options.floats, context)
    if prefix.rpartition(".")[2] in gptq.EMBEDDINGS:
        raise UnsupportedError(f"{prefix}: a quantized embedding; AutoRound's packings have linear layers alone")
    o = options.of(prefix)
    if o.storage == "awq":
        return awq.load(prefix, parts, awq.Options(o.bits, o.group_size, "gemm", o.sym), context)
    zeros = "v1-field" if o.storage == "gptq" else "v2"
    return gptq.load(prefix, parts, GptqOptions(o.bits, o.group_size, o.sym, zeros=zeros), context)


def dump(q: Any) -> Parts:
    """The stored tensors of a module, from the arrays of `q`."""
    assert q.source is not None
    if isinstance(q, NarrowFloat):
        return dump_floats(q)
    return awq.dump(q) if q.source.format == "awq" else gptq.dump(q)


def detect(checkpoint: Any) -> dict | None:
    """The config of files whose config.json has none: quantization_config.json beside it."""
    found = checkpoint.side_json("quantization_config.json")
    method = None if found is None else found.get("quant_method")
    return dict(found) if found is not None and method in FORMAT.methods else None


FORMAT = Format(
    name="auto-round",
    methods=("auto-round", "intel/auto-round"),
    title="AutoRound exports: the storage of GPTQ, AWQ or its own, NVFP4, MX, FP8",
    parse=parse,
    markers=("qweight",),
    suffixes=INTEGERS,
    group=group,
    beside=("input_scale", "input_global_scale"),
    load=load,
    dump=dump,
    detect=detect,
)
