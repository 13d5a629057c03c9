"""Reading torch.save files (.bin, .pt) without torch and without running anything that the file asks for.

A pickle can name any function to call. This reader answers a fixed list of names, all of which only rebuild tensors
and plain containers; every other name is refused before anything is called. Tensors are views of the memory-mapped
zip archive (torch >= 1.6 stores its members uncompressed).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError, UnsupportedError
from jq.safetensors_file import Entry, stamp_of

MAX_PICKLE_BYTES = 256_000_000
MAX_DEPTH = 64  # of dicts in dicts
MAX_VALUES = 2_000_000

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
}
_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "complex64": np.complex64,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}


class _Sealed:
    """What a pickle may hold but not change: its BUILD opcode would write fields past every check."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"the pickle changes a {type(self).__name__} that was rebuilt")


@dataclasses.dataclass(frozen=True)
class TorchDtype(_Sealed):
    """A pickled `torch.dtype`; `str()` is "torch.float16"."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclasses.dataclass(frozen=True)
class _StorageType(_Sealed):
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Rebuild(_Sealed):
    """A function that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@dataclasses.dataclass(frozen=True)
class _Storage(_Sealed):
    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class TorchTensor(_Sealed):
    """A tensor of a torch file: an `Entry` plus strides in elements."""

    entry: Entry
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor as a contiguous array or a read-only view of the file."""
        shape, dtype = self.entry.shape, self.entry.dtype
        if self.entry.nbytes == 0:
            return np.zeros(shape, dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, self.strides))
        flat = self.entry.mapped(span * dtype.itemsize).view(f"u{dtype.itemsize}")  # as_strided knows no float8_e5m2
        strides = tuple(s * dtype.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False).view(dtype)


def read(path: Path) -> Any:
    """The pickled object, with `TorchTensor` in place of tensors.

    Raises:
      CheckpointError: a damaged archive, or a pickle that names anything beyond tensors and plain containers.
      UnsupportedError: the format of torch < 1.6.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _read_archive(path, archive, stamp_of(file))
    except zipfile.BadZipFile as e:
        with path.open("rb") as file:
            old = file.read(2)[:1] == b"\x80"
        if old:
            raise UnsupportedError(
                f"{path}: written by torch < 1.6 or a plain pickle, which is not read; load it once with "
                "torch.load(weights_only=True) and save it as safetensors"
            ) from e
        raise CheckpointError(
            f"{path}: not a torch file (no zip archive): {e}; a checkpoint is a model's directory, or a .safetensors, "
            ".gguf or torch file that is whole"
        ) from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as e:  # a damaged archive raises nearly anything
        raise CheckpointError(f"{path}: the archive is damaged: {type(e).__name__}: {e}") from e


def _read_archive(path: Path, archive: zipfile.ZipFile, stamp: tuple[int, ...]) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise CheckpointError(f"{path}: the archive holds a name twice; the file is damaged or hostile")
    pickles = [name for name in members if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: expected one data.pkl, found {pickles}")
    root = pickles[0].removesuffix("data.pkl")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: data.pkl of {members[pickles[0]].file_size} bytes is more than {MAX_PICKLE_BYTES}"
        )
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError(f"{path}: not little-endian")
    with archive.open(pickles[0]) as stream:
        reader = _Reader(stream, path, root, members, stamp)
        try:
            return reader.load()
        except (CheckpointError, UnsupportedError):
            raise
        except Exception as e:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{path}: data.pkl is damaged: {type(e).__name__}: {e}") from e


class _Reader(pickle.Unpickler):
    def __init__(
        self, stream: Any, path: Path, root: str, members: dict[str, zipfile.ZipInfo], stamp: tuple[int, ...]
    ) -> None:
        super().__init__(stream)
        self.path, self.root, self.members, self.stamp = path, root, members, stamp

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        if module == "torch" and name in _DTYPES:
            return TorchDtype(name)
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(self._tensor),
            ("torch._utils", "_rebuild_tensor_v3"): _Rebuild(self._typed_tensor),
            ("torch._utils", "_rebuild_parameter"): _Rebuild(_parameter),
            ("torch", "Size"): _Rebuild(_size),
            ("torch.storage", "UntypedStorage"): _StorageType(np.dtype(np.uint8)),
        }
        found = allowed.get((module, name))
        if found is None:
            raise CheckpointError(
                f"{self.path}: the pickle asks for {module}.{name}; only tensors and plain containers are rebuilt. "
                "Refused: the file may be hostile"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        ok = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)
        if not ok or not isinstance(pid[2], str) or type(pid[4]) is not int or pid[4] < 0:
            raise CheckpointError(f"{self.path}: storage record {pid!r:.80} is damaged")
        return _Storage(pid[1].dtype, pid[2], pid[4])

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
        naturals = all(
            isinstance(v, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in v)
            for v in (shape, strides, (offset,))
        )
        if not isinstance(storage, _Storage) or not naturals or len(shape) != len(strides):
            raise CheckpointError(f"{self.path}: tensor record {(offset, shape, strides)!r:.80} is damaged")
        name = f"{self.root}data/{storage.key}"
        info = self.members.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor data {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: tensor data {name!r} is compressed; torch never does that. Refused")
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        available = min(storage.count, info.file_size // storage.dtype.itemsize)
        if offset + span > available or math.prod(shape) > available:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {shape} needs {offset + span} elements of {name!r}, which has {available}"
            )
        start = self._data_start(info) + offset * storage.dtype.itemsize
        if start + span * storage.dtype.itemsize > self.path.stat().st_size:  # sizes of the archive's directory lie
            raise CheckpointError(f"{self.path}: {name!r} lies beyond the end of the file; it is truncated or damaged")
        return TorchTensor(Entry(storage.dtype, tuple(shape), self.path, start, stamp=self.stamp), tuple(strides))

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> TorchTensor:
        """A tensor of a dtype that has no storage class of its own: bytes, with offset and strides in elements."""
        if not isinstance(storage, _Storage) or storage.dtype != np.uint8 or not isinstance(dtype, TorchDtype):
            raise CheckpointError(f"{self.path}: tensor record {(storage, dtype)!r:.80} is damaged")
        wide = np.dtype(_DTYPES[dtype.name])
        return self._tensor(_Storage(wide, storage.key, storage.count // wide.itemsize), offset, shape, strides)

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
        return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _size(values: Any) -> tuple[int, ...]:
    return tuple(values)


def flatten(value: Any, label: str = "torch file") -> tuple[dict[str, TorchTensor], dict[str, Any]]:
    """Splits nested containers into {dotted name: tensor} and {dotted name: plain value}.

    Raises:
      CheckpointError: containers within themselves or too deep or many, keys that are no names, a name that occurs twice.
    """
    tensors: dict[str, TorchTensor] = {}
    objects: dict[str, Any] = {}
    waiting, count = [(value, "", 0)], 0
    while waiting:
        item, name, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:  # also ends a container that holds itself
            raise CheckpointError(f"{label}: {name:.80}: containers nested without end; the file is damaged or hostile")
        if isinstance(item, dict) and item:
            for key, child in reversed(list(dict.items(item))):
                if not isinstance(key, str | int):
                    raise CheckpointError(f"{label}: {name:.80}: a key is a {type(key).__name__}, expected a name")
                waiting.append((child, f"{name}.{key}" if name else str(key), depth + 1))
        elif name in tensors or name in objects:
            raise CheckpointError(f"{label}: {name:.80}: occurs twice; the file is damaged or hostile")
        elif isinstance(item, TorchTensor):
            tensors[name] = item
        else:
            objects[name] = item
    return tensors, objects
