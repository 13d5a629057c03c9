"""What a checkpoint holds, without loading it: `inspect(path)` -> `Summary`.

Headers say names, shapes and sizes of everything. What a quantized module is (kind, groups, zero points) is only known
to its format, which has to see its tensors. Where all quantized modules are small together each is read, one after the
other; else one of each name pattern and set of stored shapes, and all others like it are counted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq.checkpoint import Checkpoint, open_checkpoint
from jq.formats import detect
from jq.formats.base import group_by_prefix
from jq.qtensor import QTensor

NUMBER = r"(?<![^.])[0-9]{1,9}(?![^.])"  # a whole word between points
LAYER = rf".*?\b(?:layers|blk|h|block)\.({NUMBER})\."
READ_ALL_BYTES = 256 * 2**20  # quantized modules up to this sum are all read: seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """Tensors of one name pattern that are alike.

    Fields:
      name: module path with `*` for numbers, e.g. "model.layers.*.mlp.up_proj"; where rows of one name differ, the
        layers of each: "model.layers.{0,2-5}.mlp.up_proj".
      count: how many there are.
      shape: of each: [out_features, in_features] of a quantized weight, else the stored shape.
      kind: e.g. "int4 asym, group 64", or the stored dtype of a dense tensor.
      tensor: class of the quantized tensor ("Affine", ...), "" for a dense one.
      bits_per_weight: stored bits (codes, scales, zeros, ...) for each weight.
      nbytes: stored bytes of all `count` together.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    kind: str
    tensor: str
    bits_per_weight: float
    nbytes: int

    @property
    def weights(self) -> int:
        """Number of weights of all `count` together."""
        return self.count * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A checkpoint described; `str()` is a table for people, `to_dict()` plain values for programs.

    Fields:
      path: what was read.
      container: "safetensors", "torch" or "gguf".
      architecture: model class or type of config.json, "" where it says none.
      method: quantization method, "" for a plain checkpoint.
      layers: number of decoder layers that the tensor names show.
      rows: quantized rows first, then dense ones.
      file_bytes: size of the weight files.
    """

    path: str
    container: str
    architecture: str
    method: str
    layers: int
    rows: tuple[Row, ...]
    file_bytes: int

    @property
    def quantized(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.tensor)

    @property
    def weights(self) -> int:
        """Number of weights, quantized and dense."""
        return sum(row.weights for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each quantized weight; of all tensors where none is quantized."""
        rows = self.quantized or self.rows
        return 8.0 * sum(row.nbytes for row in rows) / max(1, sum(row.weights for row in rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `jaxq inspect --json` prints them."""
        return {
            "path": self.path,
            "container": self.container,
            "architecture": self.architecture,
            "method": self.method or None,
            "layers": self.layers,
            "weights": self.weights,
            "quantized_modules": sum(row.count for row in self.quantized),
            "quantized_weights": sum(row.weights for row in self.quantized),
            "bits_per_weight": round(self.bits_per_weight, 4),
            "tensor_bytes": sum(row.nbytes for row in self.rows),
            "file_bytes": self.file_bytes,
            "rows": [
                {**dataclasses.asdict(row), "shape": list(row.shape), "bits_per_weight": round(row.bits_per_weight, 4)}
                for row in self.rows
            ],
        }

    def headline(self) -> str:
        """The facts of the whole checkpoint in one or two lines."""
        modules = sum(row.count for row in self.quantized)
        share = sum(row.weights for row in self.quantized) / max(1, self.weights)
        what = f"{self.method}: {modules} quantized modules, {100 * share:.0f} % of the weights" if modules else "dense"
        if self.method and not modules:
            what = f"{self.method}, but no quantized module"
        parts = [
            self.architecture or "unknown architecture",
            f"{self.layers} layers",
            f"{_count(self.weights)} weights",
        ]
        return (
            f"{self.path}\n{', '.join(parts)}; {what}; "
            f"{self.bits_per_weight:.2f} bits per weight; {size_text(self.file_bytes)} on disk ({self.container})"
        )

    def table_rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text, header first."""
        header = ("module", "count", "shape", "kind", "bits/weight", "size")
        body = [
            (
                r.name,
                str(r.count),
                "x".join(map(str, r.shape)) or "scalar",
                r.kind,
                f"{r.bits_per_weight:.2f}",
                size_text(r.nbytes),
            )
            for r in self.rows
        ]
        return [header, *body]

    def __str__(self) -> str:
        rows = self.table_rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        right = (False, True, True, False, True, True)
        lines = [
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip() for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.headline(), "", *lines])

    __repr__ = __str__


def size_text(count: float) -> str:
    """A number of bytes for people: 1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB")
    power = 0
    while count >= 1024 and power + 1 < len(units):
        count /= 1024
        power += 1
    return f"{count:.{min(power, 1)}f} {units[power]}"


def _count(number: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)


def inspect(path_or_id: str | os.PathLike, *, revision: str | None = None) -> Summary:
    """Describes a checkpoint: which layers, which kinds, bits per weight, groups, sizes.

    Args:
      path_or_id: directory, weight file, or Hugging Face hub id.
      revision: of the hub repository.

    Returns:
      A Summary. Memory use is that of the largest quantized module; see above for what is read.

    Raises:
      CheckpointError: damaged or incomplete files.
      FormatError: tensors that do not fit the quantization config.
      UnsupportedError: a quantization method that is not known.
    """
    ckpt = open_checkpoint(path_or_id, revision)
    method, quantized_rows, taken = _quantized_rows(ckpt)
    dense = _dense_rows(ckpt, taken)
    named = ckpt.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    numbers = {match[1] for name in ckpt.entries if (match := re.match(LAYER, name))}
    files = {_file_of(ckpt, name) for name in ckpt.entries}
    return Summary(
        path=str(path_or_id),
        container=ckpt.container,
        architecture=architecture if isinstance(architecture, str) else str(ckpt.config.get("model_type") or ""),
        method=method,
        layers=len(numbers),
        rows=(*quantized_rows, *dense),
        file_bytes=sum(file.stat().st_size for file in files),
    )


def _file_of(ckpt: Checkpoint, name: str) -> Path:
    return ckpt.entry(name).file


def _pattern(name: str) -> str:
    """The name with each number that is a whole word replaced by `*`."""
    return re.sub(NUMBER, "*", name)


def _quantized_rows(ckpt: Checkpoint) -> tuple[str, list[Row], set[str]]:
    """(method, a row per sort of quantized module, stored names that they take)."""
    from jq.state import context_of, format_errors

    found = detect(ckpt)
    if found is None:
        return "", [], set()
    fmt, quantization = found
    context = context_of(ckpt)
    names = list(ckpt.entries)
    with format_errors(ckpt, fmt, "quantization config"):
        options = fmt.parse(quantization, context)
        groups = fmt.group(names, options, context) if fmt.group else group_by_prefix(names, fmt.markers, fmt.suffixes)
    size = sum(ckpt.entry(name).nbytes for stored in groups.values() for name in stored.values())
    alike: dict[tuple, list[str]] = {}
    for prefix, stored in groups.items():
        entries = [(suffix, ckpt.entry(name)) for suffix, name in sorted(stored.items())]
        shapes = tuple((suffix, e.shape, str(e.dtype), e.kind) for suffix, e in entries)
        alike.setdefault((prefix if size <= READ_ALL_BYTES else _pattern(prefix), shapes), []).append(prefix)
    rows: dict[tuple, Row] = {}
    members: dict[tuple, list[str]] = {}
    taken: set[str] = set()
    for prefixes in alike.values():
        first = groups[prefixes[0]]
        parts = {suffix: ckpt.read(name) for suffix, name in first.items()}
        with format_errors(ckpt, fmt, prefixes[0]):
            tensor = fmt.load(prefixes[0], parts, options, context)
        if tensor is None:
            continue
        stored_names = [
            name for prefix in prefixes for suffix, name in groups[prefix].items() if not suffix.startswith("~")
        ]  # what modules share stays a tensor of its own
        taken.update(stored_names)
        row = _row(
            _pattern(prefixes[0].removesuffix(".weight")),
            len(prefixes),
            tensor,
            sum(ckpt.entry(name).nbytes for name in stored_names),
        )
        members.setdefault(_add(rows, row), []).extend(prefixes)
    return str(quantization.get("quant_method") or fmt.name), _told_apart(rows, members), taken


def _told_apart(rows: Mapping[tuple, Row], members: Mapping[tuple, list[str]]) -> list[Row]:
    """The rows; where several have one name, with the layers of each in it: "model.layers.{0,2-5}.mlp.up_proj"."""
    many = {name for name, count in Counter(row.name for row in rows.values()).items() if count > 1}
    made = []
    for key, row in rows.items():
        first = [re.findall(NUMBER, prefix) for prefix in members[key]]
        if row.name in many and all(len(numbers) == 1 for numbers in first):
            layers = _ranges(sorted(int(numbers[0]) for numbers in first))
            row = dataclasses.replace(row, name=row.name.replace("*", f"{{{layers}}}"))
        made.append(row)
    return made


def _ranges(numbers: list[int]) -> str:
    """[0, 2, 3, 4] -> "0,2-4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _row(pattern: str, count: int, tensor: QTensor, nbytes: int) -> Row:
    kind = type(tensor).__name__
    return Row(pattern, count, tuple(tensor.shape), tensor.describe(), kind, _bits(nbytes, count, tensor.shape), nbytes)


def _add(rows: dict[tuple, Row], row: Row) -> tuple:
    """Adds a row, or its count and bytes to the row of the same name, shape and kind; returns where it is."""
    key = (row.name, row.shape, row.kind, row.tensor)
    have = rows.get(key)
    if have is not None:
        count, nbytes = have.count + row.count, have.nbytes + row.nbytes
        row = dataclasses.replace(have, count=count, nbytes=nbytes, bits_per_weight=_bits(nbytes, count, row.shape))
    rows[key] = row
    return key


def _bits(nbytes: int, count: int, shape: tuple[int, ...]) -> float:
    return 8.0 * nbytes / max(1, count * math.prod(shape))


def _dense_rows(ckpt: Checkpoint, taken: set[str]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for name in ckpt.entries:
        if name not in taken:
            e = ckpt.entry(name)
            kind = e.kind or str(e.dtype)
            _add(rows, Row(_pattern(name), 1, tuple(e.shape), kind, "", _bits(e.nbytes, 1, e.shape), e.nbytes))
    return list(rows.values())
