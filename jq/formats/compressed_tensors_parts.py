"""What the layouts of compressed-tensors share: scales, zero points, activation order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, expect_shape, take
from jq.formats.compressed_tensors_config import Args
from jq.qtensor import Grouping, Source
from jq.qtensor.affine import check_indices, pack_zeros

NAME = "compressed-tensors"
FLOATS = ("float16", "bfloat16", "float32")


def grouping_of(args: Args) -> Grouping:
    """Which scale belongs to which weight."""
    if args.strategy == "tensor":
        return Grouping("block", 0, 0)
    if args.strategy == "channel":
        return Grouping("block", 1, 0)
    if args.strategy in ("group", "tensor_group"):
        return Grouping("block", 1, args.group_size)
    if args.strategy == "block" and args.block_structure:
        return Grouping("block", *args.block_structure)
    raise FormatError(f"strategy {args.strategy} is one of activations, not of weights")


def scales_of(prefix: str, parts: Parts, args: Args, shape: tuple[int, int]) -> tuple[np.ndarray, Grouping]:
    """weight_scale in its two-dimensional form, and its grouping; raises FormatError where it does not fit."""
    scale = take(parts, "weight_scale", prefix)
    grouping = grouping_of(args)
    rows = 1 if not grouping.rows else math.ceil(shape[0] / grouping.rows)
    cols = 1 if not grouping.cols else math.ceil(shape[1] / grouping.cols)
    flat = {(), (1,), (rows,)} if cols == 1 else set()  # old files: scalars, and channels without the last axis
    if scale.shape not in {(rows, cols), *flat} or scale.size != rows * cols:
        raise FormatError(
            f"{prefix}.weight_scale: found shape {scale.shape}, expected {(rows, cols)} for a weight of {shape} with {args}"
        )
    return scale.reshape(rows, cols), grouping


def source_of(kind: str, parts: Parts, **options: Any) -> Source:
    """What `dump` needs to know: the loader's kind, and the stored shape's rank of the scale where it is not 2."""
    rank = parts["weight_scale"].ndim
    pairs = {"kind": kind, **({} if rank == 2 else {"scale_rank": rank}), **options}
    return Source(NAME, tuple(pairs.items()))


def scale_back(q: Any, scales: Any) -> np.ndarray:
    rank = q.source.get("scale_rank", 2)
    scale = np.asarray(scales)
    return scale if rank == 2 else scale.reshape(-1) if rank == 1 else scale.reshape(())


def pack_dense(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, C] -> int32 [R, ceil(C*bits/32)], one bit stream a row, zero padding."""
    packed = _bits.pack(codes, bits)
    if packed.dtype == np.uint32:
        return packed.view(np.int32)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(padded).view(np.int32)


def pack_padded(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, C] -> int32 [R, ceil(C / (32 // bits))], whole codes in each word: the layout before 0.13."""
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    return _bits.pack_words(padded, tuple(bits * i for i in range(per)), bits, np.int32)


def unpack_padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack_padded`."""
    return _bits.unpack_words(words, tuple(bits * i for i in range(32 // bits)), bits)[:, :count]


def group_index(prefix: str, parts: Parts, args: Args, k: int, groups: int, carried: Parts) -> np.ndarray | None:
    """Group of each column, None where it is k // group_size (then it is only carried)."""
    stored = parts.get("weight_g_idx")
    if stored is None:
        return None
    expect_dtype(stored, (np.int32, np.int64), f"{prefix}.weight_g_idx")
    expect_shape(stored, (k,), f"{prefix}.weight_g_idx", "one group for each of in_features")
    unset = bool((stored == -1).any())  # the library takes -1 for "never set": columns in order
    if unset or stored.dtype != np.int32 or np.array_equal(stored, np.arange(k) // max(args.group_size, 1)):
        if not unset and stored.dtype != np.int32:
            raise FormatError(f"{prefix}.weight_g_idx: found dtype {stored.dtype}, expected int32")
        carried["weight_g_idx"] = stored
        return None
    check_indices(stored, groups, f"{prefix}.weight_g_idx")
    return stored


def zero_points(
    prefix: str,
    parts: Parts,
    args: Args,
    shape: tuple[int, int],
    scale: np.ndarray,
    carried: Parts,
    *,
    packed: bool,
    padded: bool = False,
) -> tuple[np.ndarray | None, str]:
    """Zero points in the form that `Affine` holds, and how they were stored: "", "packed" or "plain".

    `padded` says that the weight's words hold whole codes; it decides where the zero points' length fits both packings.
    """
    stored = parts.get("weight_zero_point")
    offset = 1 << (args.num_bits - 1) if packed else 0
    name = f"{prefix}.weight_zero_point"
    if stored is None:
        if not args.symmetric:
            raise FormatError(f"{name}: missing, though config_groups says {args}; the file is incomplete")
        return None, ""
    if stored.dtype == np.int32 and packed:
        zeros = _unpack_zeros(name, stored, args.num_bits, shape[0], scale.shape, padded)
        if args.symmetric:
            _expect_zero(zeros - offset, name)
            carried["weight_zero_point"] = stored
            return None, ""
        written = (pack_padded if padded else pack_dense)(np.ascontiguousarray(zeros.T), args.num_bits).T
        if not np.array_equal(written, stored):  # padding bits are set: only the words themselves know them
            carried["weight_zero_point"] = stored
        return pack_zeros(zeros, args.num_bits), "packed"
    if stored.size != scale.size:
        raise FormatError(f"{name}: found shape {stored.shape}, expected that of weight_scale {scale.shape}")
    if args.symmetric:
        _expect_zero(stored, name)
        carried["weight_zero_point"] = stored
        return None, ""
    expect_dtype(stored, (np.int8,), name)
    zeros = stored.reshape(scale.shape)
    return (zeros.astype(np.int32) + offset).astype(np.uint8) if packed else zeros, "plain"


def _unpack_zeros(name: str, stored: np.ndarray, bits: int, n: int, shape: tuple[int, ...], prefer: bool) -> np.ndarray:
    """int32 [ceil(N*bits/32), groups], packed along N, -> codes int32 [N, groups], still offset by 2**(bits-1)."""
    dense, padded = math.ceil(n * bits / 32), math.ceil(n / (32 // bits))
    if stored.ndim != 2 or stored.shape[1] != shape[1] or stored.shape[0] not in (dense, padded):
        raise FormatError(
            f"{name}: found shape {stored.shape}, expected ({dense}, {shape[1]}): {bits}-bit zero points of {n} rows, "
            "packed along the rows"
        )
    if 32 % bits and stored.shape[0] == padded and (padded != dense or prefer):
        return unpack_padded(np.ascontiguousarray(stored.T), bits, n).T
    return _bits.unpack(stored, bits, n, axis=0)


def _expect_zero(values: np.ndarray, name: str) -> None:
    if np.asarray(values).astype(np.float32).any():
        raise FormatError(
            f"{name}: holds zero points other than 0, but config_groups says symmetric; the config does not belong to "
            "this file"
        )


def carried_of(q: Any) -> Parts:
    """Carried tensors that belong to the module alone ("~" begins the names of those that modules share)."""
    return {k: np.asarray(v) for k, v in q.extras.items() if not k.startswith("~")}
