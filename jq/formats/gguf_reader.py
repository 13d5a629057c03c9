"""The GGUF container: metadata and tensor entries of a file (or of all parts of a split file).

Layout (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3), little-endian: "GGUF", version u32, tensor count u64,
key count u64; the keys, each a string, a type u32 and a value; the tensor infos, each a string, the number of
dimensions u32, the dimensions u64 with the innermost first, a type u32 and an offset u64 into the data section, which
starts at the next multiple of `general.alignment` (32). A string is a length u64 and UTF-8 bytes.

Own code and not the gguf package's reader: that one keeps Python objects for each element of each array (2.4 s for a
vocabulary of 49,152, this one takes 0.1 s), and on a damaged file it raises whatever numpy raises.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jq.errors import CheckpointError, UnsupportedError
from jq.formats.gguf_types import NARROW, TYPES
from jq.safetensors_file import Entry, check_name, stamp_of

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_DEPTH = 4  # arrays of arrays; no known writer nests them at all
DEFAULT_ALIGNMENT = 32

# Types whose elements are plain numbers; every other type of `TYPES` is made of blocks.
PLAIN: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F64": np.float64,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
    }.items()
}

# metadata value type -> struct format; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """A position in a mapped file; reading past the end is a CheckpointError that says where."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (at byte {self.at} of {self.size}); download the file again")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"truncated or damaged: {what} takes {count} bytes, {self.size - self.at} are left")

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        form = "<" + form
        size = struct.calcsize(form)
        self.need(size, what)
        values = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return values

    def raw(self, count: int, what: str) -> bytes:
        self.need(count, what)
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def string(self, what: str) -> str:
        (length,) = self.unpack("Q", what)
        try:
            return self.raw(length, what).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} is not UTF-8") from e

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings; bytes that are not UTF-8 are replaced (old vocabularies hold such tokens)."""
        self.need(8 * count, what)
        data, at, size, found = self.data, self.at, self.size, []
        for _ in range(count):
            if at + 8 > size:
                break
            length = int.from_bytes(data[at : at + 8], "little")
            at += 8 + length
            found.append(data[at - length : at].decode("utf-8", "replace"))
        if at > size or len(found) < count:
            raise self.fail(f"truncated or damaged: {what} runs past the end")
        self.at = at
        return found


def read_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, Any], dict[str, Any]]:
    """Entries, Hugging Face config and metadata of a GGUF file; of all parts where it is the first of a split file.

    Returns:
      entries: by tensor name; `kind` is the block type ("Q4_K") and the entry uint8 [..., N, bytes of a row], or ""
        for plain numbers in their own dtype. Shapes have the innermost dimension last.
      config: what the metadata says in terms of config.json, {} for an architecture that is not known.
      metadata: the file's keys.

    Raises:
      CheckpointError: truncated, damaged or hostile.
      UnsupportedError: a version or tensor type that is not read.
    """
    from jq.formats.gguf_config import config_of

    entries, metadata = read_file(path)
    for part in _other_parts(path, metadata):
        more, _ = read_file(part)
        twice = sorted(entries.keys() & more.keys())
        if twice:
            raise CheckpointError(f"{part}: {twice[0]}: stored in another part too")
        entries.update(more)
    if not entries:
        raise CheckpointError(f"{path}: holds no tensors")
    try:
        config = config_of(metadata, entries)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: the metadata describes no model ({type(e).__name__}: {e}); it is damaged"
        ) from e
    return entries, config, metadata


def read_file(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries and metadata of one file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found, metadata = _read(_Cursor(data, path))
            stamp = stamp_of(file)
            return {name: dataclasses.replace(entry, stamp=stamp) for name, entry in found.items()}, metadata
    except (OSError, ValueError) as e:  # mmap of an empty file is a ValueError
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {e}") from e


def _read(cursor: _Cursor) -> tuple[dict[str, Entry], dict[str, Any]]:
    magic = cursor.raw(4, "the file's magic")
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.path}: starts with {magic!r}, not with b'GGUF': no GGUF file")
    version, tensors, keys = cursor.unpack("IQQ", "the header")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "a big-endian file" if swapped in VERSIONS else f"version {version}"
        raise UnsupportedError(
            f"{cursor.path}: {why}; little-endian versions 2 and 3 are read. llama.cpp's gguf_convert_endian.py "
            "and llama-quantize rewrite others"
        )
    # Every key takes 13 bytes or more and every tensor 32: a count that cannot fit is refused before the loops.
    if keys * 13 + tensors * 32 > cursor.size:
        raise cursor.fail(f"truncated or damaged: {keys} keys and {tensors} tensors do not fit the file")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.string("a metadata key")
        if name in metadata:
            raise cursor.fail(f"metadata key {name!r} occurs twice")
        (kind,) = cursor.unpack("I", f"the type of metadata key {name!r}")
        metadata[name] = _value(cursor, kind, name, 0)
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    return _entries(cursor, infos, start), metadata


def _value(cursor: _Cursor, kind: int, name: str, depth: int) -> Any:
    what = f"metadata key {name!r}"
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind], what)[0]
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY or depth >= MAX_DEPTH:
        raise cursor.fail(f"{what} has unknown type {kind}" if kind != _ARRAY else f"{what} nests arrays too deep")
    inner, count = cursor.unpack("IQ", what)
    if inner in _SCALARS:
        dtype = np.dtype("?" if _SCALARS[inner] == "?" else "<" + _SCALARS[inner])
        cursor.need(count * dtype.itemsize, what)
        return np.frombuffer(cursor.raw(count * dtype.itemsize, what), dtype).tolist()
    if inner == _STRING:
        return cursor.strings(count, what)
    cursor.need(count * 12, what)  # the least that an array takes
    return [_value(cursor, inner, name, depth + 1) for _ in range(count)]


Info = tuple[str, tuple[int, ...], int, int]  # name, shape (innermost last), type, offset


def _tensor_info(cursor: _Cursor) -> Info:
    name = cursor.string("a tensor name")
    check_name(name, cursor.path)
    (count,) = cursor.unpack("I", f"tensor {name!r}")
    if count > MAX_DIMENSIONS:
        raise cursor.fail(f"{name}: {count} dimensions, the format has at most {MAX_DIMENSIONS}")
    shape = cursor.unpack(f"{count}Q", f"tensor {name!r}")[::-1]
    kind, offset = cursor.unpack("IQ", f"tensor {name!r}")
    return name, shape, kind, offset


def _entries(cursor: _Cursor, infos: list[Info], start: int) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    offsets = sorted(start + offset for *_, offset in infos)
    for name, shape, number, offset in infos:
        if name in found:
            raise cursor.fail(f"{name}: stored twice")
        after = bisect.bisect_right(offsets, start + offset)
        room = (offsets[after] if after < len(offsets) else cursor.size) - start - offset
        found[name] = _entry(cursor, name, shape, number, start + offset, room)
    end, last = start, "the header"
    for name, entry in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            raise cursor.fail(f"{name}: overlaps {last}")
        end, last = entry.offset + entry.nbytes, name
    return found


def _entry(cursor: _Cursor, name: str, shape: tuple[int, ...], number: int, offset: int, room: int) -> Entry:
    """The entry of a tensor that has `room` bytes up to the next one, or to the end of the file."""
    if number not in TYPES:
        raise UnsupportedError(
            f"{cursor.path}: {name}: tensor type {number} is not known; known: "
            f"{', '.join(t.name for t in TYPES.values())}. llama-quantize of llama.cpp can rewrite the file"
        )
    kind = TYPES[number]
    if kind.name in NARROW and math.prod(shape) * kind.bytes // kind.elements > room:
        kind = NARROW[kind.name]
    if math.prod(shape) * kind.bytes // kind.elements > cursor.size:
        raise cursor.fail(f"{name}: {kind.name} of shape {shape} does not fit the file; it is truncated or damaged")
    if kind.name in PLAIN:
        entry = Entry(PLAIN[kind.name], shape, cursor.path, offset)
    else:
        if not shape or 0 in shape or shape[-1] % kind.elements:
            raise cursor.fail(f"{name}: shape {shape}, but rows of {kind.name} are blocks of {kind.elements} elements")
        entry = Entry(
            np.dtype(np.uint8),
            (*shape[:-1], shape[-1] // kind.elements * kind.bytes),
            cursor.path,
            offset,
            kind.name,
        )
    if offset + entry.nbytes > cursor.size:
        raise cursor.fail(
            f"{name}: ends at byte {offset + entry.nbytes}, the file has {cursor.size}; it is truncated or damaged"
        )
    return entry


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files that follow the first part of a split model ("name-00001-of-00003.gguf")."""
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return []
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is part of a model of {count} files, but its name does not end in -00001-of-{count:05d}.gguf"
        )
    name: Callable[[int], str] = lambda i: f"{match[1]}-{i:05d}-of-{count:05d}.gguf"
    if int(match[2]) != 1:
        raise CheckpointError(f"{path}: is part {int(match[2])} of {count}; give the first one, {name(1)}")
    parts = [path.with_name(name(i)) for i in range(2, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part}: missing; it is one of the {count} files of the model")
    return parts
