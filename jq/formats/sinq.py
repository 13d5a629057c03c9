"""SINQ: HQQ's packing with 8-bit scales and zeros, and a second scale for each input.

    W_q            uint8 or int32 (3, 5 and 6 bits): codes [N*K/G, G] in slabs of rows, the first slab in the high bits
    meta.scale.x   uint8 [32, C], C = N*K/G / 32, with meta.scale.s and meta.scale.m float16 [1, C]; flattened, one scale
                   for each group. Without quantized scales: meta.scale float16 [N*K/G, 1]
    meta.zero.x    uint8 [N*K/G, 1], with meta.zero.s and meta.zero.m float16 [1, 1]; or meta.zero
    meta.scale2    float16 [1, K]
    meta.awq_scale carried where it is there; it takes no part in dequantization

Dequantize: scale = float16(x * s) + m and zero alike; dt((q - zero) * scale * scale2) where a model of bfloat16 or
float32 computes in float32 with three roundings and one of float16 in float16. Plain values (shape, packing) lie in
model.safetensors.index.json.meta.json, which is kept as it is; what decoding needs follows from config and tensors.

Quantize: `jq.algorithms.sinq`, from the weight in float16, a tile for each group of columns.

Source: sinq 0.2.0 (sinqlinear_hf.py, quantizer.py, patch_model.py), whose layer runs on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.algorithms import sinq as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_once
from jq.formats.slabs import pack_slabs, unpack_slabs
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.scaled import Scaled

HALF = np.dtype(np.float16)
TILE = 32  # scales that share s and m lie C apart: x has this many rows
# bits -> (codes of a word, stored dtype)
PACKING = {
    8: (1, np.uint8),
    6: (5, np.int32),
    5: (6, np.int32),
    4: (2, np.uint8),
    3: (10, np.int32),
    2: (4, np.uint8),
    1: (8, np.uint8),
}
QUANTIZED = tuple(f"meta.{name}.{part}" for name in ("scale", "zero") for part in "xsm")
SUFFIXES = ("W_q", "meta.scale", "meta.zero", "meta.scale2", "meta.awq_scale", *QUANTIZED)
KNOWN = ("quant_method", "nbits", "group_size", "tiling_mode", "method", "modules_to_not_convert")


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the model."""

    bits: int = 4
    group_size: int = 64


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a width or group size that SINQ does not have.
      UnsupportedError: two-dimensional tiles, table codes.
    """
    for key in config.keys() - set(KNOWN):
        warn_once(context.label, f"quantization_config.{key} is not known to SINQ; ignored")
    label = f"{context.label}: quantization_config"
    bits, group = config.get("nbits", 4), config.get("group_size", 64)
    bits = 2 if bits == 1.58 else bits
    if type(bits) is not int or bits not in PACKING:
        raise FormatError(f"{label}.nbits is {bits!r}, expected one of {sorted(PACKING)}")
    if type(group) is not int or group < 1:
        raise FormatError(f"{label}.group_size is {group!r}, expected a positive integer")
    if config.get("tiling_mode", "1D") != "1D":
        raise UnsupportedError(f"{label}.tiling_mode {config['tiling_mode']!r} is not read; '1D' is")
    if "nf" in str(config.get("method", "sinq")).lower():
        raise UnsupportedError(f"{label}.method {config['method']!r} (table codes) is not read; 'sinq' and 'asinq' are")
    return Options(bits, group)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Scaled:
    """One module's tensors as an `Affine` with nested scales and zeros, times the scale of each input.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
    """
    o = options
    per, dtype = PACKING[o.bits]
    words, second = take(parts, "W_q", prefix), take(parts, "meta.scale2", prefix)
    expect_dtype(words, (dtype,), f"{prefix}.W_q")
    expect_dtype(second, (HALF,), f"{prefix}.meta.scale2")
    if words.ndim != 2 or words.shape[1] != o.group_size or second.ndim != 2 or second.shape[0] != 1:
        raise FormatError(
            f"{prefix}.W_q: found shape {tuple(words.shape)} with meta.scale2 of {tuple(second.shape)}, expected "
            f"(rows, {o.group_size}) and (1, in_features); check quantization_config.group_size"
        )
    k = second.shape[1]
    groups = parts["meta.scale.x" if "meta.scale.x" in parts else "meta.scale"].size if _has_scale(parts) else 0
    if k % o.group_size or groups < 1 or groups * o.group_size % k or -(-groups // per) != words.shape[0]:
        raise FormatError(
            f"{prefix}.W_q: {words.shape[0]} rows of {per} slabs, {groups} scales and {k} inputs in groups of "
            f"{o.group_size} do not fit together; check nbits and group_size of quantization_config"
        )
    n = groups * o.group_size // k
    unsigned = np.ascontiguousarray(words).view(np.uint32 if dtype is np.int32 else np.uint8)
    codes = unpack_slabs(unsigned, o.bits, per, high_first=True)[:groups].reshape(n, k)
    half = context.model_dtype == "float16"
    base = Affine.make(
        codes,
        _parameter(prefix, parts, "scale", n, k // o.group_size, TILE),
        code_bits=o.bits,
        name=prefix,
        zeros=_parameter(prefix, parts, "zero", n, k // o.group_size, groups),
        grouping=Grouping("block", 1, o.group_size),
        formula="sub_mul" if half else "f32",
        dtype="float16" if half else "float32",
    )
    quantized = tuple(name for name in ("scale", "zero") if f"meta.{name}.x" in parts)
    extras = {"meta.awq_scale": parts["meta.awq_scale"]} if "meta.awq_scale" in parts else {}
    made = Scaled(
        base,
        second.reshape(-1),
        extras,
        dtype=context.model_dtype,
        source=Source("sinq", (("quantized", quantized),)),
    )
    made.check(prefix)
    again = dump(made)["W_q"]
    if again.tobytes() != np.ascontiguousarray(words).tobytes():
        raise FormatError(f"{prefix}.W_q: bits behind the last code are set; the file is damaged")
    return made


def _has_scale(parts: Parts) -> bool:
    return "meta.scale.x" in parts or "meta.scale" in parts


def _parameter(prefix: str, parts: Parts, name: str, n: int, columns: int, rows: int) -> Any:
    """Scales or zeros [N, K/G]: float16, or a nested `Affine` of bytes stored as [rows, C]."""
    count = n * columns
    if f"meta.{name}.x" not in parts:
        stored = take(parts, f"meta.{name}", prefix)
        expect_dtype(stored, (HALF,), f"{prefix}.meta.{name}")
        expect_shape(stored, (count, 1), f"{prefix}.meta.{name}", "one for each group")
        return stored.reshape(n, columns)
    codes = parts[f"meta.{name}.x"]
    expect_dtype(codes, (np.uint8,), f"{prefix}.meta.{name}.x")
    if count % rows:
        raise FormatError(f"{prefix}.meta.{name}.x: {count} groups do not make {rows} rows")
    expect_shape(codes, (rows, count // rows), f"{prefix}.meta.{name}.x", f"{count} groups in {rows} rows")
    steps = []
    for part in "sm":
        step = take(parts, f"meta.{name}.{part}", prefix)
        expect_dtype(step, (HALF,), f"{prefix}.meta.{name}.{part}")
        expect_shape(step, (1, count // rows), f"{prefix}.meta.{name}.{part}", "one for each column of x")
        steps.append(step.reshape(-1) if count > rows else step.reshape(1, 1))
    grouping = Grouping("strided", 0, rows) if count > rows else Grouping("block", 0, 0)
    return Affine.make(
        codes.reshape(n, columns),
        steps[0],
        code_bits=8,
        name=f"{prefix}.meta.{name}",
        zeros=steps[1],
        grouping=grouping,
        formula="mul_add",
        dtype="float16",
    )


def dump(q: Scaled) -> Parts:
    """Stored tensors of a module."""
    base = q.base
    per, dtype = PACKING[base.code_bits]
    codes = np.asarray(base.unpack()).reshape(-1, base.grouping.cols)
    unsigned = np.uint32 if dtype is np.int32 else np.uint8
    found: Parts = {
        "W_q": pack_slabs(codes, base.code_bits, per, high_first=True, dtype=unsigned).view(dtype),
        "meta.scale2": np.asarray(q.column_scale).reshape(1, -1),
    }
    for name, value in (("scale", base.scales), ("zero", base.zeros)):
        if not isinstance(value, Affine):
            found[f"meta.{name}"] = np.asarray(value).reshape(-1, 1)
            continue
        steps = np.asarray(value.scales).size
        raw = _bits.unpack(np.asarray(value.codes), 8, value.shape[-1]).astype(np.uint8)
        found[f"meta.{name}.x"] = raw.reshape(-1, steps)
        found[f"meta.{name}.s"] = np.asarray(value.scales).reshape(1, -1)
        found[f"meta.{name}.m"] = np.asarray(value.zeros).reshape(1, -1)
    return {**found, **{k: np.asarray(v) for k, v in q.extras.items()}}


@dataclasses.dataclass(frozen=True)
class SINQ:
    """SINQ without activations (`method: "sinq"`): codes those of the library on a CPU.

    torch's exponentials and logarithms are not always correctly rounded, so a code may differ where a quotient is a tie:
    none of 1,441,792 over 16 random matrices, one of 8,192 of a matrix full of ties.

    Fields:
      bits: 8, 6, 5, 4, 3, 2 or 1.
      group_size: inputs that share a scale; a multiple of 8 that divides in_features.
    """

    bits: int = 4
    group_size: int = 64
    format = "sinq"

    def quantize(self, w: Any, name: str = "weight") -> Scaled:
        """w: float[N, K] -> codes, 8-bit scales and zero points; `dequantize()` gives w's dtype.

        Raises:
          FormatError: an option or a size that SINQ does not have.
          ValueError: scales or zero points that float16 does not hold.
        """
        options = parse({"nbits": self.bits, "group_size": self.group_size}, Context(label=name))
        w = np.asarray(w)
        group = self.group_size
        if w.ndim != 2 or group % 8 or w.shape[1] % group or w.size // group % TILE:
            raise FormatError(
                f"{name}: found shape {w.shape}; SINQ needs groups of {group} (a multiple of 8) that divide in_features, "
                f"and a number of groups that {TILE} divides"
            )
        half = w.astype(HALF)
        tiles = np.ascontiguousarray(half.reshape(w.shape[0], -1, group).swapaxes(0, 1))
        made = algorithm.quantize(tiles, self.bits, plain=algorithm.heavy_tailed(half))
        codes, scale, zero = (a.swapaxes(0, 1).reshape(-1, a.shape[2]) for a in made[:3])
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise ValueError(f"{name}: scales or zero points overflow float16, in which SINQ keeps them")
        per, dtype = PACKING[self.bits]
        unsigned = np.uint32 if dtype is np.int32 else np.uint8
        parts: Parts = {
            "W_q": pack_slabs(codes, self.bits, per, high_first=True, dtype=unsigned).view(dtype),
            "meta.scale2": made[3].reshape(1, -1),
        }
        for key, value, rows in (("scale", scale, TILE), ("zero", zero, zero.size)):
            for part, array in zip("xsm", algorithm.bytes_of(value, rows), strict=True):
                parts[f"meta.{key}.{part}"] = array
        return load(name, parts, options, Context({"dtype": str(w.dtype)}, label=name))

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "sinq",
            "nbits": self.bits,
            "group_size": self.group_size,
            "tiling_mode": "1D",
            "method": "sinq",
            "modules_to_not_convert": list(skip) if skip else None,
        }


FORMAT = Format(
    name="sinq",
    methods=("sinq",),
    title="SINQ: 8-bit scales and zeros, a second scale for inputs",
    parse=parse,
    markers=("W_q",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    methods_table={"SINQ": SINQ},
)
