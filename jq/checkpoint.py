"""A checkpoint directory (or file, or hub id): its config, its stored tensors by name, its side files; and the way back.

Reading is by memory map, tensor by tensor; where a checkpoint is written is `jq.directory`'s.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jq import safetensors_file, torch_file
from jq.errors import CheckpointError, JqWarning
from jq.safetensors_file import Entry, parse_json
from jq.torch_file import TorchTensor

# Weight-like files that lie beside a checkpoint and are no part of it: of adapters, trainers, oracles of tests.
NOT_WEIGHTS = (
    "reference.safetensors",
    "activations.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
)
# Files of hub repositories that nothing here reads: other frameworks' weights, Meta's own copy of Llama.
NOT_DOWNLOADED = ["*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite", "original/*", "onnx/*", "openvino/*"]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")
MAX_SIDE_FILE_BYTES = 64_000_000
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers is in memory.

    Fields:
      path: directory or file.
      config: config.json, {} where there is none.
      entries: stored tensors by name.
      files: file name that holds each tensor.
      metadata: safetensors metadata by file name.
      side_files: contents of the other files of the directory by name, config.json left out.
      objects: plain values of a torch file, or of SINQ's file beside an index, by dotted name.
      container: "safetensors", "torch" or "gguf".
    """

    path: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry | TorchTensor]
    files: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]]
    side_files: Mapping[str, bytes]
    objects: Mapping[str, Any]
    container: str

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def merged_metadata(self) -> dict[str, str]:
        return {k: v for file in self.metadata.values() for k, v in file.items()}

    def entry(self, name: str) -> Entry:
        """dtype, shape and place of a tensor."""
        found = self.entries[name]
        return found.entry if isinstance(found, TorchTensor) else found

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a stored tensor, in its stored dtype."""
        return self.entries[name].read()

    def side_json(self, name: str) -> dict[str, Any] | None:
        """A side file as a JSON object, None where it is not there."""
        raw = self.side_files.get(name)
        return None if raw is None else parse_json(raw, self.path / name, "file")


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """A local directory or file: the path itself, or the snapshot of a Hugging Face hub id.

    Raises:
      CheckpointError: neither a path nor a hub id that can be reached.
    """
    if not os.fspath(path_or_id):  # "" is "." for pathlib, and an empty variable for a shell
        raise CheckpointError("no checkpoint to read: the path is empty; give a directory, a file or a hub id")
    try:
        path = Path(path_or_id).expanduser()
    except RuntimeError as e:  # no such user
        raise CheckpointError(f"{path_or_id}: {e}") from e
    if os.path.exists(path):  # False for names that no file can have, where Path.exists raises
        return path
    text = str(path_or_id)
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such file or directory")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, revision=revision, ignore_patterns=NOT_DOWNLOADED))
    except Exception as e:  # the hub's client raises many kinds; each means the same here
        raise CheckpointError(
            f"{text}: no such directory, and the hub did not give it ({type(e).__name__}: {e}). Check the name, the "
            "network, or HF_HUB_OFFLINE"
        ) from e


def open_checkpoint(path_or_id: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint and checks its headers.

    Raises:
      CheckpointError: nothing to read, or a damaged, incomplete or hostile file; the message names it.
    """
    path = resolve(path_or_id, revision)
    folder = path if path.is_dir() else path.parent
    weights = find_weights(path)
    for file in weights:
        if file.exists() and not file.is_file():  # a pipe would be waited on for ever
            raise CheckpointError(f"{file}: is no regular file")
    suffix = weights[0].suffix
    if suffix == ".gguf":
        from jq.formats.gguf_reader import read_gguf

        entries, config, metadata = read_gguf(weights[0])
        return Checkpoint(
            path, config, entries, dict.fromkeys(entries, weights[0].name), {weights[0].name: metadata}, {}, {}, "gguf"
        )
    config_file = folder / "config.json"
    config = parse_json(config_file.read_bytes(), config_file, "file") if config_file.is_file() else {}
    # A file beside its config.json is a checkpoint's; one that lies alone may lie among anything.
    sides = _side_files(folder) if path.is_dir() or config_file.is_file() else {}
    if suffix == ".safetensors":
        found, files, metadata_by_file = _read_safetensors(folder, weights)
        return Checkpoint(
            path, config, found, files, metadata_by_file, sides, _plain_values(folder, sides), "safetensors"
        )
    tensors: dict[str, TorchTensor] = {}
    objects: dict[str, Any] = {}
    files = {}
    for file in weights:
        part, values = torch_file.flatten(torch_file.read(file), str(file))
        _check_unique(tensors, part, file)
        tensors.update(part)
        objects.update(values)
        files.update(dict.fromkeys(part, file.name))
    if not tensors:
        raise CheckpointError(f"{weights[0]}: holds no tensors")
    for name, tensor in tensors.items():
        safetensors_file.check_name(name, tensor.entry.file)
    if config.get("tie_word_embeddings"):
        _drop_tied_output(tensors)
    return Checkpoint(path, config, tensors, files, {}, sides, objects, "torch")


def _drop_tied_output(tensors: dict[str, TorchTensor]) -> None:
    """Forgets an lm_head that is the embedding's own storage: torch files name tied tensors twice, but store one."""
    head = tensors.get("lm_head.weight")
    if head is not None and any(t == head for name, t in tensors.items() if name != "lm_head.weight"):
        del tensors["lm_head.weight"]


def find_weights(path: Path) -> list[Path]:
    """The weight files of a directory in reading order: safetensors first, then torch files, then GGUF.

    Raises:
      CheckpointError: none, several that no index joins, or shards that are not all there.
    """
    if path.is_file():
        return [path]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, whole = path / f"{stem}.index.json", (path / stem).is_file()
        if index.is_file():
            files = _indexed(index)
            if not whole or path / stem in files:
                return files
            warnings.warn(
                f"{index}: names other files than {stem} beside it, which is read, as transformers does",
                JqWarning,
                stacklevel=2,
            )
        if whole:
            return [path / stem]
    for index in sorted(path.glob("*.safetensors.index.json")):
        return _indexed(index)
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        found = sorted(f for f in path.glob(pattern) if f.name not in NOT_WEIGHTS)
        # The same weights under Mistral's or Meta's own names.
        found = [f for f in found if not f.name.startswith("consolidated")] or found
        if found:
            _check_shards(found)
            if pattern != "*.safetensors" and len(found) > 1 and not all(_SHARD.fullmatch(f.name) for f in found):
                return _one_of(path, found)
            return found[:1] if pattern == "*.gguf" else found  # a GGUF's first part knows the others
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        base = parse_json(adapter.read_bytes(), adapter, "file").get("base_model_name_or_path")
        raise CheckpointError(
            f"{path}: holds an adapter, no model; load the model that it was trained on ({base!r:.80}) in its place, or "
            "merge the two with peft (merge_and_unload)"
        )
    raise CheckpointError(f"{path}: no *.safetensors, *.bin, *.pt or *.gguf file in it")


_SHARD = re.compile(r"(.*)(\d{5})-of-(\d{5})(\..*)")


def _check_shards(files: list[Path]) -> None:
    """Raises `CheckpointError` where names like model-00001-of-00002.safetensors tell of files that are missing."""
    names = {file.name for file in files}
    for file in files:
        if (match := _SHARD.fullmatch(file.name)) is not None:
            for number in range(1, int(match[3]) + 1):
                name = f"{match[1]}{number:05d}-of-{match[3]}{match[4]}"
                if name not in names:
                    raise CheckpointError(f"{file}: shard {name!r} is missing; the download is incomplete")


def _one_of(path: Path, found: list[Path]) -> list[Path]:
    names = ", ".join(f.name for f in found)
    raise CheckpointError(f"{path}: several weight files ({names}) and no index; give the path of the one to read")


def _indexed(index: Path) -> list[Path]:
    """Shards that an index file names; each must be a plain file name in the same directory."""
    weight_map = parse_json(index.read_bytes(), index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name or name == ".." or "\\" in name:
            raise CheckpointError(f"{index}: shard name {name!r:.80} is not a plain file name; refused")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not os.path.isfile(index.parent / name):
            raise CheckpointError(f"{index}: shard {name!r} is missing; the download is incomplete")
        files.append(index.parent / name)
    return files


def _read_safetensors(
    folder: Path, weights: list[Path]
) -> tuple[dict[str, Entry], dict[str, str], dict[str, dict[str, str]]]:
    entries: dict[str, Entry] = {}
    files: dict[str, str] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in weights:
        part, meta = safetensors_file.read_header(file)
        _check_unique(entries, part, file)
        entries.update(part)
        files.update(dict.fromkeys(part, file.name))
        metadata[file.name] = meta
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = parse_json(index.read_bytes(), index, "index").get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is a {type(weight_map).__name__}, expected an object")
        if not set(files.values()) & {name for name in weight_map.values() if isinstance(name, str)}:
            continue
        for name, file_name in weight_map.items():
            if files.get(name) != file_name:
                raise CheckpointError(f"{index}: {name}: should be in {file_name!r}, found in {files.get(name)!r}")
    return entries, files, metadata


def _check_unique(have: Mapping[str, Any], new: Mapping[str, Any], file: Path) -> None:
    twice = sorted(have.keys() & new.keys())
    if twice:
        raise CheckpointError(f"{file}: {twice[0]}: stored in another file too ({len(twice)} such tensors)")


def _side_files(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.iterdir()):
        if (
            not file.is_file()
            or file.name.startswith(".")
            or file.name == "config.json"
            or file.name.endswith(WEIGHT_SUFFIXES)
        ):
            continue
        if file.stat().st_size <= MAX_SIDE_FILE_BYTES:
            found[file.name] = file.read_bytes()
    return found


def not_carried(file: Path) -> bool:
    """Whether a file of a directory is no part of its checkpoint: adapters', trainers', and those too large for `side_files`."""
    if file.name.endswith(WEIGHT_SUFFIXES):
        return file.name in NOT_WEIGHTS
    return file.name != "config.json" and file.is_file() and file.stat().st_size > MAX_SIDE_FILE_BYTES


def _plain_values(folder: Path, sides: Mapping[str, bytes]) -> dict[str, Any]:
    """Values of a `*.index.json.meta.json`, {module: {"meta": {name: value}}}, by dotted name."""
    found: dict[str, Any] = {}
    for name, raw in sides.items():
        if name.endswith(".index.json.meta.json"):
            for module, values in parse_json(raw, folder / name, "file").items():
                meta = values.get("meta") if isinstance(values, dict) else None
                found |= {f"{module}.meta.{k}": v for k, v in (meta.items() if isinstance(meta, dict) else ())}
    return found


Stored = tuple[str, tuple[np.dtype, tuple[int, ...]], Callable[[], np.ndarray]]


def shard(tensors: list[Stored], files: Mapping[str, str], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Stored]]:
    """Distributes tensors over files: where `files` names one it is kept, else up to `max_bytes` a file."""
    if any(name in files for name, _, _ in tensors):
        last = next(iter(files.values()))
        placed: dict[str, list[Stored]] = {}
        for item in tensors:
            last = files.get(item[0], last)
            placed.setdefault(last, []).append(item)
        return placed
    groups: list[list[Stored]] = [[]]
    size = 0
    for item in tensors:
        nbytes = int(np.prod(item[1][1], dtype=np.int64)) * item[1][0].itemsize
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}
