"""What a storage format is: how a quantization config and stored tensors become QTensors, and back.

A format is one module of `jq.formats` that holds one `FORMAT = Format(...)`. It knows config keys and tensor names;
algorithms, packing and arithmetic live elsewhere. `jq.state` drives it:

    options = format.parse(quantization_config, context)
    for each module prefix that has one of `format.markers` among its stored suffixes:
        parts = {suffix: array}                      # "model.layers.0.mlp.up_proj" + ".qweight" -> parts["qweight"]
        q = format.load(prefix, parts, options, context)   # None: not quantized after all, keep the tensors as they are
    format.dump(q) -> {suffix: array}                # from q's own arrays and q.source alone

The State's key of a quantized module is prefix + ".weight" (or prefix alone where `Format.parameter` says that the
prefix is a parameter, not a module: stacked experts). Stored names are prefix + separator + suffix. A suffix that begins
with "~" is borrowed: `load` may look at that tensor, which stays an entry of its own (a scale that modules share).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, JqWarning
from jq.qtensor import QTensor

Parts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a format may look at beside a module's own tensors.

    Fields:
      config: the whole config.json ({} where there is none).
      shapes: shape of every stored tensor, by name.
      dtypes: stored dtype of every tensor, by name.
      kinds: a container's own type name of each tensor (GGUF).
      metadata: safetensors metadata of all shards, merged.
      objects: plain values of a torch file, by dotted name.
      label: file or directory for messages.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    objects: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = "checkpoint"

    @property
    def model_dtype(self) -> str:
        """The checkpoint's own float dtype from config.json (`dtype` or `torch_dtype`), "float32" if it says none.

        Raises:
          FormatError: it says something that is no float dtype.
        """
        found = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        name = str(found).removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16", "float64"):
            raise FormatError(f"{self.label}: config.json: dtype is {found!r}, expected float32, float16 or bfloat16")
        return name


@dataclasses.dataclass(frozen=True)
class Format:
    """One storage format; see the module docstring for how the functions are used.

    Fields:
      name: key in the table, e.g. "gptq".
      methods: values of `quant_method` that mean it.
      title: one line for people.
      parse: (quantization_config, Context) -> frozen options object. Raises FormatError / UnsupportedError.
      markers: suffixes; a prefix with one of them is a quantized module. "" means the tensor `prefix` itself.
      suffixes: every suffix that belongs to a quantized module (markers included; not "bias"). Stored tensors with
        one of `owned` suffixes that no module took are an error.
      load: (prefix, parts, options, context) -> QTensor, or None for a module that is not quantized.
      dump: (q) -> parts, identical to what was loaded.
      detect: (checkpoint) -> quantization_config-like dict where config.json has none, else None.
      methods_table: name -> method class that quantizes to this format (`jq.NF4`, ...).
      group: optional (names, options, context) -> {prefix: {suffix: stored name}} for formats whose names do not
        follow prefix + "." + suffix.
      join: (prefix, suffix) -> stored name, the inverse of `group`.
      parameter: whether a prefix is a parameter (stacked experts), whose State key gets no ".weight".
      metadata: optional (tensors of the State) -> safetensors metadata that newly quantized tensors need.
      beside_weights: optional (tensors of the State) -> {file name: bytes} of files that newly quantized tensors need.
      beside: suffixes of tensors that may lie beside a weight that is not quantized after all (scales of frozen or
        skipped layers); a model runs without them, saving keeps them.
      deferrable: `load` never returns None, so a lazy State may put it off.
      evidence: "reference" (held against files of the original library), "library" (against its code at work, no file of
        it was at hand) or "source" (from its source alone).
    """

    name: str
    methods: tuple[str, ...]
    title: str
    parse: Callable[[Mapping[str, Any], Context], Any]
    markers: tuple[str, ...]
    suffixes: tuple[str, ...]
    load: Callable[[str, Parts, Any, Context], QTensor | None]
    dump: Callable[[Any], Parts]
    detect: Callable[[Any], dict | None] | None = None
    methods_table: Mapping[str, type] = dataclasses.field(default_factory=dict)
    group: Callable[[list[str], Any, Context], dict[str, dict[str, str]]] | None = None
    join: Callable[[str, str], str] = lambda prefix, suffix: f"{prefix}.{suffix}"
    parameter: Callable[[str], bool] = lambda prefix: False
    metadata: Callable[[Mapping[str, Any]], dict[str, str]] | None = None
    beside_weights: Callable[[Mapping[str, Any]], dict[str, bytes]] | None = None
    beside: tuple[str, ...] = ()
    deferrable: bool = True
    evidence: str = "reference"


def group_by_prefix(names: list[str], markers: tuple[str, ...], suffixes: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Finds quantized modules by name: {prefix: {suffix: stored name}} for prefixes that have a marker.

    The longest matching suffix wins, so that "weight.absmax" is not taken for a module "x.weight" with "absmax".
    """
    ordered = sorted(set(suffixes), key=len, reverse=True)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for suffix in ordered:
            if name.endswith("." + suffix):
                found.setdefault(name[: -len(suffix) - 1], {})[suffix] = name
                break
    return {prefix: parts for prefix, parts in found.items() if any(m in parts for m in markers)}


def take(parts: Parts, suffix: str, prefix: str, *, why: str = "") -> np.ndarray:
    """parts[suffix], or a FormatError that names the missing tensor."""
    if suffix not in parts:
        there = ", ".join(sorted(parts))
        raise FormatError(f"{prefix}.{suffix}: missing; the module has only {there}. {why}".rstrip())
    return parts[suffix]


def expect_shape(array: np.ndarray, shape: tuple[int, ...], name: str, why: str) -> None:
    """Raises FormatError where a stored tensor's shape is not what config and other tensors say."""
    if tuple(array.shape) != tuple(shape):
        raise FormatError(f"{name}: found shape {tuple(array.shape)}, expected {tuple(shape)} ({why})")


def expect_dtype(array: np.ndarray, dtypes: tuple[Any, ...], name: str) -> None:
    """Raises FormatError where a stored tensor's dtype is none of `dtypes`."""
    if array.dtype not in [np.dtype(d) for d in dtypes]:
        raise FormatError(
            f"{name}: found dtype {array.dtype}, expected {' or '.join(str(np.dtype(d)) for d in dtypes)}"
        )


def expect_one(array: np.ndarray, name: str, why: str = "") -> None:
    """Raises FormatError where a stored tensor holds more or less than one value."""
    if array.size != 1:
        raise FormatError(f"{name}: found shape {tuple(array.shape)}, expected one value{why and f' ({why})'}")


def true_or_false(config: Mapping[str, Any], name: str, label: str, *, default: bool = True) -> bool:
    """A value of a quantization_config that must be true or false (or 1 or 0); `default` where it is missing or null.

    Args:
      label: file and the object's own key, for messages.

    Raises:
      FormatError: it is something else ("no" would count as true); the message names the key.
    """
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise FormatError(f"{label}.{name} is {value!r:.80}, expected true or false")
    return bool(value)


def warn_unknown(config: Mapping[str, Any], known: Iterable[str], label: str) -> None:
    """A JqWarning, once, for each key of a quantization_config that is not `known`.

    A key that changes numbers belongs to the known ones, and is read or refused.
    """
    for key in sorted(map(str, config.keys() - set(known))):
        warn_once(label, f"quantization_config.{key} is not known and ignored")


_warned: set[tuple[str, str]] = set()


def warn_once(label: str, text: str) -> None:
    """A JqWarning, once for each (file, text) of a process."""
    if (label, text) not in _warned:
        _warned.add((label, text))
        warnings.warn(f"{label}: {text}", JqWarning, stacklevel=3)
