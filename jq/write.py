"""The files of a State: weights in their shards, index, metadata, config.json and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jq import safetensors_file
from jq.checkpoint import Stored, shard
from jq.dump import DumpOnce, dump_entry
from jq.errors import CheckpointError
from jq.formats import table
from jq.qtensor import QTensor
from jq.state import State

INDEX = "model.safetensors.index.json"


def write_state(state: State, folder: Path) -> None:
    """Writes a State's files into an existing directory (not atomic; `save` is).

    Raises:
      CheckpointError: a file's name that is none, or a config that JSON cannot hold.
    """
    for name in (*state.files.values(), *state.side_files):
        if Path(name).name != name:
            raise CheckpointError(f"{folder.name}: {name!r:.80} is not a plain file name; refused")
    items: list[Stored] = []
    formats: set[str] = set()
    for key in state:
        value = state[key]
        if isinstance(value, QTensor):
            formats |= {value.source.format} if value.source else set()
            # Names and shapes first, bytes when they are written: of each module what its file's order leaves to write.
            cell = DumpOnce(state, key)
            items += [(name, (a.dtype, a.shape), cell.reader(name)) for name, a in dump_entry(key, value)]
        else:
            array = np.asarray(value) if not isinstance(value, jax.Array) else value
            items.append((key, (np.dtype(array.dtype), tuple(array.shape)), partial(_as_numpy, state, key)))
    position = {name: i for i, name in enumerate(state.order)}
    items.sort(key=lambda item: position.get(item[0], len(position)))
    placed = shard(items, state.files)
    fresh = _fresh_metadata(state, formats)
    for file, group in placed.items():
        metadata = state.metadata.get(file) if state.metadata else {"format": "pt", **fresh}
        safetensors_file.write(folder / file, group, metadata or {})
    sides = {**_fresh_files(state, formats), **state.side_files}
    # loaders find other names, and files that go with an index, by the index alone
    alone = (folder / "model.safetensors").exists() and not any(name.startswith(INDEX) for name in sides)
    if len(placed) > 1 or not alone:
        _write_index(folder, placed)
    for name, raw in sides.items():
        (folder / name).write_bytes(raw)
    if state.config:
        (folder / "config.json").write_text(_json(state.config), encoding="utf-8")


def _json(config: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only escape
        return json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(f"config.json: cannot be written: {e}") from e
    return text


def _as_numpy(state: State, key: str) -> np.ndarray:
    return np.asarray(state[key])


def _fresh_metadata(state: State, formats: Iterable[str]) -> dict[str, str]:
    """Metadata that a format wants beside newly quantized tensors (none for most)."""
    if state.metadata:
        return {}
    hooks = [hook for name in sorted(formats) if (hook := table()[name].metadata) is not None]
    return {key: text for hook in hooks for key, text in hook(state).items()}


def _fresh_files(state: State, formats: Iterable[str]) -> dict[str, bytes]:
    """Files that a format wants beside newly quantized tensors (none for most)."""
    if state.files:
        return {}
    hooks = [hook for name in sorted(formats) if (hook := table()[name].beside_weights) is not None]
    return {name: raw for hook in hooks for name, raw in hook(state).items()}


def _write_index(folder: Path, placed: Mapping[str, list[Stored]]) -> None:
    total = sum(int(np.prod(s, dtype=np.int64)) * d.itemsize for group in placed.values() for _, (d, s), _ in group)
    weight_map = {name: file for file, group in placed.items() for name, _, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
