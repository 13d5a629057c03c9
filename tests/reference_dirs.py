"""Finds checkpoints that the original libraries wrote, and reads their oracle files without going through jq's readers."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
NOT_CHECKPOINT = ("reference.safetensors", "activations.safetensors")
_PLAIN = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "U16": "u2",
}
_PLAIN |= {"U32": "u4", "U64": "u8", "BOOL": "?"}
_SPECIAL = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@functools.cache
def directories() -> dict[str, Path]:
    """{name: directory} of every reference directory.

    Those under the paths of JAXQ_REFERENCE (os.pathsep between them) where it is set; else of ../shared/reference, where
    that is, and of tests/reference.
    """
    roots = [Path(p) for p in os.environ.get("JAXQ_REFERENCE", "").split(os.pathsep) if p]
    roots = roots or [HERE.parent.parent / "shared" / "reference", HERE / "reference"]
    found: dict[str, Path] = {}
    for root in roots:
        if root.is_dir():
            for folder in sorted(root.iterdir()):
                if (folder / "reference.json").is_file():
                    found.setdefault(folder.name, folder)
    return found


def raw(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]:
    """A minimal second reader: {name: (dtype, shape, bytes)} and metadata of a safetensors file."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    tensors = {
        name: (
            info["dtype"],
            tuple(info["shape"]),
            blob[base + info["data_offsets"][0] : base + info["data_offsets"][1]],
        )
        for name, info in header.items()
    }
    return tensors, metadata


def array(entry: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    dtype, shape, data = entry
    return np.frombuffer(data, _SPECIAL.get(dtype) or _PLAIN[dtype]).reshape(shape)


def stored(folder: Path) -> tuple[dict[str, tuple], dict[str, str]]:
    """Every tensor and all metadata of a directory's weight files."""
    tensors: dict[str, tuple] = {}
    metadata: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in NOT_CHECKPOINT:
            part, meta = raw(file)
            tensors.update(part)
            metadata.update(meta)
    return tensors, metadata


@functools.lru_cache(maxsize=4)
def oracle(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """reference.safetensors as arrays and reference.json."""
    file = folder / "reference.safetensors"
    tensors = {k: array(v) for k, v in raw(file)[0].items()} if file.exists() else {}
    return tensors, json.loads((folder / "reference.json").read_text())


def bits(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a)
    return a.view(f"u{a.dtype.itemsize}") if a.dtype.kind not in "iub" else a


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 error in float32; infinite for another shape."""
    got, want = np.asarray(got, np.float32), np.asarray(want).astype(np.float32)
    if got.shape != want.shape:
        return float("inf")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
