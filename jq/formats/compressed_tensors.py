"""compressed-tensors checkpoints (llm-compressor, vLLM): every compressed format, mixed schemes, old headers.

K = in_features, N = out_features, b = num_bits, dt = dtype of `weight_scale`. Stored tensors of a module:

  pack-quantized   weight_packed int32 [N, ceil(K*b/32)]: row n is one little-endian bit stream of codes q + 2**(b-1).
                   Before 0.13: 32 // b codes a word, code i at bit i*b, the word's upper bits unused.
                   weight_shape int64 [2]; weight_scale dt [N, K/G], [N, 1] or [1];
                   weight_zero_point int32 [ceil(N*b/32), groups], the same packing along N (int8 where per tensor);
                   weight_g_idx int32 [K] (actorder "group", before 0.20)
  int-quantized    weight int8 [N, K] (also where b < 8), weight_scale, weight_zero_point int8 like the scale
  float-quantized  weight float8_e4m3fn [N, K], weight_scale dt [1], [N, 1], [N, K/G] or [ceil(N/r), ceil(K/c)]
  naive-quantized  one of the two above
  mxfp8-quantized  weight float8_e4m3fn, weight_scale uint8 [N, K/32] = 127 + exponent
  nvfp4-pack, mxfp4-pack, mxfp6-pack   weight_packed uint8 [N, K*b/8], low bits first; weight_scale float8_e4m3fn
                   [N, K/16] with weight_global_scale float32 [1] (a divisor), or uint8 [N, K/32]
  sparse-*, marlin-24   see `compressed_tensors_sparse`
  any              input_scale, input_zero_point, input_global_scale (static activations), output_*

Dequantize: dt(q - zero) * scale, one rounding to dt; NVFP4 and MX: to bfloat16 whatever the model's dtype is.

Source: compressed-tensors 0.20.0 (compressors/, quantization/lifecycle/forward_helpers.py), 0.10.2 for what it dropped.
Files with quantization_status "frozen" hold float weights with scales beside them; they stay plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.errors import FormatError
from jq.formats import compressed_tensors_sparse as sparse
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take
from jq.formats.compressed_tensors_config import FLOAT_KINDS, Args, Group, Options, parse
from jq.qtensor import Affine, Grouping, NarrowFloat, QTensor, Source
from jq.qtensor.affine import check_indices, pack_zeros

NAME = "compressed-tensors"
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
FLOATS = ("float16", "bfloat16", "float32")
# Tensors that arithmetic on weights does not need: carried, and read where activations are quantized.
ACTIVATION_SUFFIXES = (
    *("input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "output_global_scale"),
)
WEIGHT_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("weight_global_scale", *sparse.SUFFIXES),
)
SUFFIXES = WEIGHT_SUFFIXES + ACTIVATION_SUFFIXES
# A module with one of these is compressed for sure; with `weight_scale` alone the dtype of the weight decides.
MARKERS = ("weight_packed", "compressed", "weight.compressed")


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Compressed modules: {prefix: {suffix: stored name}}.

    Raises:
      FormatError: a weight_scale without the weight it belongs to.
    """
    found: dict[str, dict[str, str]] = {}
    ordered = sorted(SUFFIXES, key=len, reverse=True)
    for name in names:
        suffix = next((s for s in ordered if name.endswith("." + s)), None)
        if suffix is not None:
            found.setdefault(name[: -len(suffix) - 1], {})[suffix] = name
    modules = {}
    for prefix, parts in found.items():
        if any(m in parts for m in MARKERS):
            modules[prefix] = parts
        elif "weight_scale" in parts:
            if "weight" not in parts:
                raise FormatError(
                    f"{parts['weight_scale']}: no weight, weight_packed or compressed beside it; the file is incomplete"
                )
            dtype = np.dtype(context.dtypes[parts["weight"]])
            if dtype.itemsize == 1:  # a float weight with scales is a frozen (fake-quantized) one
                modules[prefix] = parts
    return modules


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module's tensors as a QTensor; see the module docstring for what they are."""
    scheme = scheme_of(prefix, parts, options, context)
    if sparse.is_marlin(parts):
        tensor = sparse.load_marlin(prefix, parts, need_weights(scheme, prefix))
    elif sparse.is_bitmask(parts):
        tensor = sparse.load_bitmask(prefix, parts, scheme, LOADERS)
    else:
        args = need_weights(scheme, prefix)
        tensor = LOADERS[kind_of(prefix, parts, args)](prefix, parts, args, options)
    carried = {k: parts[k] for k in ACTIVATION_SUFFIXES if k in parts}
    with_bias = f"{prefix}.bias" in context.shapes
    return tensor.replace(
        extras={**tensor.extras, **carried}, activation=activation_of(prefix, scheme, carried, with_bias)
    )


def scheme_of(prefix: str, parts: Parts, options: Options, context: Context) -> Group | None:
    """The config group of a module whose tensors are compressed; None for one that is only sparse.

    Ignored names and targets of another naming (a vision model's prefix) do not undo what the file holds: where one
    scheme is left that could have written it, that is it.
    """
    found = options.group_of(prefix) or options.group_of(prefix, respect_ignore=False)
    if found is not None:
        return found
    if sparse.is_bitmask(parts) and "weight_scale" not in parts:
        return None
    schemes = {(g.weights, g.inputs, g.outputs): g for g in options.groups if g.weights is not None}
    if len(schemes) == 1:
        return next(iter(schemes.values()))
    targets = [t for g in options.groups for t in g.targets]
    raise FormatError(
        f"{prefix}: has quantized tensors ({', '.join(sorted(parts))}), but no target of config_groups matches it "
        f"(targets: {targets[:8]}); the config does not belong to this file"
    )


def need_weights(scheme: Group | None, prefix: str) -> Args:
    if scheme is None or scheme.weights is None:
        raise FormatError(f"{prefix}: has quantized tensors, but its scheme in config_groups has no `weights`")
    return scheme.weights


def kind_of(prefix: str, parts: Parts, args: Args) -> str:
    """Which loader reads a module: the stored tensors decide, and have to agree with the scheme."""
    if "weight_packed" in parts:
        found = "float" if parts["weight_packed"].dtype == np.uint8 else "int"
        kind = "small-float" if found == "float" else "packed-int"
    else:
        weight = take(parts, "weight", prefix)
        found = "int" if weight.dtype == np.int8 else "float"
        kind = "int8" if found == "int" else "float8"
    if found != args.type:
        stored = parts.get("weight_packed", parts.get("weight"))
        raise FormatError(
            f"{prefix}: stored as {None if stored is None else stored.dtype}, which is the {found} layout, but config_groups "
            f"says {args}; the config does not belong to this file"
        )
    return kind


def activation_of(prefix: str, scheme: Group | None, stored: Parts, with_bias: bool) -> Activation | None:
    """The description of input and output quantization, None where the scheme has neither."""
    if scheme is None or (scheme.inputs is None and scheme.outputs is None):
        return None
    needed = []
    for name, args in (("input", scheme.inputs), ("output", scheme.outputs)):
        if args is None or args.dynamic is True:
            continue
        if args.dynamic == "local" or args.strategy == "tensor_group":
            needed.append(f"{name}_global_scale")
        if args.dynamic is False:
            needed.append(f"{name}_scale")
            if not args.symmetric:
                needed.append(f"{name}_zero_point")
    for key in needed:
        if key not in stored:
            raise FormatError(f"{prefix}.{key}: missing; config_groups asks for static activations ({scheme.inputs})")
    pairs: list[tuple[str, Any]] = [("input", scheme.inputs)] if scheme.inputs else []
    if scheme.outputs:
        pairs += [("output", scheme.outputs), ("bias", with_bias)]
    return Activation("compressed_tensors", tuple(needed), tuple(pairs))


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


def _scale_back(q: Any, scales: Any) -> np.ndarray:
    rank = q.source.get("scale_rank", 2)
    scale = np.asarray(scales)
    return scale if rank == 2 else scale.reshape(-1) if rank == 1 else scale.reshape(())


# --- pack-quantized


def load_packed(prefix: str, parts: Parts, args: Args, options: Options) -> Affine:
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
    g_idx = _g_idx(prefix, parts, args, k, scale.shape[1], carried)
    zeros, form = _zeros(prefix, parts, args, (n, k), scale, carried, packed=True)
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


def dump_packed(q: Affine) -> Parts:
    n, k = q.shape
    b = q.code_bits
    parts: Parts = {"weight_scale": _scale_back(q, q.scales)}
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
        parts["weight_zero_point"] = _scale_back(q, np.asarray(q.zeros).astype(np.int32) - q.zero_point).astype(np.int8)
    return {**parts, **_carried(q)}


def _dense_words(q: Affine) -> np.ndarray:
    """The stored words of a row: the bit stream in whole int32 words."""
    codes = np.asarray(q.codes)
    if codes.dtype == np.uint32:
        return codes.view(np.int32)
    return pack_dense(np.asarray(q.unpack()), q.code_bits)


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
    if 32 % bits == 0 or k <= 32 // bits:
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


def _g_idx(prefix: str, parts: Parts, args: Args, k: int, groups: int, carried: Parts) -> np.ndarray | None:
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


def _zeros(
    prefix: str, parts: Parts, args: Args, shape: tuple[int, int], scale: np.ndarray, carried: Parts, *, packed: bool
) -> tuple[np.ndarray | None, str]:
    """Zero points in the form that `Affine` holds, and how they were stored: "", "packed" or "plain"."""
    stored = parts.get("weight_zero_point")
    offset = 1 << (args.num_bits - 1) if packed else 0
    name = f"{prefix}.weight_zero_point"
    if stored is None:
        if not args.symmetric:
            raise FormatError(f"{name}: missing, though config_groups says {args}; the file is incomplete")
        return None, ""
    if stored.dtype == np.int32 and packed:
        zeros = _unpack_zeros(name, stored, args.num_bits, shape[0], scale.shape)
        if args.symmetric:
            _expect_zero(zeros - offset, name)
            carried["weight_zero_point"] = stored
            return None, ""
        _expect_same(pack_dense(zeros.T, args.num_bits).T, pack_padded(zeros.T, args.num_bits).T, stored, carried)
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


def _unpack_zeros(name: str, stored: np.ndarray, bits: int, n: int, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [ceil(N*bits/32), groups], packed along N, -> codes int32 [N, groups], still offset by 2**(bits-1)."""
    dense, padded = math.ceil(n * bits / 32), math.ceil(n / (32 // bits))
    if stored.ndim != 2 or stored.shape[1] != shape[1] or stored.shape[0] not in (dense, padded):
        raise FormatError(
            f"{name}: found shape {stored.shape}, expected ({dense}, {shape[1]}): {bits}-bit zero points of {n} rows, "
            "packed along the rows"
        )
    rows = np.ascontiguousarray(stored.T)
    if 32 % bits and stored.shape[0] == padded and (padded != dense or not _uses_upper_bits(rows, bits)):
        return unpack_padded(rows, bits, n).T
    return _bits.unpack(rows.view(np.uint32), bits, n).T


def _uses_upper_bits(words: np.ndarray, bits: int) -> bool:
    return bool((words.view(np.uint32) >> np.uint32(32 // bits * bits)).any())


def _expect_same(dense: np.ndarray, padded: np.ndarray, stored: np.ndarray, carried: Parts) -> None:
    """Carries the stored words where neither packing of their codes gives them back (set padding bits)."""
    if not (np.array_equal(dense, stored) or np.array_equal(padded, stored)):
        carried["weight_zero_point"] = stored


def _expect_zero(values: np.ndarray, name: str) -> None:
    if np.asarray(values).astype(np.float32).any():
        raise FormatError(
            f"{name}: holds zero points other than 0, but config_groups says symmetric; the config does not belong to "
            "this file"
        )


# --- int8 in plain rows (int-quantized, naive-quantized)


def load_int8(prefix: str, parts: Parts, args: Args, options: Options) -> Affine:
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
    g_idx = _g_idx(prefix, parts, args, k, scale.shape[1], carried)
    zeros, form = _zeros(prefix, parts, args, (n, k), scale, carried, packed=False)
    b, pad, codes = 8, 0, weight
    if isinstance(weight, np.ndarray):
        low, high = args.limits
        fits = not weight.size or (weight.min() >= low and weight.max() <= high)
        b = args.num_bits if fits else 8
        if b == 8:
            codes = np.ascontiguousarray(weight).view(np.uint32 if k % 4 == 0 else np.uint8)
        else:
            codes = _bits.pack(weight, b)
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


def dump_int8(q: Affine) -> Parts:
    parts = {"weight_scale": _scale_back(q, q.scales)}
    if not isinstance(q.codes, QTensor):
        codes = np.asarray(q.codes)
        parts["weight"] = codes.view(np.int8) if q.code_bits == 8 else np.asarray(q.unpack()).astype(np.int8)
    if q.g_idx is not None:
        parts["weight_g_idx"] = np.asarray(q.g_idx)
    if q.source.get("zeros"):
        parts["weight_zero_point"] = _scale_back(q, np.asarray(q.zeros))
    return {**parts, **_carried(q)}


# --- float8 in plain rows (float-quantized, naive-quantized, mxfp8-quantized)


def load_float8(prefix: str, parts: Parts, args: Args, options: Options) -> NarrowFloat:
    weight = take(parts, "weight", prefix)
    expect_dtype(weight, (E4M3,), f"{prefix}.weight")
    return float8_codes(prefix, parts, args, weight.view(np.uint8), weight.shape)


def float8_codes(prefix: str, parts: Parts, args: Args, codes: Any, shape: tuple[int, ...]) -> NarrowFloat:
    """A `NarrowFloat` over e4m3 bit patterns uint8 [N, K] (or a nested `Sparse` of them)."""
    if len(shape) != 2:
        raise FormatError(f"{prefix}.weight: found shape {shape}, expected [out_features, in_features]")
    scale, grouping = scales_of(prefix, parts, args, (shape[0], shape[1]))
    carried: Parts = {}
    zeros, _ = _zeros(prefix, parts, args, (shape[0], shape[1]), scale, carried, packed=False)
    if zeros is not None:
        raise FormatError(f"{prefix}: an asymmetric float8 weight ({args}) is nothing that the library writes")
    held, kind, stored = _scale_codes(prefix, scale)
    made = NarrowFloat(
        codes,
        held,
        None,
        carried,
        kind="e4m3fn",
        scale_kind=kind,
        grouping=grouping,
        formula="own",
        dtype=str(scale.dtype) if kind == "float" else "bfloat16",
        source=source_of("float8", parts, **stored),
    )
    made.check(prefix)
    return made


def _scale_codes(prefix: str, scale: np.ndarray) -> tuple[np.ndarray, str, dict[str, Any]]:
    """Scales as `NarrowFloat` holds them, their kind, and the stored dtype where the kind does not tell it."""
    if scale.dtype == np.uint8:
        return scale, "e8m0", {}
    if scale.dtype in (E4M3, E8M0):
        kind = "e4m3" if scale.dtype == E4M3 else "e8m0"
        return scale.view(np.uint8), kind, {"scale_dtype": str(scale.dtype)}
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    return scale, "float", {}


def _stored_scale(q: NarrowFloat) -> np.ndarray:
    scale = _scale_back(q, q.scales)
    name = q.source.get("scale_dtype")
    return scale.view(np.dtype(getattr(ml_dtypes, name))) if name else scale


def dump_float8(q: NarrowFloat) -> Parts:
    parts = {"weight_scale": _stored_scale(q)}
    if not isinstance(q.codes, QTensor):
        parts["weight"] = np.asarray(q.codes).view(E4M3)
    return {**parts, **_carried(q)}


# --- fp4 and fp6 in bytes (nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp6-pack-quantized)


def load_small_float(prefix: str, parts: Parts, args: Args, options: Options) -> NarrowFloat:
    packed = take(parts, "weight_packed", prefix)
    b = args.num_bits
    if packed.ndim != 2 or b not in (4, 6) or packed.shape[1] * 8 % b:
        raise FormatError(f"{prefix}.weight_packed: found {packed.dtype} {packed.shape}, expected uint8 [N, K*{b}/8]")
    n, k = packed.shape[0], packed.shape[1] * 8 // b
    scale, grouping = scales_of(prefix, parts, args, (n, k))
    held, kind, stored = _scale_codes(prefix, scale)
    whole = parts.get("weight_global_scale")
    if whole is None and args.strategy == "tensor_group":
        take(parts, "weight_global_scale", prefix, why="NVFP4 scales are divided by it.")
    if whole is not None and (whole.size != 1 or whole.dtype != np.float32):
        raise FormatError(f"{prefix}.weight_global_scale: found {whole.dtype} {whole.shape}, expected one float32")
    codes = np.ascontiguousarray(packed).view(np.uint32 if packed.shape[1] % 4 == 0 else np.uint8)
    made = NarrowFloat(
        codes,
        held,
        whole,
        {},
        kind=FLOAT_KINDS[b],
        scale_kind=kind,
        grouping=grouping,
        formula="own" if whole is None else "global_divide",
        dtype="bfloat16",
        source=source_of("small-float", parts, **stored),
    )
    made.check(prefix)
    return made


def dump_small_float(q: NarrowFloat) -> Parts:
    parts = {"weight_packed": np.asarray(q.codes).view(np.uint8), "weight_scale": _stored_scale(q)}
    if q.global_scale is not None:
        parts["weight_global_scale"] = np.asarray(q.global_scale)
    return {**parts, **_carried(q)}


def _carried(q: Any) -> Parts:
    return {k: np.asarray(v) for k, v in q.extras.items()}


LOADERS: dict[str, Callable[..., Any]] = {
    "packed-int": load_packed,
    "int8": load_int8,
    "float8": load_float8,
    "small-float": load_small_float,
}
DUMPERS: dict[str, Callable[[Any], Parts]] = {
    "packed-int": dump_packed,
    "int8": dump_int8,
    "float8": dump_float8,
    "small-float": dump_small_float,
    "bitmask": sparse.dump_bitmask,
    "marlin": sparse.dump_marlin,
}


def dump(q: Any) -> Parts:
    """Stored tensors of a module, identical to those that were loaded."""
    parts = DUMPERS[q.source.get("kind")](q)
    if isinstance(getattr(q, "codes", None), QTensor) and q.source.get("kind") in ("int8", "float8"):
        parts.update(sparse.dump_bitmask(q.codes))
    return parts


FORMAT = Format(
    name=NAME,
    methods=("compressed-tensors", "compressed_tensors", "sparseml"),
    title="compressed-tensors (llm-compressor): int, FP8, NVFP4, MX, sparse, mixed schemes",
    parse=parse,
    markers=MARKERS,
    suffixes=("weight_packed", "compressed", "bitmask", "row_offsets", "scale_packed"),
    load=load,
    dump=dump,
    group=group,
)
