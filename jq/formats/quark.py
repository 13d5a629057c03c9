"""AMD Quark exports: integers of 2, 3, 4 and 8 bits, float8, and 4- and 6-bit floats in groups.

    weight             per_group integers are transposed: int32 [K, ceil(N/8)] (4 bits) or int8/uint8 [K, N]; else
                       int32 [N, ceil(K/8)] or int8/uint8 [N, K]. Eight nibbles of a word: codes 0 2 4 6 1 3 5 7 with
                       pack_method "reorder" (AWQ's order), else in order, lowest first. 2 bits: int2 int32, one code an
                       element; uint2 uint8, four codes a byte, the first in the highest bits. 3 bits (not in groups):
                       uint8 [N, K*3/8], a little-endian bit stream.
                       fp8_e4m3, fp8_e5m2 [N, K]; fp4 uint8 [N, K/2], low nibble first; fp6_e2m3, fp6_e3m2 uint8
                       [N, K*3/4], a little-endian bit stream
    weight_scale       scalar or [1], [N], [N, K/G] (integers: [K/G, N]), [N/bn, K/bk]; the model's dtype, or uint8
                       exponents (`scale_format` "e8m0"), uint8 numbers of 5 exponent and 3 mantissa bits ("e5m3")
    weight_scale_2     float32 scalar that float8 block scales are multiplied by ("nvfp4")
    weight_zero_point  integers only: the shape of the scale, packed as the weight is; int4 symmetric layers store zeros
    input_scale, input_zero_point, output_scale, output_zero_point   static activation ranges
Two stages of values ("int4_fp8"): weight_scale is the scalar of the first (float8), weight_scale_2 [N] and
weight_zero_point_2 belong to the integers. "mx" containers have the weight alone: uint8 [N, K/32 * 17] (fp4) or
[N, K/32 * 25] (fp6), a signed exponent and 32 codes at a time.

Dequantize: dt(float32(q - zero) * float32(scale)), of two stages dt(float32(q) * scale_2 * scale). Settings of a layer:
the first pattern of `layer_quant_config` that matches its name, else `layer_type_quant_config["Linear"]`, else
`global_quant_config`.

Source: amd-quark 0.13 (torch/export/nn/modules, torch/utils/pack.py, torch/kernel/hw_emulation), which quantizes and
exports on a CPU. Quantize: `jq.algorithms.quark`. input_rotation [n, n]: inputs are rotated at run time in blocks of n, by a Hadamard matrix
(int8) or a trained one (floats), times input_prescale [K] before. shared_input_rotation_<n>: one for every layer of
`online_rotation_layers` that has none of its own. Not read: quantized biases; mx6, mx9, bfp16 and int16, which Quark
itself does not store; "amdfp4_global", whose block scales it stores as integers that have wrapped around.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jq import rotation
from jq.activations import FLOAT, Activation
from jq.algorithms import blocks
from jq.algorithms import quark as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, group_by_prefix, take
from jq.formats.quark_config import Layer, Options, Spec, parse
from jq.formats.quark_floats import (
    FLOAT8,
    SMALL,
    dump_floats,
    in_features,
    load_container,
    load_floats,
    packed_codes,
    shape_of,
)
from jq.formats.quark_integers import (
    INTEGERS,
    dump_integers,
    group_of,
    load_integers,
    repacked,
    scales_of,
    stored_scale,
)
from jq.qtensor import NarrowFloat, QTensor
from jq.qtensor.affine import check_finite

FLOATS = (np.float16, "bfloat16", np.float32)
RANGES = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_scale_2", "output_scale_2")
SUFFIXES = (
    *("weight", "weight_scale", "weight_zero_point", "weight_scale_2", "weight_zero_point_2", *RANGES),
    *("input_rotation", "input_prescale"),
)
SHARED = "shared_input_rotation_"


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
    made = _load_weight(prefix, parts, spec, options, fields)
    shared = f"~{SHARED}{options.rotation_size or made.shape[1]}"
    if "input_rotation" in parts or shared in parts:
        return _with_rotation(prefix, made, parts, shared)
    lost = next((s for s in parts if s == "input_prescale" or s.startswith("~")), None)
    if lost is not None:
        raise FormatError(f"{prefix}.input_rotation: missing, and no shared one has its size; {lost} is there")
    return made


def _load_weight(prefix: str, parts: Parts, spec: Spec, options: Options, fields: dict[str, Any]) -> Any:
    weight = parts["weight"]
    if spec.dtype in INTEGERS:
        return load_integers(prefix, parts, spec, options.reorder, fields)
    if spec.dtype == "mx":
        return load_container(prefix, weight, spec, fields)
    if spec.dtype in FLOAT8 or spec.dtype in SMALL:
        scale = take(parts, "weight_scale", prefix)
        if spec.first is not None:
            raise UnsupportedError(f"{prefix}: {spec.dtype} rounded in two stages is not read, integers are")
        shaped = scales_of(
            prefix, scale, spec, group_of(prefix, spec, in_features(weight, spec)), *shape_of(weight, spec)
        )
        return load_floats(prefix, parts, spec, *shaped, fields)
    known = ", ".join([*INTEGERS, *FLOAT8, *SMALL, "mx"])
    raise UnsupportedError(f"{prefix}.weight: Quark dtype {spec.dtype!r} is not read; {known} are")


def _with_rotation(prefix: str, tensor: Any, parts: Parts, shared: str) -> Any:
    """The weight with the rotation of its inputs: its own, or the stored one that `shared` names.

    Hadamard matrices are stored as int8. Over all inputs Quark applies them in steps that are rounded each, else as a
    float64 product; trained matrices are floats.
    """
    own = "input_rotation" in parts
    matrix, name, k = parts["input_rotation" if own else shared], f"{prefix}.input_rotation", tensor.shape[1]
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or 0 in matrix.shape or k % matrix.shape[0]:
        raise FormatError(f"{name}: found shape {tuple(matrix.shape)}, expected a square that divides {k} inputs")
    hadamard = matrix.dtype == np.int8
    if not hadamard:
        expect_dtype(matrix, (np.float64, *FLOATS), name)
    made, arrays = rotation.held(matrix, scaled=hadamard)
    if hadamard and made.kind != "hadamard":
        raise FormatError(f"{name}: an int8 matrix that is no Hadamard matrix; the file is damaged")
    key, sums = "~" if own else "~shared.", "steps" if matrix.shape[0] == k else "single"
    made = dataclasses.replace(made, key=key, sums=sums)
    arrays = {f"{key}{part}": array for part, array in arrays.items()}
    kept = {"input_rotation": matrix} if own and not hadamard else {}
    prepare = "rotate"
    if "input_prescale" in parts:
        scale = parts["input_prescale"]
        expect_dtype(scale, FLOATS, f"{prefix}.input_prescale")
        expect_shape(scale, (k,), f"{prefix}.input_prescale", "one for each input")
        check_finite(scale, f"{prefix}.input_prescale")
        prepare, arrays["input_prescale"] = "prescale_rotate", scale
    activation = tensor.activation or Activation(FLOAT)
    activation = dataclasses.replace(
        activation,
        parameters=(*activation.parameters, *arrays),
        options=(*activation.options, ("prepare", prepare), ("rotate_input", (made,))),
    )
    return tensor.replace(extras={**tensor.extras, **arrays, **kept}, activation=activation)


def _activation(layer: Layer, parts: Parts) -> Activation | None:
    if layer.inputs is None and layer.outputs is None:
        return None
    pairs = tuple((name, spec) for name, spec in (("input", layer.inputs), ("output", layer.outputs)) if spec)
    return Activation("quark", tuple(s for s in RANGES if s in parts), pairs)


def dump(q: Any) -> Parts:
    """Stored tensors of a module."""
    extras = {k: np.asarray(v) for k, v in q.extras.items() if not k.startswith("~")}
    if "~signs" in q.extras:
        extras["input_rotation"] = rotation.matrix_of(q.activation.get("rotate_input")[0], q.extras)
    if isinstance(q, NarrowFloat):
        return dump_floats(q, stored_scale(q), extras)
    return {**dump_integers(q), **extras}


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
        w = blocks.weight(w, name)
        context = Context({"dtype": str(w.dtype)}, label=name)
        options = parse(self.config(), context)
        spec = options.default.weight
        assert spec is not None
        if self.qscheme == "per_group" and w.shape[1] % self.group_size:
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
            packed = packed_codes(codes.reshape(n, k), self.dtype)
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
            return repacked(np.ascontiguousarray(values), self.dtype, True, stored)

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


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules with a scale, and "mx" containers, which have none: {prefix: {suffix: stored name}}."""
    found = group_by_prefix(names, ("weight_scale",), SUFFIXES)
    for name in names:
        prefix = name.removesuffix(".weight")
        if prefix != name and prefix not in found and np.dtype(context.dtypes[name]) == np.uint8:
            spec = options.of(prefix).weight
            if spec is not None and spec.dtype == "mx":
                found[prefix] = {
                    s: f"{prefix}.{s}"
                    for s in ("weight", *RANGES, "input_rotation", "input_prescale")
                    if f"{prefix}.{s}" in context.dtypes
                }
    shared = {f"~{n.rpartition('.')[2]}": n for n in names if n.rpartition(".")[2].startswith(SHARED)}
    if shared and not options.rotated:
        raise UnsupportedError(
            f"{next(iter(shared.values()))}: a rotation that layers share, and the config does not say which ones "
            "(algo_config: online_config.online_rotation_layers)"
        )
    for prefix in found.keys() & set(options.rotated) if shared else ():
        if "input_rotation" not in found[prefix]:
            found[prefix] |= shared
    return found


FORMAT = Format(
    name="quark",
    methods=("quark",),
    title="AMD Quark: 2-, 3-, 4- and 8-bit integers, float8, fp4 and fp6",
    parse=parse,
    markers=("weight_scale",),
    suffixes=SUFFIXES,
    group=group,
    load=load,
    dump=dump,
    deferrable=False,
    methods_table={"Quark": Quark},
)
