"""Sparse layouts of compressed-tensors before 0.13: sparse-bitmask, sparse-24-bitmask, marlin-24.

  sparse-bitmask      compressed [nnz] (any dtype), bitmask uint8 [N, ceil(K/8)], shape int64 [2], row_offsets int64 [N]
  sparse-24-bitmask   compressed [N, K/2], bitmask, shape int64 [2, 1]; float8 or int8 codes where weight_scale is there
  marlin-24           weight_packed int32 [K/32, N*bits/2], meta int16 [K/32, 2N], scale_packed float16 [groups, N]

Bit k % 8 (lowest first) of byte k // 8 of a mask row is set where the value is kept; values follow in row-major order.
What the mask of int8 codes lost when the file was written (abs(-128) overflows, so a code of -128 counts as smallest)
is lost: the stored values are read.

marlin-24 holds codes q + 2**(bits-1) of 4 or 8 bits of a 2:4 sparse weight, compressed to [K/2, N], in tiles of 16x16
whose 1024 elements are permuted for tensor cores, and the place of each kept value in its quad as CUTLASS' reordered
2-bit metadata.
Source: compressed-tensors 0.10.2 (compressors/sparse_compressors, sparse_quantized_compressors/marlin_24.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, expect_shape, take
from jq.formats.compressed_tensors_config import Args, Group
from jq.formats.compressed_tensors_float import E4M3, float8_codes
from jq.formats.compressed_tensors_int import int8_codes
from jq.formats.compressed_tensors_parts import NAME
from jq.formats.marlin import tile, untile
from jq.qtensor import Affine, Grouping, QTensor, Source
from jq.qtensor.sparse import Sparse, pack_mask

_MASKED = ("compressed", "bitmask", "shape", "row_offsets")
SUFFIXES = (*_MASKED, *(f"weight.{s}" for s in _MASKED), "scale_packed", "meta")


def is_bitmask(parts: Mapping[str, Any]) -> bool:
    """Whether a module's tensors are those of sparse-bitmask or sparse-24-bitmask."""
    return "compressed" in parts or "weight.compressed" in parts


def is_marlin(parts: Mapping[str, Any]) -> bool:
    """Whether they are those of marlin-24."""
    return "meta" in parts and "scale_packed" in parts


def load_bitmask(prefix: str, parts: Parts, scheme: Group | None) -> QTensor:
    """A sparse weight: `Sparse` of floats, or a quantized tensor whose codes are a `Sparse`."""
    lead = "weight." if "weight.compressed" in parts else ""
    values = take(parts, f"{lead}compressed", prefix)
    mask = take(parts, f"{lead}bitmask", prefix)
    expect_dtype(mask, (np.uint8,), f"{prefix}.{lead}bitmask")
    stored = take(parts, f"{lead}shape", prefix)
    if stored.size != 2 or stored.dtype.kind not in "iu":
        raise FormatError(f"{prefix}.{lead}shape: found {stored.dtype} {stored.shape}, expected two integers (N, K)")
    n, k = (int(v) for v in stored.reshape(-1))
    expect_shape(mask, (n, -(-k // 8)), f"{prefix}.{lead}bitmask", f"one bit for each weight of ({n}, {k})")
    quantized = "weight_scale" in parts
    held = values.view(np.uint8) if values.dtype == E4M3 else values
    extras = {f"{lead}row_offsets": parts[f"{lead}row_offsets"]} if f"{lead}row_offsets" in parts else {}
    options: dict[str, Any] = {"kind": "bitmask", "shape": stored.shape, **({"lead": lead} if lead else {})}
    if stored.dtype != np.int64:
        options["shape_dtype"] = str(stored.dtype)
    if values.dtype == E4M3:
        options["dtype"] = str(values.dtype)
    codes = Sparse(
        held,
        mask,
        extras,
        dtype=str(held.dtype),
        pad=8 * mask.shape[1] - k,
        source=Source(NAME, tuple(options.items())),
    )
    codes.check(prefix)
    if not quantized:
        if values.dtype.kind in "iu" or values.dtype.itemsize == 1:
            raise FormatError(
                f"{prefix}.weight_scale: missing beside sparse {values.dtype} codes; the file is incomplete"
            )
        return codes
    if scheme is None or scheme.weights is None:
        raise FormatError(f"{prefix}: has weight_scale, but its scheme in config_groups has no `weights`")
    args = scheme.weights
    if (values.dtype == E4M3) != (args.type == "float"):
        raise FormatError(f"{prefix}.{lead}compressed: found {values.dtype}, but config_groups says {args}")
    build: Any = float8_codes if values.dtype == E4M3 else int8_codes
    return build(prefix, parts, args, codes, (n, k))


def dump_bitmask(q: Any) -> Parts:
    """Inverse of `load_bitmask`."""
    lead, dtype = q.source.get("lead", ""), q.source.get("dtype")
    values = np.asarray(q.values)
    return {
        f"{lead}compressed": values.view(np.dtype(getattr(ml_dtypes, dtype))) if dtype else values,
        f"{lead}bitmask": np.asarray(q.mask),
        f"{lead}shape": np.array(q.shape, q.source.get("shape_dtype", "int64")).reshape(q.source.get("shape")),
        **{k: np.asarray(v) for k, v in q.extras.items()},
    }


def load_marlin(prefix: str, parts: Parts, args: Args) -> Affine:
    """Undoes tiles and metadata; the codes are held as a `Sparse` of 4-bit values, no larger than the file."""
    words, meta = take(parts, "weight_packed", prefix), take(parts, "meta", prefix)
    scales = take(parts, "scale_packed", prefix)
    expect_dtype(words, (np.int32,), f"{prefix}.weight_packed")
    expect_dtype(meta, (np.int16,), f"{prefix}.meta")
    expect_dtype(scales, (np.float16, ml_dtypes.bfloat16), f"{prefix}.scale_packed")
    b = args.num_bits
    if b not in (4, 8) or args.type != "int" or not args.symmetric:
        raise FormatError(f"{prefix}: marlin-24 with {args}; the format holds symmetric int4 and int8 only")
    if words.ndim != 2 or not words.size or words.shape[1] % (32 * b) or scales.ndim != 2:
        raise FormatError(
            f"{prefix}.weight_packed: found shape {words.shape}, expected (K/32, N*{b}/2) with N a multiple of 64"
        )
    k, n = 32 * words.shape[0], 2 * words.shape[1] // b
    groups = k // args.group_size if args.group_size else 1
    expect_shape(meta, (k // 32, 2 * n), f"{prefix}.meta", f"2 bits for each kept weight of ({n}, {k})")
    expect_shape(scales, (groups, n), f"{prefix}.scale_packed", f"{args} on ({n}, {k})")
    codes = untile(words, k // 2, n, b, sparse=True).T - (1 << (b - 1))  # [N, K/2], signed
    places = _places(meta, n, k)
    kept = np.zeros((n, k), bool)
    np.put_along_axis(kept, places, True, axis=1)
    ordered = (places[:, 0::2] < places[:, 1::2]).all()
    if not ordered:
        raise FormatError(f"{prefix}.meta: metadata names the places of a quad out of order; the file is damaged")
    order = _scale_order(args, k)
    plain = np.empty((scales.size // 64, 64), scales.dtype)
    plain[:, order] = scales.reshape(-1, 64)
    made = Affine(
        Sparse(_bits.pack(codes, b), pack_mask(kept), value_bits=b, dtype="int8", source=None),
        np.ascontiguousarray(plain.reshape(groups, n).T),
        code_bits=b,
        signed=True,
        grouping=Grouping("block", 1, args.group_size if groups > 1 else 0),
        formula="sub_mul",
        dtype=str(scales.dtype),
        source=Source(NAME, (("kind", "marlin"), ("short_groups", bool(args.group_size and args.group_size < k // 2)))),
    )
    made.check(prefix)
    return made


def dump_marlin(q: Any) -> Parts:
    """Inverse of `load_marlin`."""
    n, k = q.shape
    b = q.code_bits
    codes = np.asarray(_bits.unpack(np.asarray(q.codes.values), b, signed=True)) + (1 << (b - 1))  # [N, K/2]
    kept = np.unpackbits(np.asarray(q.codes.mask), axis=1, count=k, bitorder="little").astype(bool)
    places = np.nonzero(kept)[1].reshape(n, k // 2)
    order = _SHORT if q.source.get("short_groups") else _IDENTITY
    scales = np.ascontiguousarray(np.asarray(q.scales).T)
    return {
        "weight_packed": tile(np.ascontiguousarray(codes.T), b, sparse=True),
        "meta": _metadata(places, n, k),
        "scale_packed": scales.reshape(-1, 64)[:, order].reshape(scales.shape),
        **{name: np.asarray(v) for name, v in q.extras.items()},
    }


_SHORT = np.array([8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)])
_IDENTITY = np.arange(64)


def _scale_order(args: Args, k: int) -> np.ndarray:
    """Order of scales in each run of 64 columns; that of groups shorter than the compressed K is shuffled."""
    return _SHORT if args.group_size and args.group_size < k // 2 else _IDENTITY


def _meta_index(n: int, columns: int) -> np.ndarray:
    """Where CUTLASS puts the metadata word (16 bits, 4 quads) of row r and word column c: [N, K/16] into a flat array."""
    r, c = np.meshgrid(np.arange(n), np.arange(columns), indexing="ij")
    row = r // 64 * 64 + (r % 2) * 2 + (r % 8) // 4 + ((r % 32) % 4) // 2 * 32 + ((r % 64) // 8) * 4
    top_right = ((row % 2 == 0) & (c % 2 == 1)).astype(int)
    bottom_left = ((row % 2 == 1) & (c % 2 == 0)).astype(int)
    row, c = row + top_right - bottom_left, c - (top_right - bottom_left)
    return (c // 2) * n * 2 + row * 2 + c % 2


def _places(meta: np.ndarray, n: int, k: int) -> np.ndarray:
    """Column of each kept value, int [N, K/2], from metadata int16 [K/32, 2N]."""
    ordered = np.ascontiguousarray(meta).reshape(-1).view(np.uint16)[_meta_index(n, k // 16)]
    pairs = _bits.unpack_words(ordered, tuple(range(0, 16, 2)), 2)  # [N, K/2]
    return np.repeat(4 * np.arange(k // 4), 2)[None] + pairs


def _metadata(places: np.ndarray, n: int, k: int) -> np.ndarray:
    """Inverse of `_places`."""
    words = _bits.pack_words(places % 4, tuple(range(0, 16, 2)), 2, np.uint16)
    flat = np.empty(words.size, np.uint16)
    flat[_meta_index(n, k // 16)] = words
    return flat.view(np.int16).reshape(k // 32, 2 * n)
