"""Checkpoints that say beside config.json how they are quantized: old AutoGPTQ and others with a side file.

`from_pretrained` looks for `quantization_config` in config.json and for `model.safetensors`. Files of AutoGPTQ before
0.8 have quantize_config.json and `gptq_model-4bit-128g.safetensors`; quanto has quanto_qmap.json. `jq.formats.detect`
knows them; here transformers is told. Saving writes these files again, and config.json as it was.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import modeling_utils

from jq.checkpoint import find_weights, open_checkpoint
from jq.errors import CheckpointError, UnsupportedError
from jq.formats import _method_without_name, detect
from jq.safetensors_file import read_header

# Files beside the weights that tell a loader how they are quantized; the tokenizer's files are the tokenizer's to save.
SIDE_FILES = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "quanto_qmap.json",
    "quantization_map.json",
    "model.safetensors.index.json.meta.json",
)
# Ends of names that no float model's tensors have.
PACKED = (".qweight", ".weight._data", ".weight._data._data", ".weight_packed", ".SCB", ".weight_scale_inv")


class Sides:
    """What a checkpoint says outside of config.json's quantization_config, and how a save gives it back.

    Attributes:
      files: contents by name.
      alone: config.json of the source has no quantization_config.
      folder: where `save_pretrained` is writing; None outside of it, and on processes that write nothing.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.files = {name: raw for name, raw in (files or {}).items() if name in SIDE_FILES}
        self.alone = config is not None and not any(
            isinstance(part, Mapping) and ("quantization_config" in part or "compression_config" in part)
            for part in (config, *config.values())
        )
        self.folder: Path | None = None
        self._taken: Any = None

    def write(self, config: Any) -> None:
        """Called by the quantizer while a model is saved, after the directory is made and before config.json is."""
        if self.folder is None:
            return
        for name, raw in self.files.items():
            (self.folder / name).write_bytes(raw)
        if self.alone and self.files:
            self._taken = config.__dict__.pop("quantization_config", None)

    def saved(self, config: Any) -> None:
        """The end of a save, successful or not."""
        self.folder = None
        if self._taken is not None:
            config.quantization_config, self._taken = self._taken, None


def patch_saving(kind: type) -> None:
    """`save_pretrained` tells a quantizer of class `kind` where it writes; stays after `disable`, as models do."""
    owner = modeling_utils.PreTrainedModel
    original = owner.save_pretrained
    if getattr(original, "_jq", False):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, kind) or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, save_directory, *args, **kwargs)
        given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
        sides: Sides = quantizer.sides  # type: ignore[attr-defined]
        sides.folder = Path(save_directory) if given.get("is_main_process", True) else None
        try:
            return original(self, save_directory, *args, **kwargs)
        finally:
            sides.saved(self.config)

    save_pretrained._jq = True  # type: ignore[attr-defined]
    owner.save_pretrained = save_pretrained


def patch(state: Any) -> None:
    """Wraps the three functions by which from_pretrained finds config and files; `state` undoes it."""
    if getattr(modeling_utils.get_hf_quantizer, "_jq", False):
        return
    state.patch(modeling_utils, "maybe_load_adapters", _noting_the_source(modeling_utils.maybe_load_adapters))
    state.patch(modeling_utils, "get_hf_quantizer", _with_side_files(modeling_utils.get_hf_quantizer))
    state.patch(
        modeling_utils,
        "_get_resolved_checkpoint_files",
        _with_other_names(modeling_utils._get_resolved_checkpoint_files),
    )


# What this thread's from_pretrained loads: name or directory, with its subfolder; and whether it has a quantizer.
_source: contextvars.ContextVar[str] = contextvars.ContextVar("source", default="")
_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


def _noting_the_source(original: Any) -> Any:
    """The first that from_pretrained does with its arguments is to look whether an adapter's base model is meant."""

    @functools.wraps(original)
    def maybe_load_adapters(name: Any, download_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(name, download_kwargs, *args, **kwargs)
        subfolder = dict(download_kwargs or {}).get("subfolder") or ""
        _source.set("" if found[1] is None else os.path.join(str(found[1]), subfolder))
        return found

    return maybe_load_adapters


def side_config(folder: str) -> dict[str, Any] | None:
    """quantization_config of a local directory whose config.json has none, with its quant_method."""
    if not os.path.isdir(folder):
        return None
    try:
        found = detect(open_checkpoint(folder))
    except CheckpointError:  # not a checkpoint that jq opens: transformers says what is wrong with it
        return None
    if found is None:
        return None
    fmt, config = found
    return {"quant_method": fmt.methods[0], **config}


def _with_side_files(original: Any) -> Any:
    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        stored = getattr(config, "quantization_config", None) or getattr(
            config.get_text_config(decoder=True), "quantization_config", None
        )
        if stored is None and getattr(config, "compression_config", None):  # compressed-tensors before 0.4
            config.quantization_config = {"quant_method": "compressed-tensors", **config.compression_config}
        elif stored is None and not kwargs.get("gguf_file"):
            found = side_config(_source.get())
            if found is not None:
                config.quantization_config = found
        elif isinstance(stored, dict) and "quant_method" not in stored:
            _name_method(stored)
        made = original(config, quantization_config, *args, **kwargs)
        _plain.set(made[0] is None)
        return made

    get_hf_quantizer._jq = True  # type: ignore[attr-defined]
    return get_hf_quantizer


def _name_method(stored: dict[str, Any]) -> None:
    """Old files leave the method out; transformers refuses them, `jq.formats` knows which it is."""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return
    name = _method_without_name("quantization_config", stored)
    if name != "None":
        stored["quant_method"] = name


def _with_other_names(original: Any) -> Any:
    @functools.wraps(original)
    def resolve(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = None if pretrained_model_name_or_path is None else _source.get()
        try:
            files, metadata = original(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            if folder is None or not os.path.isdir(folder) or kwargs.get("gguf_file"):
                raise
            files, metadata = _other_weights(Path(folder)), None
            if files is None:
                raise
        if _plain.get() and not kwargs.get("gguf_file"):
            _refuse_packed(files or [])
        return files, metadata

    return resolve


def _refuse_packed(files: list[str]) -> None:
    """Raises CheckpointError where a model without a quantizer is to take packed tensors: it would stay random."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        packed = [name for name in read_header(Path(file))[0] if name.endswith(PACKED)]
        if packed:
            raise CheckpointError(
                f"{file}: {packed[0]} is packed, but config.json has no quantization_config and no file beside the weights "
                f"({', '.join(SIDE_FILES[:3])}, ...) says how; load from a directory that has them all"
            )


def _other_weights(folder: Path) -> list[str] | None:
    """Weight files under other names than transformers', if they are safetensors."""
    try:
        files = find_weights(folder)
    except (CheckpointError, UnsupportedError):
        return None
    return [str(f) for f in files] if files and all(f.suffix == ".safetensors" for f in files) else None
