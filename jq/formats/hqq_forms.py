"""The three stored forms of an HQQ module, brought to common terms (see `jq.formats.hqq`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq.errors import FormatError
from jq.formats.base import Context, Parts, expect_dtype, take

# packing name -> (bits, codes a word, word dtype)
PACKINGS: dict[str, tuple[int, int, type]] = {
    "8bit_u8": (8, 1, np.uint8),
    "4bit_u8": (4, 2, np.uint8),
    "3bit_32": (3, 10, np.uint32),
    "2bit_u8": (2, 4, np.uint8),
    "1bit_u8": (1, 8, np.uint8),
}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# Attributes of the safetensors form. Each is kept as it is stored; `shape` is computed.
_NUMBERS = ("nbits", "group_size", "axis")
_FLAGS = ("view_as_float", "quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta")
_TEXTS = ("packing", "compute_dtype", "unpack_view_dtype")
_MARKS = ("encoded_state_dict", "stores_quant_config")
ATTRIBUTES = (*_NUMBERS, *_FLAGS, *_TEXTS, *_MARKS)
_NESTED = tuple(f"meta.{k}" for k in ("scale", "zero", "zero_q", "scale_q", "zero_scale")) + tuple(
    f"meta.meta_{p}.{k}" for p in ("zero", "scale") for k in ("scale", "zero")
)
TENSORS = ("W_q", "scale", "zero", "shape", "zero_q", "scale_q", "zero_scale", *_NESTED)


@dataclasses.dataclass(frozen=True)
class Form:
    """A module in one of the three stored forms, brought to common terms.

    Fields:
      w_q: packed words, uint8 or uint32 [S, C].
      stored: the same as it lies in the file (maybe viewed as a float).
      view: name of that float dtype, or "".
      tensors: scale, zero, zero_q, ... by name without "meta.".
      nested: attributes of meta_zero and meta_scale.
      attributes: what the safetensors form stores beside, (name, (dtype, shape, values)).
    """

    w_q: np.ndarray
    stored: np.ndarray
    view: str
    packing: str
    axis: int
    group_size: int | None
    shape: tuple[int, int]
    dtype: str
    tensors: Parts
    nested: dict[str, dict[str, Any]]
    attributes: tuple[tuple[str, Any], ...]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def read_form(prefix: str, parts: Parts, context: Context) -> Form:
    """A module's tensors and attributes in one form, whichever of hqq's two ways of saving wrote them."""
    stored = take(parts, "W_q", prefix)
    objects = _objects_below(prefix, context)
    if "packing" in parts or not objects:
        values = _decode(prefix, parts)
        attributes = tuple((k, frozen(parts[k])) for k in ATTRIBUTES if k in parts)
        tensors: Parts = {k: parts[k] for k in ("scale", "zero") if k in parts}
        nested: dict[str, dict[str, Any]] = {}
    else:
        meta = "meta." if any(k.startswith("meta.") for k in objects) else ""
        values = {k.removeprefix(meta): v for k, v in objects.items() if "." not in k.removeprefix(meta)}
        attributes = encode(values)
        tensors = {k.removeprefix(meta): v for k, v in parts.items() if k != "W_q"}
        nested = {
            which: {k.rsplit(".", 1)[1]: v for k, v in objects.items() if k.startswith(f"{meta}meta_{which}.")}
            for which in ("zero", "scale")
        }
    dtype = str(values.get("compute_dtype", "float16")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise FormatError(f"{prefix}.compute_dtype: found {dtype!r}, expected {', '.join(DTYPES)}")
    packing = values.get("packing")
    if packing not in PACKINGS:
        raise FormatError(f"{prefix}.packing: found {packing!r}, expected {', '.join(PACKINGS)}")
    shape = tuple(int(v) for v in values.get("shape", ()))
    if len(shape) != 2 or min(shape) <= 0:
        raise FormatError(f"{prefix}.shape: found {shape}, expected (out_features, in_features)")
    group_size = values.get("group_size")
    word = np.dtype(PACKINGS[packing][2])
    w_q, view = as_words(stored, word, f"{prefix}.W_q")
    return Form(
        w_q, stored, view, packing, int(values.get("axis", 0)), None if group_size is None else int(group_size),
        (shape[0], shape[1]), dtype, tensors, nested, attributes,
    )  # fmt: skip


def as_words(stored: np.ndarray, word: np.dtype, name: str) -> tuple[np.ndarray, str]:
    """W_q as unsigned words, and the name of the float dtype that it is stored as ("" if none)."""
    if stored.ndim != 2:
        raise FormatError(f"{name}: found shape {stored.shape}, expected a matrix of packed codes")
    signed = np.dtype(f"i{word.itemsize}")
    if stored.dtype in (word, signed):
        return np.ascontiguousarray(stored).view(word), ""
    expect_dtype(stored, (signed if word.itemsize == 4 else word, *DTYPES.values()), name)
    if stored.shape[1] * stored.dtype.itemsize % word.itemsize:
        raise FormatError(f"{name}: rows of {stored.shape[1]} {stored.dtype} do not hold whole {word} words")
    return np.ascontiguousarray(stored).view(word), str(stored.dtype)


def _objects_below(prefix: str, context: Context) -> dict[str, Any]:
    """Plain values of a module in qmodel.pt, by name below the module."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in context.objects.items() if k.startswith(start)}


def _decode(prefix: str, parts: Parts) -> dict[str, Any]:
    """Attributes of the safetensors form as Python values."""
    values: dict[str, Any] = {}
    for key in _TEXTS:
        if key in parts:
            expect_dtype(parts[key], (np.uint8,), f"{prefix}.{key}")
            values[key] = parts[key].tobytes().decode("latin-1")
    for key in (*_NUMBERS, *_FLAGS):
        if key in parts:
            if parts[key].size != 1:
                raise FormatError(f"{prefix}.{key}: found shape {parts[key].shape}, expected one number")
            values[key] = parts[key].reshape(-1)[0].item()
    take(parts, "packing", prefix, why="The safetensors form of hqq stores every attribute of a module as a tensor.")
    values["shape"] = tuple(int(v) for v in take(parts, "shape", prefix).reshape(-1))
    return values


def encode(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Attributes of qmodel.pt as the safetensors form stores them; quantized zeros are stored dequantized."""
    found: dict[str, Any] = {}
    for key in _NUMBERS:
        value = values.get(key)
        if value is not None:
            found[key] = np.float32(value) if isinstance(value, float) else np.int32(value)
    defaults = {"channel_wise": True, "optimize": True, "round_zero": values.get("nbits") == 4}
    for key in _FLAGS:
        kept = (
            False if key in ("quant_zero", "quant_scale", "offload_meta") else values.get(key, defaults.get(key, False))
        )
        found[key] = np.uint8(bool(kept))
    packing = str(values.get("packing"))
    view = "torch.int32" if packing == "3bit_32" else "torch.uint8"
    texts = {
        "packing": packing,
        "compute_dtype": str(values.get("compute_dtype", "torch.float16")),
        "unpack_view_dtype": view,
    }
    for key, text in texts.items():
        found[key] = np.frombuffer(text.encode("latin-1"), np.uint8)
    found |= {key: np.uint8(1) for key in _MARKS}
    return tuple((k, frozen(np.asarray(found[k]))) for k in ATTRIBUTES if k in found)


def frozen(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """A small tensor as a hashable value."""
    array = np.asarray(array)
    return str(array.dtype), tuple(array.shape), array.tobytes()


def thawed(value: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    dtype, shape, raw = value
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)
