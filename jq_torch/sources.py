"""Checkpoints that do not say in config.json that they are quantized: old AutoGPTQ and others with a side file.

`from_pretrained` looks for `quantization_config` in config.json and for `model.safetensors`. Files of AutoGPTQ before
0.8 have quantize_config.json and `gptq_model-4bit-128g.safetensors`; quanto has quanto_qmap.json. `jq.formats.detect`
knows them; here transformers is told.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from transformers import modeling_utils

from jq.checkpoint import find_weights, open_checkpoint
from jq.errors import CheckpointError, UnsupportedError
from jq.formats import _method_without_name, detect


def patch(state: Any) -> None:
    """Wraps the two functions by which from_pretrained finds config and files; `state` undoes it."""
    if getattr(modeling_utils.get_hf_quantizer, "_jq", False):
        return
    state.patch(modeling_utils, "get_hf_quantizer", _with_side_files(modeling_utils.get_hf_quantizer))
    state.patch(
        modeling_utils,
        "_get_resolved_checkpoint_files",
        _with_other_names(modeling_utils._get_resolved_checkpoint_files),
    )


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
            found = side_config(str(getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "")))
            if found is not None:
                config.quantization_config = found
        elif isinstance(stored, dict) and "quant_method" not in stored:
            _name_method(stored)
        return original(config, quantization_config, *args, **kwargs)

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
        folder = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        try:
            return original(pretrained_model_name_or_path, *args, **kwargs)
        except OSError:
            if folder is None or not os.path.isdir(folder) or kwargs.get("gguf_file"):
                raise
            files = _other_weights(Path(folder))
            if files is None:
                raise
            return files, None

    return resolve


def _other_weights(folder: Path) -> list[str] | None:
    """Weight files under other names than transformers', if they are safetensors."""
    try:
        files = find_weights(folder)
    except (CheckpointError, UnsupportedError):
        return None
    return [str(f) for f in files] if files and all(f.suffix == ".safetensors" for f in files) else None
