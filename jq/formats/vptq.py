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
    weight_scale, weight_bias dt [K]

Dequantization (vptq 0.0.5.post1, ops/quant_gemm.py, torch path): main + residual rounded to dt, padding rows cut,
outliers in front, column c to input perm[c], times weight_scale, plus weight_bias, each rounded. A module is quantized
where config_for_layers names its path or shared_layer_config the last part of it. vptq masks the residual index with
2**b - 1 where it means 2**rb - 1; here all rb bits count, as the packer wrote them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_once
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
KNOWN = ("quant_method", "config_for_layers", "shared_layer_config", "enable_proxy_error", "modules_to_not_convert")
LAYER_KEYS = (
    "in_features",
    "out_features",
    "bias",
    "vector_lens",
    "num_centroids",
    "num_res_centroids",
    "group_num",
    "group_size",
    "outlier_size",
    "enable_norm",
    "enable_perm",
    "indices_as_float",
    "is_indice_packed",
    "vector_quant_dim",
    "norm_dim",
    "enable_proxy_error",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module's settings; -1 or 0 centroids and lengths mean that the part is not there."""

    vector: int
    entries: int
    residual_entries: int
    groups: int
    outlier_vector: int
    outlier_entries: int
    outliers: int
    norm: bool
    perm: bool
    packed: bool
    as_float: bool
    in_features: int | None
    out_features: int | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings by module path and by the last part of it."""

    layers: Mapping[str, Layer]
    shared: Mapping[str, Layer]

    def of(self, prefix: str) -> Layer | None:
        return self.layers.get(prefix) or self.shared.get(prefix.rpartition(".")[2])


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a setting that is missing or of the wrong kind.
      UnsupportedError: vectors along inputs, outliers with a residual.
    """
    for key in config.keys() - set(KNOWN):
        warn_once(context.label, f"quantization_config.{key} is not known to VPTQ; ignored")
    tables = []
    for key in ("config_for_layers", "shared_layer_config"):
        table = config.get(key) or {}
        if not isinstance(table, Mapping):
            raise FormatError(f"{context.label}: quantization_config.{key} must map names to settings")
        tables.append({name: _layer(f"{context.label}: {key}[{name!r}]", conf) for name, conf in table.items()})
    if not tables[0] and not tables[1]:
        raise FormatError(
            f"{context.label}: quantization_config has neither config_for_layers nor shared_layer_config; a VPTQ "
            "checkpoint names the settings of its layers there"
        )
    return Options(*tables)


def _layer(label: str, conf: Any) -> Layer:
    if not isinstance(conf, Mapping):
        raise FormatError(f"{label}: must be an object of settings, found {type(conf).__name__}")
    for key in conf.keys() - set(LAYER_KEYS):
        warn_once(label, f"{key} is not known to VPTQ; ignored")
    if conf.get("vector_quant_dim", "out") != "out":
        raise UnsupportedError(f"{label}: vector_quant_dim {conf['vector_quant_dim']!r}; only 'out' was ever written")

    def pair(key: str, default: tuple[int, int]) -> tuple[int, int]:
        value = conf.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(v) is int for v in value):
            raise FormatError(f"{label}: {key} is {value!r}, expected two integers [outliers, main]")
        return value[0], value[1]

    def number(key: str, default: int) -> int:
        value = conf.get(key, default)
        if type(value) is not int or value < default:
            raise FormatError(f"{label}: {key} is {value!r}, expected an integer of at least {default}")
        return value

    outlier_vector, vector = pair("vector_lens", (-1, -1))
    outlier_entries, entries = pair("num_centroids", (-1, -1))
    outlier_residual, residual = pair("num_res_centroids", (-1, -1))
    outliers = number("outlier_size", 0)
    if vector < 1 or not 1 <= entries <= 1 << 16 or residual > 1 << 16:
        raise FormatError(
            f"{label}: vectors of {vector} with {entries} main and {residual} residual centroids; expected vectors of "
            "1 or more and 1..65536 centroids (indices have 16 bits)"
        )
    has_outliers = outlier_vector > 1 and outlier_entries > 0
    if outliers and not has_outliers:
        raise FormatError(f"{label}: outlier_size {outliers}, but no outlier vectors in vector_lens and num_centroids")
    if has_outliers and outlier_residual > 0:
        raise UnsupportedError(f"{label}: outliers with a residual codebook; VPTQ has no decoder for them either")
    return Layer(
        vector=vector,
        entries=entries,
        residual_entries=max(residual, 0),
        groups=number("group_num", 1),
        outlier_vector=outlier_vector if has_outliers else 0,
        outlier_entries=outlier_entries if has_outliers else 0,
        outliers=outliers,
        norm=bool(conf.get("enable_norm", False)),
        perm=bool(conf.get("enable_perm", False)),
        packed=bool(conf.get("is_indice_packed", False)),
        as_float=bool(conf.get("indices_as_float", False)),
        in_features=conf.get("in_features"),
        out_features=conf.get("out_features"),
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
    out_features, in_features = _sizes(prefix, parts, o, context)
    size, rest = divmod(in_features - o.outliers, o.groups)
    if size < 1 or rest:
        raise FormatError(
            f"{prefix}: {in_features} inputs less {o.outliers} outliers do not make {o.groups} equal groups (group_num)"
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
            expect_shape(vector, (in_features,), f"{prefix}.{name}", "one for each input")
            fields["column_scale" if name == "weight_scale" else "column_bias"] = vector
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
    if k is None:
        k = next((parts[s].shape[0] for s in ("perm", "weight_scale") if s in parts), None)
    if n is None and f"{prefix}.bias" in context.shapes:
        n = context.shapes[f"{prefix}.bias"][0]
    if type(n) is not int or type(k) is not int or n < 1 or k < 1:
        raise FormatError(
            f"{prefix}: in_features {k!r} and out_features {n!r}; the layer's settings in quantization_config must give "
            "both"
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
    for name, value in (("weight_scale", q.column_scale), ("weight_bias", q.column_bias)):
        if value is not None:
            found[name] = np.asarray(value)
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
