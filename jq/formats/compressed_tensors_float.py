"""Float layouts of compressed-tensors: e4m3 rows, and fp4 or fp6 codes in bytes; see `compressed_tensors`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, expect_one, take
from jq.formats.compressed_tensors_config import FLOAT_KINDS, Args, Options
from jq.formats.compressed_tensors_parts import FLOATS, carried_of, scale_back, scales_of, source_of, zero_points
from jq.qtensor import NarrowFloat, QTensor

E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)


def load_float8(prefix: str, parts: Parts, args: Args, options: Options) -> NarrowFloat:
    """float-quantized and mxfp8-quantized: float8_e4m3fn rows [N, K]."""
    weight = take(parts, "weight", prefix)
    expect_dtype(weight, (E4M3,), f"{prefix}.weight")
    return float8_codes(prefix, parts, args, weight.view(np.uint8), weight.shape)


def float8_codes(prefix: str, parts: Parts, args: Args, codes: Any, shape: tuple[int, ...]) -> NarrowFloat:
    """A `NarrowFloat` over e4m3 bit patterns uint8 [N, K] (or a nested `Sparse` of them)."""
    if len(shape) != 2:
        raise FormatError(f"{prefix}.weight: found shape {shape}, expected [out_features, in_features]")
    scale, grouping = scales_of(prefix, parts, args, (shape[0], shape[1]))
    carried: Parts = {}
    zeros, _ = zero_points(prefix, parts, args, (shape[0], shape[1]), scale, carried, packed=False)
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


def _stored_scale(q: Any) -> np.ndarray:
    scale = scale_back(q, q.scales)
    name = q.source.get("scale_dtype")
    return scale.view(np.dtype(getattr(ml_dtypes, name))) if name else scale


def dump_float8(q: Any) -> Parts:
    """Inverse of `load_float8`."""
    parts = {"weight_scale": _stored_scale(q)}
    if not isinstance(q.codes, QTensor):
        parts["weight"] = np.asarray(q.codes).view(E4M3)
    return {**parts, **carried_of(q)}


def load_small_float(prefix: str, parts: Parts, args: Args, options: Options) -> NarrowFloat:
    """nvfp4-, mxfp4- and mxfp6-pack-quantized: codes of 4 or 6 bits in bytes, low bits first."""
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
    if whole is not None:
        expect_dtype(whole, (np.float32,), f"{prefix}.weight_global_scale")
        expect_one(whole, f"{prefix}.weight_global_scale")
    codes = _bits.as_words(packed)
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


def dump_small_float(q: Any) -> Parts:
    """Inverse of `load_small_float`."""
    parts = {"weight_packed": np.asarray(q.codes).view(np.uint8), "weight_scale": _stored_scale(q)}
    if q.global_scale is not None:
        parts["weight_global_scale"] = np.asarray(q.global_scale)
    return {**parts, **carried_of(q)}
