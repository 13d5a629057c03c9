"""Integer layouts of compressed-tensors: pack-quantized words and int8 rows; see `compressed_tensors` for the tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, take
from jq.formats.compressed_tensors_config import Args, Options
from jq.formats.compressed_tensors_parts import (
    FLOATS,
    carried_of,
    group_index,
    pack_dense,
    pack_padded,
    scale_back,
    scales_of,
    source_of,
    unpack_padded,
    zero_points,
)
from jq.qtensor import Affine, QTensor


def load_packed(prefix: str, parts: Parts, args: Args, options: Options) -> Affine:
    """pack-quantized: codes in int32 words of a row, dense or (before 0.13) whole codes in each word."""
    words = take(parts, "weight_packed", prefix)
    expect_dtype(words, (np.int32,), f"{prefix}.weight_packed")
    n, k = _packed_shape(prefix, parts, args)
    b = args.num_bits
    padded = _is_padded(words, n, k, b, options.version, prefix)
    carried: Parts = {}
    if padded:
        codes = unpack_padded(words, b, k)
        if not np.array_equal(pack_padded(codes, b), words):
            carried["weight_packed"] = words  # bits that no code uses are set: only the words themselves know them
        packed = _bits.pack(codes, b)
    else:
        packed = np.ascontiguousarray(words).view(np.uint32)  # the same bit stream, ends of rows included
    scale, grouping = scales_of(prefix, parts, args, (n, k))
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    g_idx = group_index(prefix, parts, args, k, scale.shape[1], carried)
    zeros, form = zero_points(prefix, parts, args, (n, k), scale, carried, packed=True, padded=padded)
    shape = parts.get("weight_shape")
    source = source_of(
        "packed-int",
        parts,
        **({"padded": True} if padded else {}),
        **({"zeros": form} if form else {}),
        **(
            {"shape": str(shape.dtype) if shape is not None else ""} if shape is None or shape.dtype != np.int64 else {}
        ),
    )
    made = Affine(
        packed,
        scale,
        zeros,
        g_idx,
        carried,
        code_bits=b,
        zero_point=1 << (b - 1),
        zeros_bits=b if form == "packed" else 0,
        grouping=grouping,
        formula="sub_mul",
        dtype=str(scale.dtype),
        pad=_bits.capacity(packed, b) - k,
        source=source,
    )
    made.check(prefix)
    return made


def dump_packed(q: Any) -> Parts:
    """Inverse of `load_packed`."""
    n, k = q.shape
    b = q.code_bits
    parts: Parts = {"weight_scale": scale_back(q, q.scales)}
    if q.source.get("padded"):
        parts["weight_packed"] = pack_padded(np.asarray(q.unpack()), b)
    else:
        parts["weight_packed"] = _dense_words(q)
    dtype = q.source.get("shape", "int64")
    if dtype:
        parts["weight_shape"] = np.array([n, k], dtype)
    if q.g_idx is not None:
        parts["weight_g_idx"] = np.asarray(q.g_idx)
    form = q.source.get("zeros", "")
    if form == "packed":
        codes = np.asarray(_bits.unpack(np.asarray(q.zeros), b, q.scales.shape[-1]))
        pack_rows = pack_padded if q.source.get("padded") else pack_dense
        parts["weight_zero_point"] = np.ascontiguousarray(pack_rows(np.ascontiguousarray(codes.T), b).T)
    elif form:
        parts["weight_zero_point"] = scale_back(q, np.asarray(q.zeros).astype(np.int32) - q.zero_point).astype(np.int8)
    return {**parts, **carried_of(q)}


def _dense_words(q: Any) -> np.ndarray:
    """The stored words of a row: the bit stream in whole int32 words."""
    codes = np.asarray(q.codes)
    if codes.dtype == np.uint32:
        return codes.view(np.int32)
    return pack_dense(np.asarray(q.unpack()), q.code_bits)


def _packed_shape(prefix: str, parts: Parts, args: Args) -> tuple[int, int]:
    """(N, K) from weight_shape, checked against the words; without it from the groups."""
    words = parts["weight_packed"]
    if words.ndim != 2:
        raise FormatError(f"{prefix}.weight_packed: found shape {words.shape}, expected two axes [N, words]")
    if "weight_shape" not in parts:
        scale = take(parts, "weight_scale", prefix)
        k = scale.shape[-1] * args.group_size if args.group_size else words.shape[1] * 32 // args.num_bits
        return words.shape[0], k
    stored = parts["weight_shape"]
    if stored.size != 2 or stored.dtype.kind not in "iu":
        raise FormatError(f"{prefix}.weight_shape: found {stored.dtype} {stored.shape}, expected two integers (N, K)")
    n, k = (int(v) for v in stored.reshape(-1))
    if n != words.shape[0] or k < 1:
        raise FormatError(
            f"{prefix}.weight_shape: says ({n}, {k}), but weight_packed has {words.shape[0]} rows; the file is damaged"
        )
    return n, k


def _is_padded(words: np.ndarray, n: int, k: int, bits: int, version: str, prefix: str) -> bool:
    """Whether words hold whole codes (before 0.13) where that differs from the dense stream."""
    dense, padded = math.ceil(k * bits / 32), math.ceil(k / (32 // bits))
    if words.shape[1] not in (dense, padded):
        raise FormatError(
            f"{prefix}.weight_packed: found shape {words.shape}, expected ({n}, {dense})"
            + (f" or, as before version 0.13, ({n}, {padded})" if padded != dense else "")
            + f" for in_features {k} and {bits} bits; check num_bits in config_groups"
        )
    if 32 % bits == 0:
        return False
    if dense != padded:
        return words.shape[1] == padded
    # A short row can have the same length in both. Whole codes leave the upper bits of every word empty.
    unused = words.view(np.uint32) >> np.uint32(32 // bits * bits)
    if unused.any():
        return False
    return _before_dense(version)


def _before_dense(version: str) -> bool:
    numbers = [int(p) for p in version.split(".")[:2] if p.isdigit()]
    return numbers < [0, 13]


def load_int8(prefix: str, parts: Parts, args: Args, options: Options) -> Affine:
    """int-quantized: int8 rows [N, K]."""
    weight = take(parts, "weight", prefix)
    expect_dtype(weight, (np.int8,), f"{prefix}.weight")
    return int8_codes(prefix, parts, args, weight, weight.shape)


def int8_codes(prefix: str, parts: Parts, args: Args, weight: Any, shape: tuple[int, ...]) -> Affine:
    """An `Affine` over int8 rows [N, K] (or a nested `Sparse` of them). Narrow codes are held in their own width."""
    if len(shape) != 2:
        raise FormatError(f"{prefix}.weight: found shape {shape}, expected [out_features, in_features]")
    n, k = shape
    carried: Parts = {}
    scale, grouping = scales_of(prefix, parts, args, (n, k))
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    g_idx = group_index(prefix, parts, args, k, scale.shape[1], carried)
    zeros, form = zero_points(prefix, parts, args, (n, k), scale, carried, packed=False)
    b, pad, codes = 8, 0, weight
    if isinstance(weight, np.ndarray):
        low, high = args.limits
        fits = not weight.size or (weight.min() >= low and weight.max() <= high)
        b = args.num_bits if fits else 8
        if b == 8:
            codes = _bits.as_words(weight)
        else:
            codes = _pack_rows(weight, b)
            pad = _bits.capacity(codes, b) - k
    made = Affine(
        codes,
        scale,
        zeros,
        g_idx,
        carried,
        code_bits=b,
        signed=True,
        grouping=grouping,
        formula="sub_mul",
        dtype=str(scale.dtype),
        pad=pad,
        source=source_of("int8", parts, **({"zeros": form} if form else {})),
    )
    made.check(prefix)
    return made


def _pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """`bits.pack`, with nibbles put together bytewise: ten times faster, and the width that matters."""
    if bits != 4 or codes.shape[1] % 8:
        return _bits.pack(codes, bits)
    nibbles = codes.view(np.uint8) & np.uint8(15)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)).view(np.uint32)


def dump_int8(q: Any) -> Parts:
    """Inverse of `load_int8`."""
    parts = {"weight_scale": scale_back(q, q.scales)}
    if not isinstance(q.codes, QTensor):
        codes = np.asarray(q.codes)
        parts["weight"] = codes.view(np.int8) if q.code_bits == 8 else np.asarray(q.unpack()).astype(np.int8)
    if q.g_idx is not None:
        parts["weight_g_idx"] = np.asarray(q.g_idx)
    if q.source.get("zeros"):
        parts["weight_zero_point"] = scale_back(q, np.asarray(q.zeros))
    return {**parts, **carried_of(q)}
