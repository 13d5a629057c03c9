"""AutoRound exports (auto-round 0.16.1): tensors in the storage of GPTQ or AWQ, told apart by `packing_format`.

    contains "gptq"   GPTQ v1 (qzeros hold zero - 1), mostly without g_idx
    contains "awq"    AWQ gemm
    otherwise         AutoRound's own: the arrangement of GPTQ, qzeros as they are

`extra_config` names modules (or patterns) with other bits, group_size or sym. Loaded tensors are GPTQ or AWQ tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jq.errors import FormatError, UnsupportedError
from jq.formats import awq, gptq
from jq.formats.base import Context, Format, Parts
from jq.formats.gptq_config import Options as GptqOptions
from jq.formats.gptq_config import checked_group, first, whole_number
from jq.qtensor import Affine


@dataclasses.dataclass(frozen=True)
class Options:
    """Defaults of all modules, the storage ("gptq", "awq", "own") and (name or pattern, overrides) of exceptions."""

    bits: int
    group_size: int
    sym: bool
    storage: str
    extra: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def of(self, module: str) -> Options:
        """The options of one module: its own entry of `extra_config`, else the first pattern found in its name."""
        exact = [overrides for name, overrides in self.extra if name == module]
        found = exact or [overrides for name, overrides in self.extra if re.search(name, module)]
        return dataclasses.replace(self, **dict(found[0])) if found else self


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config.

    Raises:
      FormatError: no or impossible bits or group_size.
      UnsupportedError: float data types, quantized activations, packings of other libraries.
    """
    label = context.label
    packing = str(first(config, "packing_format", "backend", default="auto_round:gptq")).lower()
    kind = str(first(config, "data_type", default="int"))
    if not kind.startswith("int") or any(word in packing for word in ("fp8", "nvfp", "mxfp", "llm_compressor")):
        raise UnsupportedError(
            f"{label}: AutoRound with data_type {kind!r}, packing_format {packing!r}; integer data types in the packings of "
            "GPTQ, AWQ and AutoRound are read here. Export it in auto-round as llm_compressor (compressed-tensors)"
        )
    if config.get("act_bits") and whole_number(config["act_bits"], "act_bits", label) < 16:
        raise UnsupportedError(f"{label}: AutoRound with {config['act_bits']}-bit activations is not done here")
    if config.get("bits") is None:
        raise FormatError(f"{label}: quantization_config.bits is missing; AutoRound always writes it")
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"{label}: quantization_config.extra_config is {type(extra).__name__}, expected an object")
    options = Options(
        bits=whole_number(config["bits"], "bits", label),
        group_size=checked_group(first(config, "group_size", default=128), label),
        sym=bool(first(config, "sym", default=True)),
        storage="gptq" if "gptq" in packing else "awq" if "awq" in packing else "own",
        extra=tuple((name, _overrides(found, f"{label}: extra_config {name!r}")) for name, found in extra.items()),
    )
    if options.bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"{label}: AutoRound with {options.bits} bits; its packings have 2, 3, 4, 8")
    return options


def _overrides(found: Mapping[str, Any], label: str) -> tuple[tuple[str, Any], ...]:
    changed: dict[str, Any] = {}
    if found.get("bits") is not None:
        changed["bits"] = whole_number(found["bits"], "bits", label)
    if found.get("group_size") is not None:
        changed["group_size"] = checked_group(found["group_size"], label)
    if found.get("sym") is not None:
        changed["sym"] = bool(found["sym"])
    return tuple(changed.items())


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    """One module's tensors, through the format whose storage they have."""
    o = options.of(prefix)
    if o.storage == "awq":
        return awq.load(prefix, parts, awq.Options(o.bits, o.group_size, "gemm", o.sym), context)
    zeros = "v1-field" if o.storage == "gptq" else "v2"
    return gptq.load(prefix, parts, GptqOptions(o.bits, o.group_size, o.sym, zeros=zeros), context)


def dump(q: Affine) -> Parts:
    """The stored tensors of a module, from the arrays of `q`."""
    assert q.source is not None
    return awq.dump(q) if q.source.format == "awq" else gptq.dump(q)


def detect(checkpoint: Any) -> dict | None:
    """The config of files whose config.json has none: quantization_config.json beside it."""
    found = checkpoint.side_json("quantization_config.json")
    method = None if found is None else found.get("quant_method")
    return dict(found) if found is not None and method in FORMAT.methods else None


FORMAT = Format(
    name="auto-round",
    methods=("auto-round", "intel/auto-round"),
    title="AutoRound exports in the storage of GPTQ, AWQ or its own",
    parse=parse,
    markers=("qweight",),
    suffixes=("qweight", "qzeros", "scales", "g_idx"),
    load=load,
    dump=dump,
    detect=detect,
)
