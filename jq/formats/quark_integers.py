"""Quark's integers of 2, 3, 4 and 8 bits: packing, scales and zero points (see `jq.formats.quark`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jq import bits as _bits
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Parts, expect_dtype, expect_shape, take
from jq.formats.quark_config import Spec
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.affine import pack_zeros

FLOATS = (np.float16, "bfloat16", np.float32)
INTEGERS = {
    "int2": (2, True),
    "uint2": (2, False),
    "int3": (3, True),
    "int4": (4, True),
    "uint4": (4, False),
    "int8": (8, True),
    "uint8": (8, False),
}
# Bit position of code i of a word of eight, with and without "reorder".
SHIFTS = {True: (0, 16, 4, 20, 8, 24, 12, 28), False: (0, 4, 8, 12, 16, 20, 24, 28)}


def load_integers(prefix: str, parts: Parts, spec: Spec, reorder: bool, fields: dict[str, Any]) -> Affine:
    """A module of integers, int32 words or int8 rows, with scales and zero points as the settings group them."""
    bits, signed = INTEGERS[spec.dtype]
    last = "_2" if spec.first is not None else ""
    scale = take(parts, f"weight_scale{last}", prefix)
    zero = take(parts, f"weight_zero_point{last}", prefix, why="Quark stores zero points of symmetric layers too.")
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    grouped = spec.qscheme == "per_group"
    if grouped and scale.ndim != 2:
        raise FormatError(f"{prefix}.weight_scale: found shape {tuple(scale.shape)}, expected (groups, out_features)")
    stored = unpacked(parts["weight"], f"{prefix}.weight", spec.dtype, reorder)
    if grouped:
        stored = stored[:, : scale.shape[1]].T
    n, k = stored.shape
    group = group_of(prefix, spec, k)
    scales, grouping = scales_of(prefix, scale.T if grouped else scale, spec, group, n, k)
    zeros = _zeros(prefix, zero, spec, bits, signed, reorder, scales.shape)
    offset = 1 << (bits - 1) if signed else 0
    symmetric = zeros.dtype.kind != "f" and bool((zeros == 0).all())
    codes = (stored ^ offset) - offset if symmetric else stored ^ offset
    if spec.first is not None:
        whole = take(parts, "weight_scale", prefix)
        expect_dtype(whole, FLOATS, f"{prefix}.weight_scale")
        if whole.size != 1 or not symmetric:
            raise UnsupportedError(f"{prefix}: two stages with zero points, or a first one in groups, are not read")
        made = Affine.make(
            np.ascontiguousarray(codes),
            scales,
            code_bits=bits,
            name=prefix,
            zeros=whole.reshape(1, 1),
            signed=signed,
            grouping=grouping,
            formula="f32_twice",
            source=_source(spec, scale, zero, reorder, parts["weight"]),
            **fields,
        )
        return _same_again(made, parts, prefix)
    made = Affine.make(
        np.ascontiguousarray(codes),
        scales,
        code_bits=bits,
        name=prefix,
        zeros=None if symmetric else zeros if zeros.dtype.kind == "f" else pack_zeros(zeros + offset, bits),
        zeros_bits=0 if symmetric or zeros.dtype.kind == "f" else bits,
        signed=signed and symmetric,
        grouping=grouping,
        formula="f32",
        source=_source(spec, scale, zero, reorder, parts["weight"]),
        **fields,
    )
    return _same_again(made, parts, prefix)


def _same_again(made: Affine, parts: Parts, prefix: str) -> Affine:
    """`made`, or a FormatError where bits that hold no code are set."""
    again = dump_integers(made)
    for suffix in ("weight", "weight_zero_point", "weight_zero_point_2"):
        if suffix in again and again[suffix].tobytes() != np.ascontiguousarray(parts[suffix]).tobytes():
            raise FormatError(f"{prefix}.{suffix}: bits after the last code of a row are set; the file is damaged")
    return made


def _source(spec: Spec, scale: np.ndarray, zero: np.ndarray | None, reorder: bool, weight: np.ndarray) -> Source:
    pairs: list[tuple[str, Any]] = [("dtype", spec.dtype), ("qscheme", spec.qscheme), ("reorder", reorder)]
    pairs += [
        ("scalar", scale.ndim == 0),
        ("weight_dtype", str(weight.dtype)),
        ("stages", 1 + (spec.first is not None)),
    ]
    if zero is not None:
        pairs += [("zero_dtype", str(zero.dtype)), ("zero_scalar", zero.ndim == 0)]
    return Source("quark", tuple(pairs))


def unpacked(stored: np.ndarray, name: str, dtype: str, reorder: bool) -> np.ndarray:
    """Stored words or bytes -> codes as unsigned integers, int32[rows, columns]."""
    bits = INTEGERS[dtype][0]
    stored = np.ascontiguousarray(stored)
    if bits == 4 or dtype == "int2":
        expect_dtype(stored, (np.int32,), name)
        return stored & 3 if bits == 2 else _bits.unpack_words(stored, SHIFTS[reorder], 4)
    expect_dtype(stored, (np.int8, np.uint8) if bits == 8 else (np.uint8,), name)
    if bits == 8:
        return stored.view(np.uint8).astype(np.int32)
    if bits == 3:
        return np.asarray(_bits.unpack(stored, 3, stored.shape[-1] * 8 // 3)).astype(np.int32)
    fields = (stored[..., None] >> np.array([6, 4, 2, 0], np.uint8)) & 3
    return fields.reshape(*stored.shape[:-1], -1).astype(np.int32)


def repacked(codes: np.ndarray, kind: str, reorder: bool, dtype: str) -> np.ndarray:
    """Inverse of `unpacked`; codes beyond the last are zero."""
    bits = INTEGERS[kind][0]
    if bits == 8:
        return codes.astype(np.uint8).view(np.dtype(dtype))
    if kind == "int2":
        return codes.astype(np.int32)
    pad = -codes.shape[-1] % (4 if bits == 2 else 8)
    codes = np.pad(codes & ((1 << bits) - 1), [(0, 0)] * (codes.ndim - 1) + [(0, pad)])
    if bits == 4:
        return _bits.pack_words(codes, SHIFTS[reorder], 4, np.int32)
    if bits == 3:
        return np.ascontiguousarray(_bits.pack(codes.astype(np.uint8), 3)).view(np.uint8)
    fields = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 4) << np.array([6, 4, 2, 0], np.uint8)
    return np.bitwise_or.reduce(fields, axis=-1)


def group_of(prefix: str, spec: Spec, k: int) -> int:
    """Inputs that share a scale: the settings' group size, checked against K."""
    if spec.qscheme == "per_group" and (spec.group_size < 1 or k % spec.group_size):
        raise FormatError(f"{prefix}: in_features {k} are no multiple of group_size {spec.group_size}")
    return spec.group_size


def scales_of(prefix: str, scale: np.ndarray, spec: Spec, group: int, n: int, k: int) -> tuple[np.ndarray, Grouping]:
    """Stored scales (groups last) as [rows, groups], and what they cover."""
    name, why = f"{prefix}.weight_scale", f"{spec.qscheme} scales of a weight of ({n}, {k})"
    if spec.qscheme == "per_tensor":
        if scale.size != 1:
            raise FormatError(f"{name}: found shape {tuple(scale.shape)}, expected a scalar ({why})")
        return scale.reshape(1, 1), Grouping("block", 0, 0)
    if spec.qscheme == "per_channel":
        expect_shape(scale, (n,), name, why)
        return scale.reshape(n, 1), Grouping("block", 1, 0)
    if spec.qscheme == "per_group":
        expect_shape(scale, (n, k // group), name, why)
        return np.ascontiguousarray(scale), Grouping("block", 1, group)
    if spec.qscheme == "per_block" and spec.block_size:
        rows, columns = spec.block_size
        if n % rows or k % columns:
            raise UnsupportedError(f"{name}: blocks of {rows}x{columns} do not tile a weight of ({n}, {k})")
        expect_shape(scale, (n // rows, k // columns), name, why)
        return scale, Grouping("block", rows, columns)
    raise UnsupportedError(f"{name}: qscheme {spec.qscheme!r} is not read; per tensor, channel, group and block are")


def _zeros(
    prefix: str, zero: np.ndarray, spec: Spec, bits: int, signed: bool, reorder: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """Zero points [rows, groups]: signed numbers as int32, or floats as they are stored."""
    name = f"{prefix}.weight_zero_point"
    if spec.float_zeros:
        expect_dtype(zero, FLOATS, name)
        return np.ascontiguousarray((zero.T if zero.ndim == 2 else zero).reshape(shape))
    if zero.ndim == 0 or bits == 8:
        codes = zero.astype(np.int32) & ((1 << bits) - 1)
    else:
        codes = unpacked(np.atleast_2d(zero), name, spec.dtype, reorder)
    if spec.qscheme == "per_group":
        codes = codes[:, : shape[0]].T
    else:
        codes = codes.reshape(-1)[: shape[0]]
    if codes.size != shape[0] * shape[1]:
        raise FormatError(f"{name}: found shape {tuple(zero.shape)}, which does not give {shape[0]} x {shape[1]} zeros")
    codes = np.ascontiguousarray(codes.reshape(shape))
    half = 1 << (bits - 1) if signed else 0
    return (codes ^ half) - half


def stored_scale(q: Any) -> np.ndarray:
    """The scales in their stored shape (groups not yet transposed)."""
    scale = np.asarray(q.scales)
    if q.source.get("qscheme") in ("per_tensor", "per_channel"):
        return scale.reshape(() if q.source.get("scalar") else -1)
    return scale


def dump_integers(q: Affine) -> Parts:
    """Stored tensors of a module."""
    source = q.source
    assert source is not None
    scale, scheme = stored_scale(q), source.get("qscheme")
    bits, signed = INTEGERS[source.get("dtype")]
    reorder, grouped = source.get("reorder"), scheme == "per_group"
    offset = 1 << (bits - 1) if signed and not q.signed else 0
    codes = np.asarray(q.unpack()) - offset
    staged = source.get("stages") == 2
    plain = q.zeros is None or staged
    zeros = np.zeros(np.asarray(q.scales).shape, np.int32) if plain else np.asarray(q.group_zeros())
    floating = zeros.dtype.kind not in "iu"
    zeros = zeros if floating else zeros - (0 if plain else offset)
    if grouped:
        codes, scale, zeros = codes.T, scale.T, zeros.T
    else:
        zeros = zeros.reshape(-1)
    zero_dtype = source.get("zero_dtype")
    if source.get("zero_scalar"):
        stored_zeros: np.ndarray = zeros.reshape(()).astype(zero_dtype)
    elif floating or zero_dtype not in ("int32", "int8", "uint8") or (bits == 8 and zero_dtype == "int32"):
        stored_zeros = zeros.astype(zero_dtype)
    else:
        stored_zeros = repacked(zeros, source.get("dtype"), reorder, zero_dtype)
    last = "_2" if staged else ""
    return {
        "weight": repacked(np.ascontiguousarray(codes), source.get("dtype"), reorder, source.get("weight_dtype")),
        f"weight_scale{last}": np.ascontiguousarray(scale).reshape(scale.shape),
        f"weight_zero_point{last}": np.ascontiguousarray(stored_zeros).reshape(stored_zeros.shape),
        **({"weight_scale": np.asarray(q.zeros).reshape(())} if staged else {}),
    }
