"""`jq.convert`: the same weights in another format, to the bit, or an error that says why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from jq.directory import checked
from jq.errors import UnsupportedError
from jq.formats import awq, gguf, stored_config, without_config
from jq.formats.integer_targets import target_of
from jq.formats.integers import Summary, integers_of
from jq.qtensor import QTensor, Source
from jq.quantize import linears
from jq.state import State, load_state, module_of, save

# Configs of the old format beside config.json, which would contradict the new one.
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")


def convert(
    src: Any, dst: str | os.PathLike | None, to: Any, *, advance: Callable[[int, int, str], None] | None = None
) -> State:
    """Re-encodes a quantized checkpoint so that every dequantized weight stays the same to the bit.

    GPTQ (v1, v2, planar), AWQ (gemm, gemv), compressed-tensors (pack-quantized), HQQ, torchao (intx), quanto (8 bits, or integer
    shifts) and EETQ (symmetric bytes by channel) convert into each other wherever the target can store bits, groups, zero points
    and order of the source. A GGUF's Q4_0, Q5_0 and Q8_0 become HQQ, torchao or compressed-tensors in float32. Each weight is
    compared before anything is written.

    Args:
      src: directory, file, hub id, or a State.
      dst: directory to write, None to write nothing.
      to: `jq.GPTQ(...)`, `jq.AWQ(...)`, `jq.CompressedTensors(...)`, or a format's name; options left out are those of
        the source.
      advance: called as advance(done, total, name) for each tensor.

    Returns:
      The converted State.

    Raises:
      UnsupportedError: the target cannot hold some weight; the message names it, the reason and what can.
      CheckpointError: damaged files, or a `dst` that cannot be written.
    """
    if dst is not None:
        checked(dst)
    state = src if isinstance(src, State) else load_state(src, lazy=True)
    label = str(state.path or "state")
    if state.container == "gguf":
        state = _model_of_gguf(state)
    keys = [key for key in state if isinstance(state[key], QTensor)]
    if not keys:
        raise UnsupportedError(f"{label}: holds no quantized weights; jq.quantize makes them")
    stored = stored_config(state.config, label)
    config = {} if stored is None else stored[1]
    first = state[keys[0]].source
    own = first.format if first is not None else ""
    config = config or _side_config(state)
    version = awq.renamed(to, [state[key] for key in keys])
    if version is None:
        target = target_of(to, [_summary(state[key], module_of(key)) for key in keys], config, own)
    _check_scaled_activations(state, to, label)
    tensors: dict[str, Any] = {}
    quantized = set(keys)
    for position, key in enumerate(state):
        if advance is not None:
            advance(position, len(state), key)
        value = state[key]
        if key in quantized and version is not None:
            value = value.replace(source=Source("awq", (("version", version),)))
        elif key in quantized:
            value = _converted(value, module_of(key), target.tensor)
        tensors[key] = value
    new = without_config(state.config)
    done = {module_of(key) for key in keys}
    skip = [name for name in linears(state) if name not in done]
    if "lm_head" not in done and "lm_head" not in skip:
        skip.append("lm_head")
    new["quantization_config"] = target.config(skip) if version is None else {**config, **awq.version_keys(version)}
    made = State(
        tensors,
        new,
        path=state.path,
        side_files={k: v for k, v in state.side_files.items() if k not in _OLD_CONFIGS},
    )
    if dst is not None:
        save(made, dst)
    return made


def _model_of_gguf(state: State) -> State:
    """The model of a GGUF under Hugging Face's names, with the tables of tokens as arrays: other formats' readers want them so."""
    model = gguf.model_state(state)
    tables = ("embed_tokens.weight", "lm_head.weight")
    tensors = {
        key: np.asarray(value.dequantize())
        if isinstance(value := model[key], QTensor) and key.endswith(tables)
        else value
        for key in model
    }
    return State(tensors, {**model.config, "torch_dtype": "float32"}, path=state.path, side_files=model.side_files)


def _summary(q: Any, name: str) -> Summary:
    return integers_of(q, name).summary


def _converted(q: Any, name: str, tensor: Any) -> QTensor:
    """The weight in the new storage, compared with the old one bit by bit."""
    new = tensor(integers_of(q, name)).to_jax()
    old_dense, new_dense = np.asarray(q.dequantize()), np.asarray(new.dequantize())
    word = f"u{old_dense.dtype.itemsize}"
    if old_dense.dtype != new_dense.dtype or not np.array_equal(old_dense.view(word), new_dense.view(word)):
        raise UnsupportedError(f"{name}: {q!r} would have other weights as {new!r}; nothing was written")
    return new


def _side_config(state: State) -> dict[str, Any]:
    """The quantization config of AutoGPTQ's side file."""
    for name in _OLD_CONFIGS:
        if name in state.side_files:
            return dict(json.loads(state.side_files[name]))
    return {}


def _check_scaled_activations(state: State, to: Any, label: str) -> None:
    """AWQ's ScaledActivation is a part of the model that other formats' readers do not know."""
    name = to if isinstance(to, str) else getattr(to, "format", None)
    scaled = [key for key in state if key.endswith((".act.scales", ".gelu_impl.scales"))]
    if scaled and name != "awq":
        raise UnsupportedError(
            f"{label}: {scaled[0]}: AWQ divides the activation by it; readers of {name} would leave that out. Only AWQ can hold "
            "this model"
        )
