"""AMD Quark exports: integers of 2, 3, 4 and 8 bits, float8, and 4- and 6-bit floats in groups.

    weight             per_group integers are transposed: int32 [K, ceil(N/8)] (4 bits) or int8/uint8 [K, N]; else
                       int32 [N, ceil(K/8)] or int8/uint8 [N, K]. Eight nibbles of a word: codes 0 2 4 6 1 3 5 7 with
                       pack_method "reorder" (AWQ's order), else in order, lowest first. 2 bits: int2 int32, one code an
                       element; uint2 uint8, four codes a byte, the first in the highest bits. 3 bits (not in groups):
                       uint8 [N, K*3/8], a little-endian bit stream.
                       fp8_e4m3, fp8_e5m2 [N, K]; fp4 uint8 [N, K/2], low nibble first; fp6_e2m3, fp6_e3m2 uint8
                       [N, K*3/4], a little-endian bit stream
    weight_scale       scalar or [1], [N], [N, K/G] (integers: [K/G, N]), [N/bn, K/bk]; the model's dtype, or uint8
                       exponents (`scale_format` "e8m0")
    weight_zero_point  integers only: the shape of the scale, packed as the weight is; int4 symmetric layers store zeros
    input_scale, input_zero_point, output_scale, output_zero_point   static activation ranges

Dequantize: dt(float32(q - zero) * float32(scale)). Settings of a layer: the first pattern of `layer_quant_config`
that matches its name, else `layer_type_quant_config["Linear"]`, else `global_quant_config`.

Source: amd-quark 0.13 (torch/export/nn/modules, torch/utils/pack.py, torch/kernel/hw_emulation), which quantizes and
exports on a CPU. Quantize: `jq.algorithms.quark`. Not read: two-stage weights, mx containers, quantized biases, online rotations.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import quark as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take
from jq.formats.quark_config import Layer, Options, Spec, parse
from jq.qtensor import Affine, Grouping, NarrowFloat, QTensor, Source
from jq.qtensor.affine import pack_zeros

FLOATS = (np.float16, "bfloat16", np.float32)
RANGES = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
INTEGERS = {
    "int2": (2, True),
    "uint2": (2, False),
    "int3": (3, True),
    "int4": (4, True),
    "uint4": (4, False),
    "int8": (8, True),
    "uint8": (8, False),
}
FLOAT8 = {"fp8_e4m3": ("e4m3fn", ml_dtypes.float8_e4m3fn), "fp8_e5m2": ("e5m2", ml_dtypes.float8_e5m2)}
SMALL = {"fp4": ("e2m1", 4), "fp6_e2m3": ("e2m3", 6), "fp6_e3m2": ("e3m2", 6)}
# Bit position of code i of a word of eight, with and without "reorder".
SHIFTS = {True: (0, 16, 4, 20, 8, 24, 12, 28), False: (0, 4, 8, 12, 16, 20, 24, 28)}


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor | None:
    """One module's tensors; None for a layer left in floating point.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
      UnsupportedError: a kind of quantization that the module docstring lists as not read.
    """
    weight = take(parts, "weight", prefix)
    if weight.dtype in [np.dtype(d) for d in FLOATS]:
        return None  # exported as fake-quantized weights
    layer = options.of(prefix)
    if f"{prefix}.input_rotation" in context.shapes:
        raise UnsupportedError(f"{prefix}: rotates its inputs at run time (input_rotation), which is not done here")
    if layer.why_not or layer.weight is None:
        raise UnsupportedError(
            f"{prefix}: {layer.why_not or 'stores codes, but the config does not quantize its weight'}; weights of one "
            "stage are read"
        )
    spec = layer.weight
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"{prefix}.weight: found shape {tuple(weight.shape)}, expected two axes that are not empty")
    fields = {
        "dtype": context.model_dtype,
        "extras": {s: parts[s] for s in RANGES if s in parts},
        "activation": _activation(layer, parts),
    }
    if spec.dtype in INTEGERS:
        return _integers(prefix, parts, spec, options.reorder, fields)
    if spec.dtype in FLOAT8 or spec.dtype in SMALL:
        return _floats(prefix, parts, spec, fields)
    known = ", ".join([*INTEGERS, *FLOAT8, *SMALL])
    raise UnsupportedError(f"{prefix}.weight: Quark dtype {spec.dtype!r} is not read; {known} are")


def _activation(layer: Layer, parts: Parts) -> Activation | None:
    if layer.inputs is None and layer.outputs is None:
        return None
    pairs = tuple((name, spec) for name, spec in (("input", layer.inputs), ("output", layer.outputs)) if spec)
    return Activation("quark", tuple(s for s in RANGES if s in parts), pairs)


def _integers(prefix: str, parts: Parts, spec: Spec, reorder: bool, fields: dict[str, Any]) -> Affine:
    bits, signed = INTEGERS[spec.dtype]
    scale = take(parts, "weight_scale", prefix)
    zero = take(parts, "weight_zero_point", prefix, why="Quark stores zero points of symmetric layers too.")
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    grouped = spec.qscheme == "per_group"
    if grouped and scale.ndim != 2:
        raise FormatError(f"{prefix}.weight_scale: found shape {tuple(scale.shape)}, expected (groups, out_features)")
    stored = _unpacked(parts["weight"], f"{prefix}.weight", spec.dtype, reorder)
    if grouped:
        stored = stored[:, : scale.shape[1]].T
    n, k = stored.shape
    group = _group(prefix, spec, k)
    scales, grouping = _scales(prefix, scale.T if grouped else scale, spec, group, n, k)
    zeros = _zeros(prefix, zero, spec, bits, signed, reorder, scales.shape)
    offset = 1 << (bits - 1) if signed else 0
    symmetric = zeros.dtype.kind != "f" and bool((zeros == 0).all())
    codes = (stored ^ offset) - offset if symmetric else stored ^ offset
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
    again = dump(made)
    for suffix in ("weight", "weight_zero_point"):
        if again[suffix].tobytes() != np.ascontiguousarray(parts[suffix]).tobytes():
            raise FormatError(f"{prefix}.{suffix}: bits after the last code of a row are set; the file is damaged")
    return made


def _source(spec: Spec, scale: np.ndarray, zero: np.ndarray | None, reorder: bool, weight: np.ndarray) -> Source:
    pairs: list[tuple[str, Any]] = [("dtype", spec.dtype), ("qscheme", spec.qscheme), ("reorder", reorder)]
    pairs += [("scalar", scale.ndim == 0), ("weight_dtype", str(weight.dtype))]
    if zero is not None:
        pairs += [("zero_dtype", str(zero.dtype)), ("zero_scalar", zero.ndim == 0)]
    return Source("quark", tuple(pairs))


def _unpacked(stored: np.ndarray, name: str, dtype: str, reorder: bool) -> np.ndarray:
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


def _repacked(codes: np.ndarray, kind: str, reorder: bool, dtype: str) -> np.ndarray:
    """Inverse of `_unpacked`; codes beyond the last are zero."""
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


def _group(prefix: str, spec: Spec, k: int) -> int:
    if spec.qscheme == "per_group" and (spec.group_size < 1 or k % spec.group_size):
        raise FormatError(f"{prefix}: in_features {k} are no multiple of group_size {spec.group_size}")
    return spec.group_size


def _scales(prefix: str, scale: np.ndarray, spec: Spec, group: int, n: int, k: int) -> tuple[np.ndarray, Grouping]:
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
        codes = _unpacked(np.atleast_2d(zero), name, spec.dtype, reorder)
    if spec.qscheme == "per_group":
        codes = codes[:, : shape[0]].T
    else:
        codes = codes.reshape(-1)[: shape[0]]
    if codes.size != shape[0] * shape[1]:
        raise FormatError(f"{name}: found shape {tuple(zero.shape)}, which does not give {shape[0]} x {shape[1]} zeros")
    codes = np.ascontiguousarray(codes.reshape(shape))
    half = 1 << (bits - 1) if signed else 0
    return (codes ^ half) - half


def _floats(prefix: str, parts: Parts, spec: Spec, fields: dict[str, Any]) -> NarrowFloat:
    stored, scale = parts["weight"], take(parts, "weight_scale", prefix)
    exponents = spec.scale_format == "e8m0"
    if spec.scale_format not in ("e8m0", "float", "float32"):
        raise UnsupportedError(
            f"{prefix}.weight_scale: scale_format {spec.scale_format!r} is not read; e8m0 and floats are"
        )
    expect_dtype(scale, (np.uint8, ml_dtypes.float8_e8m0fnu) if exponents else FLOATS, f"{prefix}.weight_scale")
    if spec.dtype in FLOAT8:
        kind, dtype = FLOAT8[spec.dtype]
        expect_dtype(stored, (dtype,), f"{prefix}.weight")
        codes, width = np.ascontiguousarray(stored).view(np.uint8), 8
    else:
        kind, width = SMALL[spec.dtype]
        expect_dtype(stored, (np.uint8,), f"{prefix}.weight")
        codes = np.ascontiguousarray(stored)
    k = stored.shape[1] * 8 // width
    scales, grouping = _scales(prefix, scale, spec, _group(prefix, spec, k), stored.shape[0], k)
    if width < 8 and k * width % 32 == 0:
        codes = codes.view(np.uint32)
    made = NarrowFloat(
        codes,
        scales.view(np.uint8) if exponents else scales,
        kind=kind,
        scale_kind="e8m0" if exponents else "float",
        grouping=grouping,
        formula="f32",
        source=Source(
            "quark",
            (
                ("dtype", spec.dtype),
                ("scalar", scale.ndim == 0),
                ("qscheme", spec.qscheme),
                ("scale_dtype", str(scale.dtype)),
            ),
        ),
        **fields,
    )
    made.check(prefix)
    return made


def dump(q: Any) -> Parts:
    """Stored tensors of a module."""
    source = q.source
    assert source is not None
    scale, extras = np.asarray(q.scales), {k: np.asarray(v) for k, v in q.extras.items()}
    scheme = source.get("qscheme")
    if scheme in ("per_tensor", "per_channel"):
        scale = scale.reshape(() if source.get("scalar") else -1)
    if isinstance(q, NarrowFloat):
        if q.scale_kind == "e8m0":
            scale = scale.view(np.dtype(source.get("scale_dtype")))
        codes = np.ascontiguousarray(np.asarray(q.codes)).view(np.uint8)
        dtype = FLOAT8.get(source.get("dtype"))
        return {"weight": codes.view(dtype[1]) if dtype else codes, "weight_scale": scale, **extras}
    bits, signed = INTEGERS[source.get("dtype")]
    reorder, grouped = source.get("reorder"), scheme == "per_group"
    offset = 1 << (bits - 1) if signed and not q.signed else 0
    codes = np.asarray(q.unpack()) - offset
    zeros = np.zeros(np.asarray(q.scales).shape, np.int32) if q.zeros is None else np.asarray(q.group_zeros())
    floating = zeros.dtype.kind not in "iu"
    zeros = zeros if floating else zeros - (offset if q.zeros is not None else 0)
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
        stored_zeros = _repacked(zeros, source.get("dtype"), reorder, zero_dtype)
    return {
        "weight": _repacked(np.ascontiguousarray(codes), source.get("dtype"), reorder, source.get("weight_dtype")),
        "weight_scale": np.ascontiguousarray(scale).reshape(scale.shape),
        "weight_zero_point": np.ascontiguousarray(stored_zeros).reshape(stored_zeros.shape),
        **extras,
    }


@dataclasses.dataclass(frozen=True)
class Quark:
    """Weights by their largest magnitude or range; codes and scales identical to the library's on a CPU.

    Fields:
      dtype: "int2", "uint2", "int3", "int4", "uint4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "fp4", "fp6_e2m3" or
        "fp6_e3m2" (the last three as OCP MX: power-of-two scales for groups of 32).
      qscheme: "per_tensor", "per_channel" or "per_group".
      group_size: inputs that share a scale, for "per_group".
      symmetric: integers without zero points.
    """

    dtype: str = "int4"
    qscheme: str = "per_group"
    group_size: int = 32
    symmetric: bool = True
    format = "quark"

    def quantize(self, w: Any, name: str = "weight") -> QTensor:
        """w: float[N, K] -> codes and scales; scales are formed and stored in w's dtype, as in the library.

        Raises:
          FormatError: an option that Quark does not have, or sizes that its packing does not take.
        """
        w = np.asarray(w)
        context = Context({"dtype": str(w.dtype)}, label=name)
        options = parse(self.config(), context)
        spec = options.default.weight
        assert spec is not None
        if w.ndim != 2 or 0 in w.shape or (self.qscheme == "per_group" and w.shape[1] % self.group_size):
            raise FormatError(f"{name}: found shape {w.shape}; groups of {self.group_size} do not divide it")
        n, k = w.shape
        rows = {
            "per_tensor": (1, n * k),
            "per_channel": (n, k),
            "per_group": (n, k // self.group_size, self.group_size),
        }
        if self.qscheme not in rows:
            raise FormatError(f"{name}: qscheme {self.qscheme!r}; per_tensor, per_channel and per_group are known")
        groups = w.astype(np.float32).reshape(rows[self.qscheme])
        if self.dtype in INTEGERS:
            parts = self._integers(groups, w, name)
        elif self.dtype in FLOAT8:
            values, scale = algorithm.float8(groups, FLOAT8[self.dtype][1], w.dtype)
            parts = {"weight": values.reshape(n, k), "weight_scale": self._shaped(scale)}
        elif self.dtype in SMALL and self.qscheme == "per_group":
            codes, exponents = algorithm.powers(groups, self.dtype)
            packed = np.ascontiguousarray(_bits.pack(codes.reshape(n, k), SMALL[self.dtype][1])).view(np.uint8)
            parts = {"weight": packed, "weight_scale": exponents}
        else:
            raise FormatError(f"{name}: Quark has no dtype {self.dtype!r} with {self.qscheme}")
        made = load(name, parts, options, context)
        assert made is not None
        return made

    def _integers(self, groups: np.ndarray, w: np.ndarray, name: str) -> Parts:
        bits, signed = INTEGERS[self.dtype]
        if self.dtype == "int3" and (self.qscheme == "per_group" or w.shape[0] % 8 or w.shape[1] % 8):
            raise FormatError(f"{name}: Quark stores 3 bits per tensor or channel, sizes multiples of 8")
        codes, scale, zero = algorithm.integers(groups, bits, signed=signed, symmetric=self.symmetric, dtype=w.dtype)
        if self.qscheme == "per_tensor":
            scale = scale.astype(np.float32)  # a value of w's dtype, stored wider
        codes, scale, zero = codes.reshape(w.shape), self._shaped(scale), self._shaped(zero)
        if self.qscheme == "per_group":
            codes, scale, zero = codes.T, np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)
        stored = self.dtype if bits == 8 else "uint8"

        def packed(values: np.ndarray) -> np.ndarray:
            return _repacked(np.ascontiguousarray(values), self.dtype, True, stored)

        scalar = zero.ndim == 0
        zeros = zero.astype(stored if bits == 8 else np.int32) if scalar else packed(zero)
        return {"weight": packed(codes), "weight_scale": scale, "weight_zero_point": zeros}

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        """[..., 1] as it is stored: a scalar, [N] or [N, K/G]."""
        return values.reshape(()) if self.qscheme == "per_tensor" else values[..., 0]

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        grouped = self.qscheme == "per_group"
        weight = {
            "dtype": self.dtype,
            "qscheme": self.qscheme,
            "ch_axis": -1 if grouped else 0 if self.qscheme == "per_channel" else None,
            "group_size": self.group_size if grouped else None,
            "symmetric": self.symmetric,
            "is_dynamic": False,
            "round_method": "half_even",
            "scale_type": "float",
            "scale_format": "e8m0" if self.dtype in SMALL else None,
            "zero_point_type": "int32",
        }
        layer = {"weight": weight, "input_tensors": None, "output_tensors": None, "bias": None, "target_device": None}
        return {
            "quant_method": "quark",
            "global_quant_config": layer,
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": list(skip or []),
            "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []},
            "quant_mode": "eager_mode",
        }


FORMAT = Format(
    name="quark",
    methods=("quark",),
    title="AMD Quark: 2-, 3-, 4- and 8-bit integers, float8, fp4 and fp6",
    parse=parse,
    markers=("weight_scale",),
    suffixes=("weight", "weight_scale", "weight_zero_point", *RANGES),
    load=load,
    dump=dump,
    deferrable=False,
    methods_table={"Quark": Quark},
)
