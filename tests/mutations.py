"""Damaged copies of good checkpoints: one module of a reference directory, with tensors or config changed at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq import checkpoint, safetensors_file

JUNK = [None, True, -1, 0, 1, 3, 7, 17, 2**40, 1.5, float("nan"), "", "x", "int4", [], ["x"], {}, {"x": 1}, [[-1]]]


def seed_of(
    folder: Path, modules: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, bytes], dict[str, str]]:
    """Tensors of the first quantized modules of a directory, its config, side files and metadata."""
    ckpt = checkpoint.open_checkpoint(folder)
    names = [n for n in ckpt.entries if "layers.0." in n and ("q_proj" in n or "experts" in n)] or list(ckpt.entries)[
        :6
    ]
    if modules > 1:
        names += [
            n for n in ckpt.entries if "layers.0." in n and ("down_proj" in n or "k_proj" in n) and n not in names
        ]
    tensors = {name: np.array(ckpt.read(name)) for name in names}
    sides = {k: v for k, v in ckpt.side_files.items() if k.endswith(".json")}
    return tensors, dict(ckpt.config), sides, ckpt.merged_metadata


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    sides: Mapping[str, bytes],
    metadata: Mapping[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    items = [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()]
    safetensors_file.write(folder / "model.safetensors", items, metadata)
    (folder / "config.json").write_text(json.dumps(config))
    for name, raw in sides.items():
        (folder / name).write_bytes(raw)


def mutate(rng: random.Random, tensors: dict[str, np.ndarray], config: dict[str, Any], sides: dict[str, bytes]) -> str:
    """Changes one thing in place; returns what."""
    kind = rng.choice(["drop", "dtype", "shape", "bytes", "config", "config", "side", "rename"])
    name = rng.choice(sorted(tensors)) if tensors else ""
    if kind == "config" or not name:
        return _mutate_json(rng, config.setdefault("quantization_config", {}) if rng.random() < 0.8 else config)
    if kind == "side":
        if not sides:
            return "nothing"
        file = rng.choice(sorted(sides))
        content = json.loads(sides[file])
        done = _mutate_json(rng, content) if isinstance(content, dict) else "nothing"
        sides[file] = json.dumps(content).encode()
        return f"{file}: {done}"
    array = tensors[name]
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[name + rng.choice(["x", ".weight", "_2"])] = tensors.pop(name)
    elif kind == "dtype":
        dtype = rng.choice([d for n, d in sorted(safetensors_file.DTYPES.items()) if n not in ("C64", "BOOL")])
        raw = array.reshape(-1).view(np.uint8)
        raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
        tensors[name] = raw.view(dtype) if rng.random() < 0.5 else np.zeros(array.shape, dtype)
    elif kind == "shape":
        shape = list(array.shape) or [1]
        axis = rng.randrange(len(shape))
        shape[axis] = max(0, rng.choice([0, 1, shape[axis] - 1, shape[axis] + 1, shape[axis] * 2, shape[axis] // 2]))
        tensors[name] = np.resize(array, shape) if array.size and np.prod(shape) < 1e7 else np.zeros(shape, array.dtype)
        if rng.random() < 0.3:
            tensors[name] = tensors[name].reshape(-1)
    else:
        raw = np.array(array).reshape(-1).view(np.uint8)
        for _ in range(rng.randrange(1, 9)):
            if len(raw):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensors[name] = raw.view(array.dtype).reshape(array.shape)
    return f"{kind} {name}"


def _mutate_json(rng: random.Random, node: dict[str, Any]) -> str:
    """Removes, replaces or adds a value somewhere inside a JSON object."""
    here: Any = node
    path = []
    while isinstance(here, dict) and here:
        key = rng.choice(sorted(here))
        path.append(key)
        if isinstance(here[key], dict) and here[key] and rng.random() < 0.7:
            here = here[key]
            continue
        what = rng.choice(["remove", "junk", "junk", "add"])
        if what == "remove":
            del here[key]
        elif what == "junk":
            here[key] = copy.deepcopy(rng.choice(JUNK))
        else:
            here[f"new_{key}"] = copy.deepcopy(rng.choice(JUNK))
        return f"config {'.'.join(path)} {what}"
    return "nothing"
