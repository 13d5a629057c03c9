"""The table of storage formats: `quant_method` -> `Format`. A new format is a module here and its name in `_MODULES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context as Context
from jq.formats.base import Format as Format

# Module names, in the order in which `detect` is asked for files without a quantization_config.
_MODULES = (
    "auto_round",
    "gptq",
    "awq",
    "bitsandbytes",
    "sinq",
    "hqq",
    "quanto",
    "eetq",
    "aqlm",
    "vptq",
    "fbgemm_fp8",
    "fp8",
    "compressed_tensors",
    "torchao",
    "mxfp4",
    "modelopt",
    "bitnet",
    "gguf",
    "quark",
    "qqq",
    "exl3",
    "paroquant",
    "spqr",
    "higgs",
    "fp_quant",
    "fouroversix",
    "gemma",
    "metal",
)


# Methods of transformers that have no checkpoints.
NEVER_STORED = {
    "nvfp4": "transformers quantizes to it while loading a 16-bit checkpoint and cannot save it, so no file holds it; NVFP4 "
    "checkpoints say modelopt, compressed-tensors, auto-round or quark, and jq.NVFP4() makes one",
}


@cache
def table() -> Mapping[str, Format]:
    """Every format, by name."""
    found = {}
    for module in _MODULES:
        fmt = importlib.import_module(f"jq.formats.{module}").FORMAT
        found[fmt.name] = fmt
    return found


def by_method(method: str, label: str = "config.json") -> Format:
    """The format of a `quant_method` value.

    Raises:
      UnsupportedError: no format has it; the message lists those that exist.
    """
    for fmt in table().values():
        if method in fmt.methods:
            return fmt
    if method in NEVER_STORED:
        raise UnsupportedError(f"{label}: quant_method {method!r}: {NEVER_STORED[method]}")
    known = ", ".join(sorted(m for f in table().values() for m in f.methods))
    raise UnsupportedError(f"{label}: quant_method {method!r} is not known here; known methods: {known}")


CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is the first one's old name


def stored_config(config: Mapping[str, Any], label: str) -> tuple[str, dict] | None:
    """(key, quantization config) of a config.json, also in the configs of a model's parts (`text_config` first); None: neither.

    Raises:
      FormatError: it is no JSON object.
    """
    parts = {"text_config": None, **config}
    for holder in (config, *(part for part in parts.values() if isinstance(part, dict))):
        for key in CONFIG_KEYS:
            found = holder.get(key)
            if found is not None and not isinstance(found, dict):
                raise FormatError(f"{label}: config.json: {key} must be a JSON object, found {found!r:.60}")
            if found:
                return key, found
    return None


def without_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without quantization configs, those of a model's parts included."""
    return {
        name: without_config(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in CONFIG_KEYS
    }


def detect(checkpoint: Any) -> tuple[Format, dict] | None:
    """The format and quantization config of a checkpoint, None where it is not quantized.

    Looks at config.json (`stored_config`), then asks each format for its side files (quantize_config.json, ...).
    """
    stored = stored_config(checkpoint.config, checkpoint.label)
    if stored is not None:
        key, found = stored
        method = found.get("quant_method") or found.get("method")
        if method is None:
            method = _method_without_name(key, found)
        _check_names(found, f"{checkpoint.label}: {key}")
        return by_method(str(method), f"{checkpoint.label}: {key}"), dict(found)
    for fmt in table().values():
        if fmt.detect is not None:
            told = fmt.detect(checkpoint)
            if told is not None:
                return fmt, told
    return None


# Keys of any method that list modules or parameters by name.
_NAMES = (
    "modules_to_not_convert",
    "modules_to_convert",
    "ignored_layers",
    "skip_modules",
    "linear_weights_not_to_quantize",
)


def _check_names(config: Mapping[str, Any], label: str) -> None:
    """Raises `FormatError` where a list of names is something else."""
    for key in _NAMES:
        found = config.get(key)
        if found and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
            raise FormatError(f"{label}.{key} is {found!r:.60}, expected a list of names")


def _method_without_name(key: str, config: Mapping[str, Any]) -> str:
    """quant_method of configs that do not name it (old bitsandbytes, old compressed-tensors)."""
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return "bitsandbytes"
    if key == "compression_config" or not {"config_groups", "sparsity_config", "transform_config"}.isdisjoint(config):
        return "compressed-tensors"
    if "quant_algo" in config or "quantization" in config:
        return "modelopt"
    return "None"
