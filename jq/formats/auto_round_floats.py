"""AutoRound's float exports: NVFP4, MXFP4, MXFP8, MXINT4 and FP8 (see `jq.formats.auto_round`).

    nv_fp   weight_packed uint8 [N, K/2] (e2m1, low nibble first), weight_scale float8_e4m3fn [N, K/16],
            weight_global_scale float32 [1] (a divisor), input_global_scale float32 [1]; "nvfp4_v2": weight_scale uint8 of
            5 exponent and 3 mantissa bits and no global scale
    mx_fp   weight_packed uint8 [N, K/2] or weight float8_e4m3fn [N, K], weight_scale uint8 [N, K/32] = 127 + exponent
    mx_int  weight_packed uint8 [N, K/2]: a sign (the high bit) and quarters 0 .. 7, weight_scale as for mx_fp
    fp      weight float8 [N, K], weight_scale dt [N] or [1], input_scale dt [1]; in blocks weight_scale_inv dt [N/r, K/c]

With a rotation_config (nv_fp and mx_fp) the inputs are rotated in blocks of `block_size`, before they are quantized, by a
Hadamard matrix; "random_hadamard" stores its transpose in each layer, `hadamard_matrix` dt [n, n]. The library's hooks
would rotate inputs of layers left in floating point, too, whose weights are not rotated; here they are not.

Dequantize, in float32: NVFP4 (value * (1 / global)) * scale, the others value * scale, then rounded to the model's
dtype; FP8 of one scale a row in the dtype of the scale. Source: auto-round 0.16.1 (experimental/qmodules,
export/export_to_autoround), whose layers run on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import rotation
from jq.activations import FLOAT, Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Parts, expect_dtype, expect_one, expect_shape, take, true_or_false
from jq.qtensor import Grouping, NarrowFloat, Source
from jq.qtensor.affine import check_finite
from jq.qtensor.rotated import hadamard
from jq.rotation import Rotation

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)
SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale"),
    *("input_global_scale", "input_scale", "hadamard_matrix"),
)
MARKERS = ("weight_packed", "weight_scale", "weight_scale_inv")
INPUTS = ("input_global_scale", "input_scale")


@dataclasses.dataclass(frozen=True)
class FloatOptions:
    """Kind of the data ("nv_fp", "nvfp4_v2", "mx_fp", "mx_int", "fp"), how inputs are quantized ("" = not) and rotated.

    Fields:
      rotation: "", "hadamard" or "random_hadamard", in blocks of `block` inputs.
    """

    kind: str
    inputs: str = ""
    input_bits: int = 16
    dynamic: bool = True
    rotation: str = ""
    block: int = 0


def parse_floats(config: Mapping[str, Any], kind: str, label: str) -> FloatOptions:
    """Settings of a config whose data_type is a float, or int with shared exponents.

    Raises:
      UnsupportedError: another data type.
    """
    known = ("nvfp4_v2", "nv_fp", "mx_fp", "mx_int", "fp")
    name = next((name for name in known if kind.startswith(name)), None)
    if name is None:
        raise UnsupportedError(f"{label}: AutoRound's data_type {kind!r} is not read; int, {', '.join(known)} are")
    bits = int(config.get("act_bits") or 16)
    inputs = str(config.get("act_data_type") or kind) if bits < 16 else ""
    dynamic = true_or_false(config, "act_dynamic", f"{label}: quantization_config")
    return FloatOptions(name, inputs, bits, dynamic, *_rotation(config, name, label))


def _rotation(config: Mapping[str, Any], kind: str, label: str) -> tuple[str, int]:
    """(type, block) of rotation_config, which AutoRound exports for data with scales of 16 or 32 inputs alone."""
    found = config.get("rotation_config")
    if not found:
        return "", 0
    label = f"{label}: quantization_config.rotation_config"
    if not isinstance(found, Mapping):
        raise FormatError(f"{label} is {found!r:.80}, expected an object")
    how = found.get("hadamard_type") or "hadamard"
    online = found.get("backend") not in ("inplace",) and not found.get("fuse_online_to_weight")
    if not kind.startswith(("nv", "mx_fp")) or not online or how not in ("hadamard", "random_hadamard"):
        raise UnsupportedError(
            f"{label} is {dict(found)!r:.160}: rotations around whole blocks (QuaRot) are not done here, Hadamard matrices "
            "on the inputs of MXFP and NVFP4 layers are"
        )
    block = found.get("block_size") or 32
    if type(block) is not int or block < 1:
        raise FormatError(f"{label}.block_size is {block!r:.60}, expected a positive integer")
    return how, block


def group(names: list[str], options: Any, context: Context) -> dict[str, dict[str, str]]:
    """Modules with packed codes, or with a one-byte weight and scales."""
    there, found = set(names), {}
    for name in names:
        prefix, _, suffix = name.rpartition(".")
        if suffix in MARKERS and prefix not in found:
            parts = {s: f"{prefix}.{s}" for s in SUFFIXES if f"{prefix}.{s}" in there}
            stored = parts.get("weight")
            if "weight_packed" in parts or (stored and np.dtype(context.dtypes[stored]).itemsize == 1):
                found[prefix] = parts
    return found


def load_floats(prefix: str, parts: Parts, options: FloatOptions, context: Context) -> NarrowFloat:
    """One module's tensors as a `NarrowFloat`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that do not fit together.
    """
    name = f"{prefix}.weight_scale"
    made = _packed(prefix, parts, options, name) if "weight_packed" in parts else _float8(prefix, parts, name)
    extras = {k: parts[k] for k in INPUTS if k in parts}
    made = made.replace(
        extras=extras,
        activation=_activation(options, extras),
        dtype=str(made.scales.dtype) if made.formula == "own" else context.model_dtype,
    )
    made.check(prefix)
    return _with_rotation(prefix, made, parts, options)


def _with_rotation(prefix: str, tensor: NarrowFloat, parts: Parts, options: FloatOptions) -> NarrowFloat:
    """The weight with the rotation of its inputs, whose matrix is rounded to their dtype."""
    stored, name, size = parts.get("hadamard_matrix"), f"{prefix}.hadamard_matrix", options.block
    if options.rotation != "random_hadamard":
        if stored is not None:
            raise FormatError(f"{name}: is there, but rotation_config asks for {options.rotation or 'nothing'}")
        if not options.rotation:
            return tensor
    if tensor.in_features % size:
        raise FormatError(
            f"{prefix}: blocks of {size} (rotation_config.block_size) do not divide {tensor.in_features} inputs"
        )
    if options.rotation == "hadamard":
        if size & (size - 1):
            raise FormatError(f"{prefix}: a Hadamard matrix of rotation_config.block_size {size} is no power of two")
        made, held = rotation.held(hadamard(size), scaled=True)
        made = dataclasses.replace(made, key="~", sums="own")
        arrays = {f"~{part}": array for part, array in held.items()}
    else:
        matrix = take(parts, "hadamard_matrix", prefix, why="rotation_config says random_hadamard.")
        expect_dtype(matrix, FLOATS, name)
        expect_shape(matrix, (size, size), name, "rotation_config.block_size")
        check_finite(matrix, name)
        made = Rotation("dense", size, transposed=True, key="hadamard_", sums="own")
        arrays = {"hadamard_matrix": matrix}
    activation = tensor.activation or Activation(FLOAT)
    activation = dataclasses.replace(
        activation,
        parameters=(*activation.parameters, *arrays),
        options=(*activation.options, ("prepare", "rotate"), ("rotate_input", (made,))),
    )
    return tensor.replace(extras={**tensor.extras, **arrays}, activation=activation)


def _packed(prefix: str, parts: Parts, options: FloatOptions, name: str) -> NarrowFloat:
    packed, scale = parts["weight_packed"], take(parts, "weight_scale", prefix)
    expect_dtype(packed, (np.uint8,), f"{prefix}.weight_packed")
    if packed.ndim != 2 or scale.ndim != 2 or not scale.shape[1] or 2 * packed.shape[1] % scale.shape[1]:
        raise FormatError(f"{name}: found shape {scale.shape} beside packed codes of {packed.shape}")
    n, k = packed.shape[0], 2 * packed.shape[1]
    expect_shape(scale, (n, scale.shape[1]), name, "one for each group of a row")
    nv = options.kind in ("nv_fp", "nvfp4_v2")
    expect_dtype(scale, (E4M3,) if options.kind == "nv_fp" else (np.uint8,), name)
    whole = None
    if options.kind == "nv_fp":
        whole = take(parts, "weight_global_scale", prefix, why="NVFP4 scales are divided by it.")
        expect_dtype(whole, (np.float32,), f"{prefix}.weight_global_scale")
        expect_one(whole, f"{prefix}.weight_global_scale")
    return NarrowFloat(
        np.ascontiguousarray(packed).view(np.uint32 if packed.shape[1] % 4 == 0 else np.uint8),
        scale.view(np.uint8),
        whole,
        kind="e0m3" if options.kind == "mx_int" else "e2m1",
        scale_kind="e4m3" if options.kind == "nv_fp" else "e5m3" if nv else "e8m0",
        grouping=Grouping("block", 1, k // scale.shape[1]),
        formula="global_reciprocal" if whole is not None else "f32",
        source=Source("auto-round", (("kind", "packed"),)),
    )


def _float8(prefix: str, parts: Parts, name: str) -> NarrowFloat:
    weight = take(parts, "weight", prefix)
    expect_dtype(weight, (E4M3, E5M2), f"{prefix}.weight")
    if weight.ndim != 2:
        raise FormatError(f"{prefix}.weight: found shape {weight.shape}, expected [out_features, in_features]")
    (n, k), suffix = weight.shape, "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    scale = take(parts, suffix, prefix)
    expect_dtype(scale, (*FLOATS, np.uint8), f"{prefix}.{suffix}")
    if scale.dtype == np.uint8:
        expect_shape(scale, (n, -(-k // 32)), name, "one exponent for 32 inputs")
        held, grouping, formula = scale, Grouping("block", 1, 32), "f32"
    elif suffix == "weight_scale_inv":
        if scale.ndim != 2 or 0 in scale.shape:
            raise FormatError(f"{prefix}.{suffix}: found shape {scale.shape}, expected one for each block")
        block = [_block(size, count) for size, count in zip((n, k), scale.shape, strict=True)]
        held, grouping, formula = scale, Grouping("block", *block), "f32"
    elif scale.size == 1:
        held, grouping, formula = scale.reshape(1, 1), Grouping("block", 0, 0), "own"
    elif scale.size == n:
        held, grouping, formula = scale.reshape(n, 1), Grouping("block", 1, 0), "own"
    else:
        groups = scale.size // n
        if groups * n != scale.size or k % groups:
            raise FormatError(f"{name}: found shape {scale.shape} beside a weight of ({n}, {k})")
        held, grouping, formula = scale.reshape(n, groups), Grouping("block", 1, k // groups), "own"
    pairs = (("kind", "float8"), ("suffix", suffix), ("shape", tuple(scale.shape)), ("dtype", str(weight.dtype)))
    return NarrowFloat(
        weight.view(np.uint8),
        held,
        kind="e4m3fn" if weight.dtype == E4M3 else "e5m2",
        scale_kind="e8m0" if scale.dtype == np.uint8 else "float",
        grouping=grouping,
        formula=formula,
        source=Source("auto-round", pairs),
    )


def _block(size: int, count: int) -> int:
    """Rows or columns of a block, of which `count` cover `size`: 128 where that fits, as AutoRound has it."""
    return 128 if math.ceil(size / 128) == count else math.ceil(size / count)


def _activation(options: FloatOptions, extras: Parts) -> Activation | None:
    if not options.inputs:
        return None
    if options.inputs.startswith(("mx_fp", "mx_int")):  # 0.16.1 takes e2m1 elements for inputs of "mx_int", too
        element = "float8_e4m3fn" if options.input_bits == 8 else "float4_e2m1fn_x2"
        return Activation("auto_round_mx", (), (("element", element),))
    if options.inputs.startswith("nv_fp") and "input_global_scale" in extras:
        return Activation("auto_round_nv", ("input_global_scale",))
    if "input_scale" in extras:
        return Activation("auto_round_fp8", ("input_scale",))
    if options.inputs.startswith("fp") and options.dynamic:
        return Activation("fp8_block", (), (("cols", 128 if options.kind == "fp" else 0),))
    return Activation(f"auto_round {options.inputs}")  # not done: `matmul` says so, float inputs are possible


def dump_floats(q: NarrowFloat) -> Parts:
    """Stored tensors of a module."""
    source = q.source
    assert source is not None
    codes, scale = np.ascontiguousarray(np.asarray(q.codes)), np.asarray(q.scales)
    found: Parts = {k: np.asarray(v) for k, v in q.extras.items() if not k.startswith("~")}
    if source.get("kind") == "float8":
        found[source.get("suffix")] = scale.reshape(source.get("shape"))
        return {"weight": codes.view(np.dtype(getattr(ml_dtypes, source.get("dtype")))), **found}
    if q.global_scale is not None:
        found["weight_global_scale"] = np.asarray(q.global_scale)
    return {
        "weight_packed": codes.view(np.uint8),
        "weight_scale": scale.view(E4M3) if q.scale_kind == "e4m3" else scale,
        **found,
    }
