"""Fine-grained FP8 (`fp8`, DeepSeek and Qwen style) and `mxfp8` checkpoints of transformers.

  <m>.weight            float8_e4m3fn [N, K]; experts of DeepSeek-V4: int8 [N, K/2], two e2m1 codes a byte, low first
  <m>.weight_scale_inv  float32, bfloat16 or float8_e8m0fnu [ceil(N/bn), ceil(K/bk)], uint8 (the bytes of e8m0),
                        or a scalar; despite its name it multiplies. Also named `scale`, `qscale_weight`, `weight_scale`.
  <m>.activation_scale  scalar, static activations only
  fused experts         <p> [E, N, K] with <p>_scale_inv [E, ., .] and <p>_activation_scale [E]; or the weights of single
                        experts beside these scales, as transformers 5.23 saves a model that it quantized

Dequantize: dtype(float32(q) * float32(s)), dtype that of the model. Blocks are those of the config where its grid fits
(ragged edges included), else shape // grid: one file mixes 128x128 linears and 1x32 experts.

A scale beside a weight that is not float8 is left alone: transformers writes uninitialised memory there for layers whose
shape it could not tile.

Quantize (transformers 5.23 `Fp8Quantize`, CPU): float32, per block m = max|w|, scale = 448 / m as torch computes it
(reciprocal of m, times 448), stored inverse 1 / scale; ue8m0 rounds the inverse up to a power of two first.

GPT-QModel writes the same names with `weight_scale_semantics: inverse`: float8_e4m3fn or float8_e5m2, one scale a tensor,
a row or a block, and there the scale divides: dtype(q) / dtype(s); inputs stay float.

Source: transformers 5.23.0 quantizers/quantizer_finegrained_fp8.py, integrations/finegrained_fp8.py; GPT-QModel 7.7
nn_modules/qlinear/fp8.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import blocks, narrow
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, take, warn_unknown
from jq.qtensor import Grouping, NarrowFloat, Source
from jq.qtensor.narrow_float import check_bits

NAME = "fp8"
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
FLOAT8 = {E4M3: "e4m3fn", np.dtype(ml_dtypes.float8_e5m2): "e5m2", np.dtype(ml_dtypes.float8_e4m3fnuz): "e4m3fnuz"}
SCALES = ("weight_scale_inv", "qscale_weight", "weight_scale", "scale")
EXTRAS = ("activation_scale", "qscale_act", "input_scale")
FUSED = ("_scale_inv", "_activation_scale")
# Fused experts are parameters [E, N, K], their State keys have no ".weight"; one expert's Linear is `experts.0.up_proj`.
_EXPERTS = re.compile(r"(^|\.)experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$")
# One expert's projection -> the fused one that its scales belong to, and which half of its rows it is.
_ONE_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(\w+)$")
_FUSED_PARTS: dict[str, tuple[str, int | None]] = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", None)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """A parsed config: rows and columns of a block (None: per tensor), dynamic or static activations, weight dtype.

    `divides`: scales are what the weight was multiplied by (GPT-QModel), not what undoes it; inputs stay float.
    """

    block: tuple[int, int] | None = (128, 128)
    activations: str = "dynamic"
    dtype: str = "bfloat16"
    divides: bool = False


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads the quantization config.

    Raises:
      FormatError: values that transformers refuses too.
    """
    label = f"{context.label}: quantization_config"
    known = {
        *("quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers"),
        *("modules_to_convert", "scale_fmt", "expert_dtype", "dequantize", "fmt", "kv_cache_scheme"),
        *(
            "weight_scale_semantics",
            "weight_scale_method",
            "format",
            "checkpoint_format",
            "method",
            "bits",
            "group_size",
        ),
        *("desc_act", "sym", "lm_head", "dynamic", "meta", "pack_dtype"),
    }
    warn_unknown(config, known, context.label)
    semantics = config.get("weight_scale_semantics")
    _one_of(str(semantics or "inverse"), ("inverse",), f"{label}: weight_scale_semantics")
    scheme = str(config.get("activation_scheme") or "dynamic").lower()
    _one_of(scheme, ("dynamic", "static"), f"{label}: activation_scheme")
    _one_of(str(config.get("scale_fmt") or "float"), ("float", "ue8m0"), f"{label}: scale_fmt")
    _one_of(str(config.get("expert_dtype") or "fp8"), ("fp8", "fp4"), f"{label}: expert_dtype")
    _one_of(str(config.get("fmt") or "e4m3"), ("e4m3", "float8_e4m3fn"), f"{label}: fmt")
    usual = (1, 32) if config.get("quant_method") == "mxfp8" else (128, 128)
    block = config.get("weight_block_size", usual)
    if block is not None:
        if (
            not isinstance(block, list | tuple)
            or len(block) != 2
            or not all(isinstance(b, int) and b > 0 for b in block)
        ):
            raise FormatError(f"{label}: weight_block_size {block!r}, expected two positive numbers or null")
        block = (int(block[0]), int(block[1]))
    named = context.config.get("dtype") or context.config.get("torch_dtype")
    return Options(block, scheme, context.model_dtype if named else "bfloat16", semantics is not None)


def _one_of(value: str, allowed: tuple[str, ...], label: str) -> None:
    if value not in allowed:
        raise FormatError(f"{label} {value!r}, expected {' or '.join(allowed)}")


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Quantized modules and fused experts: {prefix: {suffix: stored name}}; suffixes of experts begin with "_" or are "".

    Raises:
      FormatError: a float8 weight without a scale.
    """
    there = set(names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        narrow_weight = np.dtype(context.dtypes[name]).itemsize == 1 and len(context.shapes[name]) >= 2
        if not narrow_weight:
            continue
        is_e4m3 = np.dtype(context.dtypes[name]) == E4M3
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            parts = {s: f"{module}.{s}" for s in (*SCALES, *EXTRAS) if f"{module}.{s}" in there}
            if any(s in parts for s in SCALES):
                found[module] = {"weight": name, **parts}
            elif is_e4m3 and (shared := _shared_scales(module, there)):
                found[module] = {"weight": name, **shared}
            elif is_e4m3:
                raise FormatError(
                    f"{name}: float8 without a scale ({', '.join(SCALES)}) beside it; the file is incomplete"
                )
        elif f"{name}_scale_inv" in there:
            found[name] = {"": name, **{s: f"{name}{s}" for s in FUSED if f"{name}{s}" in there}}
        elif is_e4m3:
            raise FormatError(f"{name}: float8 without {name}_scale_inv; the file is incomplete")
    return found


def _shared_scales(module: str, there: set[str]) -> dict[str, str]:
    """Scales of fused experts beside the weights of single ones, as transformers 5.23 saves them; empty where none are."""
    match = _ONE_EXPERT.match(module)
    stem = f"{match[1]}.{_FUSED_PARTS[match[3]][0]}" if match and match[3] in _FUSED_PARTS else ""
    if f"{stem}_scale_inv" not in there:
        return {}
    names = {f"~{key}": f"{stem}_{key}" for key in ("scale_inv", "activation_scale")}
    return {suffix: name for suffix, name in names.items() if name in there}


def _own_part(prefix: str, parts: Parts, shape: tuple[int, ...]) -> Parts:
    """The shared scales of one expert's projection, under the names of a Linear with "~" before them."""
    match = _ONE_EXPERT.match(prefix)
    assert match is not None
    scale, index, half = parts["~scale_inv"], int(match[2]), _FUSED_PARTS[match[3]][1]
    name = f"{match[1]}.{_FUSED_PARTS[match[3]][0]}_scale_inv"
    if scale.ndim not in (1, 3) or index >= scale.shape[0]:
        raise FormatError(f"{name}: found shape {scale.shape}, which has no scales for expert {index}")
    own = scale[index]
    if half is not None and own.ndim == 2:  # rows of gate, then rows of up
        if own.shape[0] % 2:
            raise UnsupportedError(
                f"{name}: found shape {scale.shape}; a block that holds rows of gate and of up is not read"
            )
        own = own[own.shape[0] // 2 * half :][: own.shape[0] // 2]
    found = {"~scale_inv": np.ascontiguousarray(own)}
    if "~activation_scale" in parts:
        found["~activation_scale"] = parts["~activation_scale"].reshape(-1)[index]
    return {"weight": parts["weight"], **found}


def join(prefix: str, suffix: str) -> str:
    return prefix + suffix if suffix == "" or suffix.startswith("_") else f"{prefix}.{suffix}"


def load(prefix: str, parts: Parts, options: Options, context: Context) -> NarrowFloat:
    """One module's (or fused experts') tensors as a QTensor."""
    fused = "" in parts
    weight = parts[""] if fused else take(parts, "weight", prefix)
    if "~scale_inv" in parts:
        parts = _own_part(prefix, parts, weight.shape)
    key = "_scale_inv" if fused else next(s for s in (*SCALES, "~scale_inv") if s in parts)
    name = join(prefix, key)
    kind, codes = _codes(weight, join(prefix, "" if fused else "weight"))
    k = weight.shape[-1] * (2 if kind == "e2m1" else 1)
    scale = parts[key]
    expect_dtype(scale, (np.float32, ml_dtypes.bfloat16, np.float16, E8M0, np.uint8), name)
    held = scale.view(np.uint8) if scale.dtype == E8M0 else scale
    if held.dtype == np.uint8:
        check_bits(held, (255,), name)  # NaN, as torch's float8_e8m0fnu has it
    held, grouping = _grid(held, (*weight.shape[:-1], k), options.block, name)
    made = NarrowFloat(
        codes,
        held,
        None,
        {s: a for s, a in parts.items() if s not in ("", "weight", key)},
        kind=kind,
        scale_kind="e8m0" if held.dtype == np.uint8 else "float",
        grouping=grouping,
        formula="divide" if options.divides else "f32",
        dtype=options.dtype,
        activation=None if options.divides else _activation(prefix, parts, options, grouping, fused),
        source=Source(NAME, _source(weight, scale, held, key)),
    )
    made.check(prefix)
    return made


def _source(weight: np.ndarray, scale: np.ndarray, held: np.ndarray, key: str) -> tuple[tuple[str, Any], ...]:
    """What dump cannot see from the arrays; equal for all layers of a usual file."""
    pairs: dict[str, Any] = {"scale": key}
    if weight.dtype != E4M3:
        pairs["weight_dtype"] = str(weight.dtype)
    if scale.ndim != held.ndim:
        pairs["scale_rank"] = scale.ndim
    if scale.dtype == E8M0:
        pairs["scale_dtype"] = str(scale.dtype)
    return tuple(pairs.items())


def _codes(weight: np.ndarray, name: str) -> tuple[str, np.ndarray]:
    """Kind and packed codes of a stored weight."""
    if weight.dtype in FLOAT8:
        return FLOAT8[weight.dtype], weight.view(np.uint8)
    expect_dtype(weight, (E4M3, np.int8, np.uint8), name)
    return "e2m1", _bits.as_words(weight)


def _grid(
    scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] | None, name: str
) -> tuple[np.ndarray, Grouping]:
    """The scales as [*stack, rows, cols] and the block that each is for."""
    n, k = shape[-2:]
    stack = shape[:-2]
    if scale.ndim < 2:
        rows = {1: 1, n: n}.get(scale.size) if not stack else 1
        if rows is None or (stack and scale.shape != stack):
            raise FormatError(f"{name}: found shape {scale.shape}, expected a grid of blocks or one scale a tensor")
        return scale.reshape(*stack, rows, 1), Grouping("block", 1 if rows == n and n > 1 else 0, 0)
    grid = scale.shape[-2:]
    if scale.shape[:-2] == stack:
        if block and grid == (math.ceil(n / block[0]), math.ceil(k / block[1])):
            return scale, Grouping("block", *block)
        if grid == (1, 1) and not block:
            return scale, Grouping("block", 0, 0)
        # MX experts lie beside blocks of the config's size; other scales that do not fit are a damaged file
        if (not block or scale.dtype == np.uint8) and min(grid) > 0 and n % grid[0] == 0 and k % grid[1] == 0:
            return scale, Grouping("block", n // grid[0], k // grid[1])
    wanted = "one scale" if not block else f"({math.ceil(n / block[0])}, {math.ceil(k / block[1])}) blocks of {block}"
    raise FormatError(
        f"{name}: found shape {scale.shape}, expected {wanted} for a weight of {shape}; check weight_block_size"
    )


def _activation(prefix: str, parts: Parts, options: Options, grouping: Grouping, fused: bool) -> Activation | None:
    if options.activations == "static":
        found = [s for s in ("_activation_scale", "~activation_scale", *EXTRAS) if s in parts]
        if not found:
            raise FormatError(f"{prefix}.activation_scale: missing; activation_scheme is static")
        count = parts[""].shape[0] if fused else 1  # a scale for each expert
        if parts[found[0]].size != count:
            raise FormatError(f"{prefix}.{found[0]}: found shape {parts[found[0]].shape}, expected {count} values")
        return Activation("fp8_static", (found[0],))
    pairs: tuple[tuple[str, Any], ...] = (("cols", grouping.cols),)
    return Activation("fp8_block", (), (*pairs, ("pow2", True)) if grouping.cols == 32 else pairs)


def dump(q: Any) -> Parts:
    """Stored tensors, identical to those that were loaded."""
    key = q.source.get("scale")
    codes, scale = np.asarray(q.codes), np.asarray(q.scales)
    name = q.source.get("scale_dtype")
    scale = scale.view(np.dtype(getattr(ml_dtypes, name))) if name else scale
    rank = q.source.get("scale_rank")
    if rank is not None:
        scale = scale.reshape(() if rank == 0 else (-1,))
    dtype = q.source.get("weight_dtype")
    weight = codes.view(np.dtype(getattr(ml_dtypes, dtype, dtype)) if dtype else E4M3)
    found = {
        "" if key == "_scale_inv" else "weight": weight,
        key: scale,
        **{s: np.asarray(a) for s, a in q.extras.items()},
    }
    return {s: a for s, a in found.items() if not s.startswith("~")}


@dataclasses.dataclass(frozen=True)
class FP8:
    """Block-wise float8 weights, `Fp8Quantize` of transformers: codes and scales identical on the CPU.

    Fields:
      block_size: rows and columns of a block, or None for one scale per tensor.
      scale_fmt: "float" (float32 scales) or "ue8m0" (powers of two).
      activation_scheme: "dynamic"; static scales need calibration.
    """

    block_size: tuple[int, int] | None = (128, 128)
    scale_fmt: str = "float"
    activation_scheme: str = "dynamic"
    format: str = NAME

    def quantize(self, w: Any, name: str = "weight") -> NarrowFloat:
        """w [N, K] of any float dtype -> codes and scales; `dequantize()` gives w's dtype.

        Raises:
          FormatError: a shape that the blocks do not tile (transformers leaves such a layer unquantized), or an option.
          ValueError: weights that are not finite.
        """
        _one_of(self.scale_fmt, ("float", "ue8m0"), f"{name}: scale_fmt")
        _one_of(self.activation_scheme, ("dynamic",), f"{name}: activation_scheme")
        w = blocks.weight(w, name, stacked=None)
        n, k = w.shape[-2:]
        block = self.block_size or (n, k)
        if n % block[0] or k % block[1]:
            raise FormatError(
                f"{name}: shape {w.shape} is not tiled by blocks of {block}; skip this layer or choose another size"
            )
        codes, inverse = narrow.fp8_blocks(w.astype(np.float32), block, pow2=self.scale_fmt == "ue8m0")
        scale: np.ndarray = inverse.astype(E8M0) if self.scale_fmt == "ue8m0" else inverse
        parts = {"weight": codes.view(E4M3), "weight_scale_inv": scale if self.block_size else scale.reshape(())}
        return load(name, parts, Options(self.block_size, "dynamic", str(w.dtype)), Context())

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "fp8",
            "activation_scheme": self.activation_scheme,
            "weight_block_size": list(self.block_size) if self.block_size else None,
            "scale_fmt": self.scale_fmt,
            "modules_to_not_convert": skip,
        }


FORMAT = Format(
    name=NAME,
    methods=("fp8", "mxfp8"),
    title="Fine-grained FP8 (block scales; DeepSeek, Qwen3) and MXFP8",
    parse=parse,
    markers=("weight_scale_inv", "qscale_weight"),
    suffixes=(),
    load=load,
    dump=dump,
    group=group,
    beside=("weight_scale_inv", *EXTRAS),
    join=join,
    parameter=lambda prefix: _EXPERTS.search(prefix) is not None,
    methods_table={"FP8": FP8},
)
