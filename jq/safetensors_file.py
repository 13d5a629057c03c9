"""Reading and writing safetensors files: header checks, memory-mapped tensors, streamed writes.

Own code because the safetensors package cannot hand out F8 and E8M0 tensors to numpy and copies transposed arrays
wrongly. Format: 8 bytes little-endian header length, JSON header, raw little-endian data
(github.com/huggingface/safetensors, README "Format"); every MUST of it is checked here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 64
ALIGNMENT = 64  # of the data section in files that we write: lets JAX use the memory map without a copy

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "C64": np.complex64,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: where it lies and what it is.

    Fields:
      kind: a container's own type name (GGUF), else "".
      stamp: of the file when its header was read (`stamp_of`), () where nobody took one.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    kind: str = ""
    stamp: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A read-only view of the tensor in a memory map of its file."""
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        return self.mapped(self.nbytes).view(self.dtype).reshape(self.shape)

    def mapped(self, count: int) -> np.ndarray:
        """uint8[count], a read-only view of the file from `offset` on.

        Raises:
          CheckpointError: the file is gone, or another one than the header was read from.
        """
        try:
            with self.file.open("rb") as file:
                if self.stamp and stamp_of(file) != self.stamp:
                    raise CheckpointError(f"{self.file}: was written to since it was opened; open the checkpoint again")
                return np.asarray(np.memmap(file, np.uint8, "r", self.offset, (count,)))
        except OSError as e:
            raise CheckpointError(f"{self.file}: cannot be read: {e}") from e


def stamp_of(file: IO[bytes]) -> tuple[int, ...]:
    """What tells an open file from another one, or from itself before it was written to."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file.

    Raises:
      CheckpointError: anything that the format forbids; the message names file and tensor.
      UnsupportedError: a well-formed file with a dtype narrower than a byte.
    """
    try:
        with path.open("rb") as file:
            stamp = stamp_of(file)
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes, but the header alone should take {length + 8}; download it again"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes, more than the format's {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    header = parse_json(raw, path, "header")
    if raw[:1] != b"{":
        raise CheckpointError(f"{path}: header must begin with '{{', found {raw[:1]!r}; this is no safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    entries = {name: _entry(path, name, info, 8 + length, size, stamp) for name, info in header.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries, metadata


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object from bytes; duplicate keys, wrong encodings and other types are CheckpointErrors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {what}: key {twice!r} occurs twice; the file is damaged or hostile")
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:  # wrong encodings, wrong JSON, integers of thousands of digits
        raise CheckpointError(f"{path}: {what} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, found {type(value).__name__}")
    return value


def check_name(name: str, path: Path) -> None:
    """Refuses tensor names that look like file paths or hold control characters."""
    unprintable = any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
    if not name or "/" in name or "\\" in name or ".." in name or unprintable:
        raise CheckpointError(f"{path}: tensor name {name!r} looks like a path or holds control characters; refused")


def _entry(path: Path, name: str, info: Any, base: int, size: int, stamp: tuple[int, ...]) -> Entry:
    check_name(name, path)
    where = f"{path}: {name}"
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise CheckpointError(f"{where}: entry must have dtype, shape and data_offsets, found {info!r:.80}")
    dtype_name, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if dtype_name in _SUB_BYTE:
        raise UnsupportedError(f"{where}: dtype {dtype_name} (narrower than a byte) is not read; store it as U8 blocks")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape must be a list of non-negative integers, found {shape!r:.80}")
    full = math.prod(n for n in shape if n)  # numpy limits what an empty tensor may be, too
    if len(shape) > MAX_AXES or (0 in shape and full >= 2**60):
        raise CheckpointError(f"{where}: shape {shape!r:.80} is larger than any array can be")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be two rising integers, found {offsets!r:.80}")
    entry = Entry(DTYPES[dtype_name], tuple(shape), path, base + offsets[0], stamp=stamp)
    if base + offsets[1] > size:
        raise CheckpointError(
            f"{where}: ends at byte {base + offsets[1]}, the file has {size}; it is truncated: download it again"
        )
    if entry.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype_name}{list(shape)} takes {entry.nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}"
        )
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_cover(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Tensors must lie one after the other, without gaps or overlaps, to the end of the file."""
    end, last = base, "header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else f"leaves a gap of {entry.offset - end} bytes after"
            raise CheckpointError(f"{path}: {name}: {what} {last!r}; the format allows neither")
        end, last = entry.offset + entry.nbytes, name
    if end != size:
        raise CheckpointError(
            f"{path}: {size - end} bytes after the last tensor {last!r} that the header does not name"
        )


Lazy = Callable[[], np.ndarray]


def write(
    path: Path, tensors: Iterable[tuple[str, tuple[np.dtype, tuple[int, ...]], Lazy]], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Args:
      path: file to create.
      tensors: (name, (dtype, shape), function that returns the array); order is kept.
      metadata: strings for `__metadata__`.
    """
    items = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape), _ in items:
        check_name(str(name), Path(path.name))  # what the reader would refuse
        if dtype not in NAMES:
            raise UnsupportedError(f"{path.name}: {name}: dtype {dtype} has no safetensors name; cast it before saving")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (dtype, shape), load in items:
            array = np.ascontiguousarray(load())
            if array.dtype != dtype or array.size != math.prod(shape):
                raise CheckpointError(f"{path}: {name}: {array.dtype}{array.shape} written as {dtype}{shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
