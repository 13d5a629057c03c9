"""GGUF, llama.cpp's container: read, not written.

`jq.load_state` gives the file's own tensor names, blocks as quantized tensors; `to_huggingface` gives config.json,
tensors and tokenizer files under Hugging Face's names, which is what `jq.load` uses. The container is read in
`gguf_reader.py`, blocks become tensors in `gguf_blocks.py`, names and config are in `gguf_config.py`, the tokenizer in
`gguf_tokenizer.py`. Held against gguf 0.19.0.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jq.errors import CheckpointError, UnsupportedError
from jq.formats.base import Context, Format, Parts
from jq.formats.gguf_blocks import tensor_of
from jq.formats.gguf_config import Architecture, architecture_of, full_config, huggingface_name
from jq.formats.gguf_reader import read_gguf
from jq.formats.gguf_tokenizer import tokenizer_files
from jq.qtensor import QTensor
from jq.qtensor.codebook import Codebook
from jq.safetensors_file import Entry

if TYPE_CHECKING:
    from jq.state import State


@dataclasses.dataclass(frozen=True)
class Options:
    """A GGUF has no options: each tensor names its own type."""


INSTEAD = (
    "jq.convert(src, dst, to='hqq') writes a Hugging Face checkpoint of Q4_0, Q5_0 and Q8_0 weights, "
    "jq.quantize(jq.load_state(src), method) one of any others, rounded anew"
)


def _parse(config: Mapping[str, Any], ctx: Context) -> Options:
    return Options()


def _group(names: list[str], options: Options, ctx: Context) -> dict[str, dict[str, str]]:
    """Every tensor made of blocks, under its whole name."""
    return {name: {"": name} for name in names if name in ctx.kinds}


def _load(prefix: str, parts: Parts, options: Options, ctx: Context) -> QTensor:
    return tensor_of(parts[""], ctx.kinds[prefix], prefix)


def _dump(q: QTensor) -> Parts:
    raise UnsupportedError(f"GGUF is read, not written; {INSTEAD}")


def _detect(checkpoint: Any) -> dict | None:
    return {} if checkpoint.container == "gguf" else None


def to_huggingface(
    path: str | os.PathLike, *, packed: bool = False, dtype: Any = np.float16
) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """A GGUF file as a Hugging Face checkpoint: config, tensors by Hugging Face's names, tokenizer files.

    Args:
      path: the file, or the first of a split one.
      packed: keep blocks as QTensors (of dtype float32) instead of dense arrays.
      dtype: of dense arrays; each weight is dequantized in float32 and rounded once. float32 norms are rounded too.

    Returns:
      config: config.json.
      tensors: {name: numpy array or QTensor}; rows of q and k are in Hugging Face's order.
      files: {file name: contents}, tokenizer.json, tokenizer_config.json and chat_template.jinja as far as the
        metadata gives them.

    Raises:
      UnsupportedError: an architecture without a mapping.
      CheckpointError: a damaged file, or metadata that does not describe a model.
    """
    path = Path(path)
    entries, _, metadata = read_gguf(path)
    config, loaders, files = _model(metadata, entries, str(path))
    config["torch_dtype"] = str(np.dtype(dtype))
    tensors: dict[str, Any] = {}
    for name, load in loaders.items():
        value = load()
        tensors[name] = value if packed and isinstance(value, QTensor) else _dense(value).astype(dtype)
    return config, tensors, files


def model_state(state: State) -> State:
    """The State of a GGUF under Hugging Face's names, for `jq.load`.

    What the State holds in memory, its config included, is taken from there; the rest is read at each access. One that is
    named so already is given back.

    Raises:
      UnsupportedError: an architecture without a mapping.
    """
    from jq.state import State, _Deferred

    if "token_embd.weight" not in state or not state.metadata:
        return state
    entries = {name: state.entry(name) or _Held(state[name]) for name in state}
    config, loaders, files = _model(next(iter(state.metadata.values())), entries, str(state.path or "state"))
    tensors = {name: _Deferred(load) for name, load in loaders.items()}
    return State(tensors, {**config, **state.config}, path=state.path, side_files=files, container="gguf")


@dataclasses.dataclass(frozen=True)
class _Held:
    """A tensor of a State in memory, with what is asked of an `Entry`."""

    value: Any
    kind: ClassVar[str] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value.dtype)

    def read(self) -> Any:
        return self.value


def _model(
    metadata: Mapping[str, Any], entries: Mapping[str, Entry | _Held], label: str
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]], dict[str, bytes]]:
    """config, a loader for each tensor by Hugging Face's name, tokenizer files."""
    row = architecture_of(metadata, label)
    config = full_config(metadata, entries, label)
    config["torch_dtype"] = "bfloat16" if any(e.dtype.name == "bfloat16" for e in entries.values()) else "float16"
    loaders: dict[str, Callable[[], Any]] = {}
    for name, entry in entries.items():
        target = huggingface_name(name, row, label)
        if target is None:
            continue
        experts = range(entry.shape[0]) if "{}" in target else [None]
        for expert in experts:
            loaders[target.format(expert)] = functools.partial(_tensor, name, entry, row, config, expert)
    return config, loaders, tokenizer_files(metadata, label)


def _tensor(name: str, entry: Entry | _Held, row: Architecture, config: Mapping[str, Any], expert: int | None) -> Any:
    """One tensor as Hugging Face has it: QTensor or array, of one expert where experts are stacked."""
    raw = entry.read() if expert is None else entry.read()[expert]
    value = tensor_of(raw, entry.kind, name) if entry.kind else raw
    value = _hugging_face_rows(value, name, row, config)
    if row.norm_offset and name.endswith("norm.weight"):
        value = np.asarray(value, np.float32) - np.float32(row.norm_offset)
    return value


def _dense(value: Any) -> np.ndarray:
    return np.asarray(value.dequantize()) if isinstance(value, QTensor) else np.asarray(value)


def _hugging_face_rows(value: Any, name: str, row: Architecture, config: Mapping[str, Any]) -> Any:
    """Undoes llama.cpp's order of q and k rows: interleaved rotary pairs (dim/2, 2) -> halves (2, dim/2) of each head."""
    part = name.split(".")[-2] if name.startswith("blk.") else ""
    if not row.permuted or part not in ("attn_q", "attn_k"):
        return value
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    count = value.shape[-2] if isinstance(value, QTensor) else value.shape[0]
    if count % (2 * heads):
        raise CheckpointError(f"{name}: {count} rows are no multiple of 2 x {heads} heads")
    if isinstance(value, QTensor) and (value.source is None or value.source.format != "gguf"):
        value = value.dequantize()  # put there by a user; its arrays may not have a row for each output
    order = np.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return take_rows(value, order) if isinstance(value, QTensor) else value[order]


def take_rows(tensor: QTensor, order: np.ndarray) -> QTensor:
    """The rows `order` of a tensor [N, K] made by `tensor_of`: every array but a code table has a row for each of N."""
    if isinstance(tensor, Codebook):
        absmax = tensor.absmax
        absmax = take_rows(absmax, order) if isinstance(absmax, QTensor) else absmax[order]
        return tensor.replace(codes=tensor.codes[order], absmax=absmax)
    return tensor.arrays(lambda a: a[order])


FORMAT = Format(
    name="gguf",
    methods=("gguf",),
    title="GGUF (llama.cpp): every block type, read only",
    parse=_parse,
    markers=(),
    suffixes=(),
    load=_load,
    dump=_dump,
    detect=_detect,
    group=_group,
    join=lambda prefix, suffix: prefix,
    parameter=lambda prefix: True,
)
