"""SpQR: 3-bit weights in tiles of 16 x 16, 3-bit scales and zeros in each tile, outliers of their own.

    dense_weights  int64 [ceil(N/16) * ceil(K/16) * 16]: tile after tile along the columns, then the next 16 rows; a
                   word for each row of a tile, lowest bits first: scale 3, zero 3, sixteen weights of 3, 8 bits of
                   the tile's statistics (rows 2p and 2p + 1 both hold byte p), 2 unused
    row_offsets    int32 [N + 1] (CSR), or [N/16 + 1] where outliers of 16 rows are interleaved, shorter rows padded
    col_vals       int32 [nnz]: column in the low half, float16 value in the high half
    in_perm        int32 [K/2] of two uint16, low half first: stored column c is input in_perm[c]; or empty

The statistics of a tile are four float16: scale of the scales, scale of the zeros, zero of the scales, zero of the
zeros. s = ss * (scale - sz) and z = zs * (zero - zz) and w = s * (q - z), each operation rounded to float16; outliers
are added in float32 and the sum is rounded.

Source: spqr_quant 0.2.0, inference_kernels/spqr_cuda.cpp (`tensor_compress_interleaved`, `dequantize_compressed`) and
inference.py; the library needs CUDA, no file of it was at hand. Only its bits 3, beta1 16, beta2 16 exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, take, warn_unknown
from jq.formats.layer_shapes import in_features_of
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.outliers import WithOutliers

TILE = 16
SUFFIXES = ("dense_weights", "row_offsets", "col_vals", "in_perm")
KNOWN = ("quant_method", "bits", "beta1", "beta2", "shapes", "modules_to_not_convert")


@dataclasses.dataclass(frozen=True)
class Options:
    """SpQR's settings have one value each, but for the lengths of stored tensors ("<module>.<tensor>.shape")."""

    shapes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      UnsupportedError: other sizes than the ones that spqr_quant implements.
    """
    warn_unknown(config, KNOWN, context.label)
    for key, only in (("bits", 3), ("beta1", TILE), ("beta2", TILE)):
        if config.get(key, only) != only:
            raise UnsupportedError(
                f"{context.label}: quantization_config.{key} is {config[key]!r}; SpQR has only {only}"
            )
    shapes = config.get("shapes") or {}
    if not isinstance(shapes, Mapping):
        raise FormatError(
            f"{context.label}: quantization_config.shapes must map tensors to lengths, found {shapes!r:.60}"
        )
    return Options(shapes)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> WithOutliers:
    """One module's tensors as a 3-bit `Affine` with nested scales and zeros, plus outliers.

    Raises:
      FormatError: missing tensors, lengths that fit no weight, offsets or columns out of range.
      UnsupportedError: out_features that are no multiple of 16.
    """
    words = take(parts, "dense_weights", prefix)
    offsets = take(parts, "row_offsets", prefix)
    entries = take(parts, "col_vals", prefix)
    expect_dtype(words, (np.int64,), f"{prefix}.dense_weights")
    expect_dtype(offsets, (np.int32,), f"{prefix}.row_offsets")
    expect_dtype(entries, (np.int32,) if entries.size else (np.int32, np.float32), f"{prefix}.col_vals")
    for name, array in (("dense_weights", words), ("row_offsets", offsets), ("col_vals", entries)):
        if array.ndim != 1:
            raise FormatError(f"{prefix}.{name}: found shape {tuple(array.shape)}, expected one axis")
    for name, array in parts.items():
        said = options.shapes.get(f"{prefix}.{name}.shape")
        if said is not None and said not in (array.size, [array.size]):
            raise FormatError(
                f"{prefix}.{name}: found {array.size} values, expected {said!r:.40} (quantization_config.shapes)"
            )
    perm = _perm(prefix, parts)
    n, k, rows = _sizes(prefix, words, offsets, entries, perm, context)
    tiles = np.ascontiguousarray(words).view(np.uint64).reshape(n // TILE, -(-k // TILE), TILE)
    fields = ((tiles[..., None] >> (np.arange(18, dtype=np.uint64) * np.uint64(3))) & np.uint64(7)).astype(np.uint8)
    codes = fields[..., 2:].transpose(0, 2, 1, 3).reshape(n, -1)[:, :k]
    first = fields[..., :2].transpose(3, 0, 2, 1).reshape(2, n, -1)  # scales, zeros: [N, groups]
    halves = _statistics(tiles)
    grouping = Grouping("block", TILE, 1)
    nested = [
        Affine.make(first[i], halves[i], code_bits=3, name=f"{prefix}: {what}", zeros=halves[2 + i], grouping=grouping)
        for i, what in enumerate(("scales", "zeros"))
    ]
    base = Affine.make(
        codes,
        nested[0],
        code_bits=3,
        name=prefix,
        zeros=nested[1],
        grouping=Grouping("block", 1, TILE),
        dtype="float16",
    )
    order = None
    if perm is not None:
        order = np.argsort(perm).astype(np.uint16)
    has_perm = "none" if "in_perm" not in parts else "empty" if perm is None else "full"
    pairs = (("in_perm", has_perm), ("in_perm_dtype", str(parts.get("in_perm", entries).dtype)))
    made = WithOutliers(
        base,
        offsets,
        np.ascontiguousarray(entries).view(np.uint32),
        order,
        rows=rows,
        source=Source("spqr", (*pairs, ("empty_dtype", "" if entries.size else str(entries.dtype)))),
    )
    made.check(prefix)
    if not np.array_equal(dump(made)["dense_weights"], words):
        raise FormatError(f"{prefix}.dense_weights: unused bits are set or the rows of a tile contradict each other")
    return made


def _perm(prefix: str, parts: Parts) -> np.ndarray | None:
    stored = parts.get("in_perm")
    if stored is None or not stored.size:
        return None
    expect_dtype(stored, (np.int32,), f"{prefix}.in_perm")
    perm = np.ascontiguousarray(stored).view(np.uint16).reshape(-1)
    if not np.array_equal(np.sort(perm), np.arange(perm.size)):
        raise FormatError(f"{prefix}.in_perm: is no permutation of 0..{perm.size - 1}; the file is damaged")
    return perm


def _sizes(
    prefix: str, words: np.ndarray, offsets: np.ndarray, entries: np.ndarray, perm: np.ndarray | None, context: Context
) -> tuple[int, int, int]:
    """(out_features, in_features, rows of a run): the lengths leave two readings, the other tensors and config decide."""
    count = len(offsets) - 1
    readings = []
    for rows in (1, TILE):
        n = count * rows
        if n < 1 or n % TILE or words.size % n:
            continue
        k = words.size // n * TILE
        if rows == 1 or not (offsets % TILE).any():
            readings.append((n, k, rows))
    if perm is not None:
        readings = [(n, perm.size, r) for n, k, r in readings if k - TILE < perm.size <= k]
    if len(readings) > 1:
        said = {k for n, k, _ in readings if in_features_of(prefix, n * k, context.config, k.__eq__)}
        readings = [r for r in readings if r[1] in said] or readings
    if len(readings) != 1:
        raise FormatError(
            f"{prefix}.dense_weights: {words.size} words and {len(offsets)} row offsets fit "
            f"{'several weights' if readings else 'no weight of tiles of 16 x 16'}; config.json must give the model's sizes"
        )
    n, k, rows = readings[0]
    if perm is None:  # a last tile that is not full
        near = range(k - TILE + 1, k + 1)
        exact = [c for c in near if in_features_of(prefix, n * c, context.config, c.__eq__)]
        k = exact[0] if len(exact) == 1 else k
    return n, k, rows


def _statistics(tiles: np.ndarray) -> np.ndarray:
    """float16[4, N/16, K/16] of each tile: scale of scales, scale of zeros, zero of scales, zero of zeros."""
    parts = (tiles[..., ::2] >> np.uint64(54)).astype(np.uint8)  # byte p of the eight is in rows 2p and 2p + 1
    return np.ascontiguousarray(np.moveaxis(np.ascontiguousarray(parts).view(np.float16), -1, 0))


def dump(q: WithOutliers) -> Parts:
    """Stored tensors of a module."""
    base, source = q.base, q.source
    assert source is not None
    codes = np.asarray(base.unpack()).astype(np.uint64)
    n, k = codes.shape
    columns = -(-k // TILE)
    codes = np.pad(codes, [(0, 0), (0, columns * TILE - k)]).reshape(n // TILE, TILE, columns, TILE).swapaxes(1, 2)
    first = [
        np.asarray(t.unpack()).astype(np.uint64).reshape(n // TILE, TILE, columns).swapaxes(1, 2)
        for t in (base.scales, base.zeros)
    ]
    shifts = np.arange(2, 18, dtype=np.uint64) * np.uint64(3)
    words = np.bitwise_or.reduce(codes << shifts, axis=-1) | first[0] | (first[1] << np.uint64(3))
    halves = [np.asarray(a) for a in (base.scales.scales, base.zeros.scales, base.scales.zeros, base.zeros.zeros)]
    parts = np.ascontiguousarray(np.stack(halves, axis=-1)).view(np.uint8)  # [N/16, K/16, 8]
    words |= np.repeat(parts, 2, axis=-1).astype(np.uint64) << np.uint64(54)
    empty = source.get("empty_dtype")
    entries = np.zeros(0, empty) if empty else np.asarray(q.entries).view(np.int32)
    found: Parts = {
        "dense_weights": words.reshape(-1).view(np.int64),
        "row_offsets": np.asarray(q.offsets),
        "col_vals": entries,
    }
    if source.get("in_perm") == "empty":
        found["in_perm"] = np.zeros(0, source.get("in_perm_dtype"))
    elif q.order is not None:
        found["in_perm"] = np.argsort(np.asarray(q.order)).astype(np.uint16).view(np.int32)
    return found


FORMAT = Format(
    name="spqr",
    methods=("spqr",),
    title="SpQR: 3-bit tiles with 3-bit scales and outliers",
    parse=parse,
    markers=("dense_weights",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    evidence="source",
)
