"""VPTQ: vectors of output features from a main and a residual codebook, outlier columns, permuted and scaled inputs.

Stored tensors of a linear layer [N, K], vectors of v rows of one column, k main and kr residual centroids (b and rb
bits), G groups of g columns, s outlier columns with vectors of vo rows and ko centroids:

    centroids.weight          dt [G, k*v]
    indices                   int32 [G, ceil(N/v), ceil(g*(b+rb)/32)]: per row one little-endian bit stream, entry j
                              at bit j*(b+rb), main index in its low b bits, residual above. Not packed
                              (`is_indice_packed` false): int16 or float16 bits of uint16 [G, ceil(N/v), g]
    res_indices               as unpacked indices; only where they are not packed
    res_centroids.weight      dt [G, kr*v]
    outlier_centroids.weight  dt [1, ko*vo]
    outlier_indices           int16 bits of uint16 [1, ceil(N/vo), s]
    perm                      int16 bits of uint16 [K] (int64 where indices are not packed)
    weight_scale, weight_bias dt [K], or [N] where `norm_dim` is 1

Dequantization (vptq 0.0.5.post1, ops/quant_gemm.py, torch path): main + residual rounded to dt, padding rows cut,
outliers in front, column c to input perm[c], times weight_scale, plus weight_bias, each rounded. `norm_dim`
is of the quantizer's own layer (microsoft/VPTQ, vptq/layers/vqlinear.py of the algorithm branch); the package knows 0. A module is quantized
where config_for_layers names its path or shared_layer_config the last part of it. vptq masks the residual index with
2**b - 1 where it means 2**rb - 1; here all rb bits count, as the packer wrote them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take
from jq.formats.vptq_config import Layer, Options, parse
from jq.qtensor import Source
from jq.qtensor.vector_codebook import VectorCodebook

FLOATS = (np.float16, "bfloat16", np.float32)
SUFFIXES = (
    "centroids.weight",
    "indices",
    "res_indices",
    "res_centroids.weight",
    "outlier_centroids.weight",
    "outlier_indices",
    "perm",
    "weight_scale",
    "weight_bias",
)


def bits_of(entries: int) -> int:
    """Width of an index into `entries` centroids."""
    return max(1, math.ceil(math.log2(entries))) if entries > 1 else 0


def load(prefix: str, parts: Parts, options: Options, context: Context) -> VectorCodebook | None:
    """One module's tensors as a `VectorCodebook`; None for a module that only shares a suffix.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config, indices outside the codebook.
    """
    o = options.of(prefix)
    if o is None:
        if "indices" not in parts:
            return None
        raise FormatError(
            f"{prefix}.indices: the module is named neither in quantization_config.config_for_layers nor, by the last "
            "part of its name, in shared_layer_config; without its settings it cannot be decoded"
        )
    o = o.told_by(parts)
    out_features, in_features = _sizes(prefix, parts, o, context)
    size, rest = divmod(in_features - o.outliers, o.groups)
    if size < 1 or rest:
        raise FormatError(
            f"{prefix}: {in_features} inputs less {o.outliers} outliers do not make {o.groups} equal groups (group_num)"
        )
    if o.group_size > 0 and o.group_size != size:
        raise FormatError(
            f"{prefix}: group_size {o.group_size}, but {in_features} inputs less {o.outliers} outliers in {o.groups} groups "
            f"are {size} each"
        )
    rows = -(-out_features // o.vector)
    centroids = _centroids(prefix, parts, "centroids.weight", o.groups, o.entries, o.vector)
    main, second = _indices(prefix, parts, o, rows, size)
    fields: dict[str, Any] = {"row_pad": rows * o.vector - out_features, "dtype": str(centroids.dtype)}
    if second is not None:
        book = _centroids(prefix, parts, "res_centroids.weight", o.groups, o.residual_entries, o.vector)
        fields["residual"] = _part(f"{prefix}.res_indices", second, book, fields["row_pad"])
    if o.outliers:
        fields["outliers"] = _outliers(prefix, parts, o, out_features)
    perm_dtype = ""
    if o.perm:
        perm = _perm(prefix, parts, in_features)
        perm_dtype = str(parts["perm"].dtype)
        fields["order"] = np.argsort(perm).astype(np.uint16 if in_features <= 1 << 16 else np.int32)
    if o.norm:
        for name in ("weight_scale", "weight_bias"):
            vector = take(parts, name, prefix, why="enable_norm is set.")
            expect_dtype(vector, (centroids.dtype,), f"{prefix}.{name}")
            length, what = (out_features, "output") if o.norm_rows else (in_features, "input")
            expect_shape(vector, (length,), f"{prefix}.{name}", f"one for each {what}")
            fields[f"{'row' if o.norm_rows else 'column'}_{name.removeprefix('weight_')}"] = vector
    used = {"centroids.weight", "indices", *_optional(o)}
    extra = sorted(parts.keys() - used)
    if extra:
        raise FormatError(
            f"{prefix}.{extra[0]}: stored, but the layer's settings in quantization_config have no such part"
        )
    pairs: list[tuple[str, Any]] = [("packed", o.packed), ("index_dtype", str(parts["indices"].dtype))]
    if perm_dtype:
        pairs.append(("perm_dtype", perm_dtype))
    if o.outliers:
        pairs.append(("outlier_dtype", str(parts["outlier_indices"].dtype)))
    made = _part(f"{prefix}.indices", main, centroids, source=Source("vptq", tuple(pairs)), **fields)
    if not np.array_equal(dump(made)["indices"].view(np.uint8), np.ascontiguousarray(parts["indices"]).view(np.uint8)):
        raise FormatError(f"{prefix}.indices: bits after the last index of a row are set; the file is damaged")
    return made


def _optional(o: Layer) -> set[str]:
    names: set[str] = set()
    if o.residual_entries:
        names |= {"res_centroids.weight"} | (set() if o.packed else {"res_indices"})
    if o.outliers:
        names |= {"outlier_centroids.weight", "outlier_indices"}
    if o.perm:
        names.add("perm")
    return names | ({"weight_scale", "weight_bias"} if o.norm else set())


def _sizes(prefix: str, parts: Parts, o: Layer, context: Context) -> tuple[int, int]:
    """(out_features, in_features) from the layer's settings, else from tensors that have them."""
    n, k = o.out_features, o.in_features
    if k < 1:
        have = ("perm", *(() if o.norm_rows else ("weight_scale",)))
        k = next((parts[s].shape[0] for s in have if s in parts and parts[s].ndim == 1), 0)
    if n < 1:
        bias = context.shapes.get(f"{prefix}.bias", ())
        n = bias[0] if len(bias) == 1 else len(parts["weight_scale"]) if o.norm_rows and "weight_scale" in parts else 0
    if k < 1 and o.group_size > 0:
        k = o.groups * o.group_size + o.outliers
    if n < 1 or k < 1:
        raise FormatError(
            f"{prefix}: in_features {o.in_features} and out_features {o.out_features}; the layer's settings in "
            "quantization_config must give both"
        )
    return n, k


def _centroids(prefix: str, parts: Parts, suffix: str, groups: int, entries: int, vector: int) -> np.ndarray:
    """[G, entries * v] as codebooks [G, 1, entries, v, 1]."""
    stored = take(parts, suffix, prefix)
    expect_dtype(stored, FLOATS, f"{prefix}.{suffix}")
    expect_shape(stored, (groups, entries * vector), f"{prefix}.{suffix}", f"{entries} centroids of {vector} rows")
    return np.ascontiguousarray(stored).reshape(groups, 1, entries, vector, 1)


def _indices(prefix: str, parts: Parts, o: Layer, rows: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Main and residual indices, int[rows, G * size]."""
    stored = take(parts, "indices", prefix)
    name = f"{prefix}.indices"
    width, second = bits_of(o.entries), bits_of(o.residual_entries)
    if not o.packed:
        main = _uint16(stored, name, (o.groups, rows, size))
        other = None
        if o.residual_entries:
            other = _uint16(take(parts, "res_indices", prefix), f"{prefix}.res_indices", (o.groups, rows, size))
        return _by_row(main), None if other is None else _by_row(other)
    expect_dtype(stored, (np.int32,), name)
    words = -(-size * (width + second) // 32)
    why = f"{o.groups} groups, {rows} rows of vectors, {size} indices of {width} + {second} bits in words of 32"
    expect_shape(stored, (o.groups, rows, words), name, why)
    entries = unpack_stream(stored, width + second, size)
    main = entries & ((1 << width) - 1)
    return _by_row(main), _by_row(entries >> width) if o.residual_entries else None


def unpack_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32[..., W] words -> int64[..., count] entries of 0..32 bits of each row's little-endian bit stream."""
    wide = np.ascontiguousarray(words).view(np.uint32).astype(np.uint64)
    wide = np.concatenate([wide, np.zeros((*wide.shape[:-1], 1), np.uint64)], axis=-1)
    start = np.arange(count, dtype=np.int64) * bits
    first, offset = start // 32, (start % 32).astype(np.uint64)
    pair = wide[..., first] | (wide[..., np.minimum(first + 1, wide.shape[-1] - 1)] << np.uint64(32))
    return ((pair >> offset) & np.uint64((1 << bits) - 1)).astype(np.int64)


def pack_stream(entries: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of `unpack_stream`: integer[..., count] -> int32[..., ceil(count * bits / 32)]."""
    count = entries.shape[-1]
    shifts = np.arange(bits, dtype=np.int64)
    stream = ((entries[..., None].astype(np.int64) >> shifts) & 1).astype(np.uint8).reshape(*entries.shape[:-1], -1)
    words = -(-count * bits // 32)
    stream = np.concatenate([stream, np.zeros((*entries.shape[:-1], words * 32 - stream.shape[-1]), np.uint8)], axis=-1)
    return np.packbits(stream, axis=-1, bitorder="little").view(np.int32)


def _uint16(stored: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    expect_dtype(stored, (np.int16, np.uint16, np.float16), name)
    expect_shape(stored, shape, name, "indices that are not packed (is_indice_packed is false), or outlier indices")
    return np.ascontiguousarray(stored).view(np.uint16).astype(np.int64)


def _by_row(entries: np.ndarray) -> np.ndarray:
    """[G, rows, size] -> [rows, G * size]."""
    return entries.swapaxes(0, 1).reshape(entries.shape[1], -1)


def _part(name: str, codes: np.ndarray, book: np.ndarray, row_pad: int, **fields: Any) -> VectorCodebook:
    return VectorCodebook.make(
        codes[..., None], book, code_bits=max(1, bits_of(book.shape[2])), name=name, row_pad=row_pad, **fields
    )


def _outliers(prefix: str, parts: Parts, o: Layer, out_features: int) -> VectorCodebook:
    rows = -(-out_features // o.outlier_vector)
    book = _centroids(prefix, parts, "outlier_centroids.weight", 1, o.outlier_entries, o.outlier_vector)
    name = f"{prefix}.outlier_indices"
    codes = _by_row(_uint16(take(parts, "outlier_indices", prefix), name, (1, rows, o.outliers)))
    return _part(name, codes, book, rows * o.outlier_vector - out_features)


def _perm(prefix: str, parts: Parts, in_features: int) -> np.ndarray:
    stored = take(parts, "perm", prefix, why="enable_perm is set.")
    expect_dtype(stored, (np.int16, np.uint16, np.int32, np.int64), f"{prefix}.perm")
    expect_shape(stored, (in_features,), f"{prefix}.perm", "one for each input")
    perm = stored.view(np.uint16).astype(np.int64) if stored.dtype.itemsize == 2 else stored.astype(np.int64)
    if not np.array_equal(np.sort(perm), np.arange(in_features)):
        raise FormatError(f"{prefix}.perm: is no permutation of 0..{in_features - 1}; the file is damaged")
    return perm


def dump(q: VectorCodebook) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    groups, _, entries, vector, _ = q.codebooks.shape
    width = bits_of(entries)
    main = _by_group(q, groups)
    found: Parts = {"centroids.weight": np.asarray(q.codebooks).reshape(groups, entries * vector)}
    if q.residual is not None:
        book = np.asarray(q.residual.codebooks)
        found["res_centroids.weight"] = book.reshape(groups, -1)
        second = _by_group(q.residual, groups)
    index_dtype = np.dtype(q.source.get("index_dtype"))
    if q.source.get("packed"):
        bits = width
        if q.residual is not None:
            main, bits = main | (second << width), width + bits_of(q.residual.codebooks.shape[2])
        found["indices"] = pack_stream(main, bits)
    else:
        found["indices"] = main.astype(np.uint16).view(index_dtype)
        if q.residual is not None:
            found["res_indices"] = second.astype(np.uint16).view(index_dtype)
    if q.outliers is not None:
        dtype = np.dtype(q.source.get("outlier_dtype"))
        found["outlier_centroids.weight"] = np.asarray(q.outliers.codebooks).reshape(1, -1)
        found["outlier_indices"] = _by_group(q.outliers, 1).astype(np.uint16).view(dtype)
    if q.order is not None:
        perm = np.argsort(np.asarray(q.order).astype(np.int64))
        dtype = np.dtype(q.source.get("perm_dtype"))
        found["perm"] = perm.astype(np.uint16).view(dtype) if dtype.itemsize == 2 else perm.astype(dtype)
    for field in ("scale", "bias"):
        norm = getattr(q, f"column_{field}") if q.row_scale is None else getattr(q, f"row_{field}")
        if norm is not None:
            found[f"weight_{field}"] = np.asarray(norm)
    return found


def _by_group(q: VectorCodebook, groups: int) -> np.ndarray:
    """Indices int64[G, rows, columns / G]."""
    codes = np.asarray(q.unpack())[..., 0].astype(np.int64)
    return np.ascontiguousarray(codes.reshape(codes.shape[0], groups, codes.shape[1] // groups).swapaxes(0, 1))


FORMAT = Format(
    name="vptq",
    methods=("vptq",),
    title="VPTQ: vector quantization with residual codebooks, outliers and permutation",
    parse=parse,
    markers=("centroids.weight", "indices"),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    deferrable=False,
)
