"""NVIDIA ModelOpt checkpoints (`modelopt`): NVFP4, FP8, INT8 and mixed exports.

  NVFP4        weight uint8 [N, K/2] (E2M1, low nibble = even k), weight_scale float8_e4m3fn [N, K/16],
               weight_scale_2 float32 [] (a multiplier: amax / 2688), input_scale float32 [] (likewise)
  FP8          weight float8_e4m3fn [N, K], weight_scale float32 [] or [N] or blocks [N/128, 1, K/128, 1], input_scale []
  AWQ          pre_quant_scale [K] beside NVFP4: inputs are multiplied by it first (from source, not run)
  MXFP8        weight float8_e4m3fn, weight_scale uint8 [N, K/32]
  INT8         weight int8 [N, K], weight_scale float32 [N], input_scale float32 []
  W4A16_AWQ    weight uint8 [N/2, K], rows 2r (low nibble) and 2r + 1 of signed codes, weight_scale float32 [N, K/G];
               pre_quant_scale [K] where it was not folded into the layer before
  W4A8_AWQ     the same, weight_scale_2 float32 []: the product is rounded once more, to e4m3 under this scale
  NVFP4_SVD    NVFP4 with pre_quant_scale, svdquant_lora_a [R, K] and svdquant_lora_b [N, R]: y = x @ w.T + x @ a.T @ b.T
  MXFP4        weight uint8 [N, K/2], weight_scale uint8 [N, K/32] (also W4A8_MXFP4_FP8, with input_scale)
  KV cache     k_proj.k_scale, v_proj.v_scale: plain arrays of the State

The stored tensors say which of these a layer is; the config (`quantization_config` of config.json, or
hf_quant_config.json of older exports) says what inputs are quantized to.

Dequantize: NVFP4 dt(float32(value) * (float32(s) * s2)), a code of -0 read as +0; FP8 and INT8 dt(q) * dt(scale), both
cast to the model's dtype first, one rounding; W4A16_AWQ dt(float32(q) * scale); MXFP4 dt(float32(value) * 2**e).
Quantize (NVFP4QTensor, CPU): see `jq.algorithms.narrow.nvfp4_modelopt`.

Source: nvidia-modelopt 0.47.0 torch/quantization/qtensor/{nvfp4,fp8,int8,mxfp8}_tensor.py, torch/export.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import FLOAT, Activation
from jq.algorithms import blocks, narrow
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_one, expect_shape, take, warn_once
from jq.formats.modelopt_config import NAME, Options, detect, parse
from jq.qtensor import Affine, Grouping, LowRank, NarrowFloat, QTensor, Source
from jq.qtensor.affine import check_finite

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", *LOW_RANK)
# Algorithms whose inputs have a stored scale; NVFP4_AWQ and NVFP4_SVD are exported with float inputs, too.
STATIC = ("FP8", "NVFP4", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8")
WEIGHT_ONLY = ("W4A16_AWQ", "W4A16_NVFP4", "FP8_PB_WO", "W8A16", "FP8_PB_REAL", "MXFP4")


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules with a one-byte weight and a scale: {prefix: {suffix: stored name}}.

    Raises:
      FormatError: a scale without its weight, or a float8 weight without its scale.
      UnsupportedError: experts that are stored as one tensor.
    """
    there, found = set(names), {}
    for name in names:
        prefix = name.removesuffix(".weight")
        if name.endswith("_proj_weight_scale"):
            raise UnsupportedError(f"{name}: experts that are stored as one tensor are not read; one by one they are")
        if name.endswith(".weight_scale") and f"{name.removesuffix('_scale')}" not in there:
            raise FormatError(f"{name}: no weight beside it; the file is incomplete")
        if name == prefix or np.dtype(context.dtypes[name]).itemsize != 1:
            continue
        if f"{prefix}.weight_scale" not in there:
            if np.dtype(context.dtypes[name]) == E4M3:
                raise FormatError(f"{name}: float8 without {prefix}.weight_scale; the file is incomplete")
            continue
        found[prefix] = {s: f"{prefix}.{s}" for s in SUFFIXES if f"{prefix}.{s}" in there}
    return found


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module's tensors as a QTensor; the dtype of the weight tells the layout."""
    weight = take(parts, "weight", prefix)
    if weight.ndim != 2:
        raise FormatError(
            f"{prefix}.weight: found shape {weight.shape}, expected two axes; stacked experts are not read"
        )
    made: Any
    scale = take(parts, "weight_scale", prefix)
    if weight.dtype == np.uint8 and scale.dtype in FLOATS and options.of(prefix) in ("W4A16_AWQ", "W4A8_AWQ"):
        made = _int4(prefix, parts, weight, options)
    elif weight.dtype == np.uint8 and scale.dtype == np.uint8:
        made = _mxfp4(prefix, weight, scale, options)
    elif weight.dtype == np.uint8:
        made = _nvfp4(prefix, parts, weight, options)
    elif weight.dtype == np.int8:
        made = _int8(prefix, parts, weight, options)
    else:
        expect_dtype(weight, (E4M3, np.uint8, np.int8), f"{prefix}.weight")
        made = _fp8(prefix, parts, weight, options)
    extras: Parts = {k: parts[k] for k in ("input_scale", "pre_quant_scale") if k in parts}
    activation = _activation(prefix, made, extras, options, context.label)
    low = [take(parts, k, prefix) for k in LOW_RANK] if any(k in parts for k in LOW_RANK) else []
    if low:
        inputs = {k: v for k, v in extras.items() if k == "input_scale"}
        base = made.replace(extras=inputs, activation=activation)
        base.check(prefix)
        expect_dtype(low[0], FLOATS, f"{prefix}.{LOW_RANK[0]}")
        extras = {k: v for k, v in extras.items() if k not in inputs}
        made = LowRank(base, low[0], low[1], dtype=options.dtype, source=Source(NAME, (("kind", "low rank"),)))
        activation = activation and Activation("low_rank")
    if "pre_quant_scale" in extras:
        expect_shape(extras["pre_quant_scale"], (made.in_features,), f"{prefix}.pre_quant_scale", "one for each input")
        activation = _with_prepared_inputs(activation)
    made = made.replace(extras=extras, activation=activation)
    made.check(prefix)
    return made


def _nvfp4(prefix: str, parts: Parts, weight: np.ndarray, options: Options) -> NarrowFloat:
    n, k = weight.shape[0], 2 * weight.shape[1]
    scale = take(parts, "weight_scale", prefix)
    expect_dtype(scale, (E4M3,), f"{prefix}.weight_scale")
    if scale.ndim != 2 or scale.shape[0] != n or not scale.shape[1] or k % scale.shape[1]:
        raise FormatError(f"{prefix}.weight_scale: found shape {scale.shape}, expected ({n}, {k // 16}): blocks of 16")
    whole = take(parts, "weight_scale_2", prefix, why="NVFP4 block scales are multiplied by it.")
    expect_dtype(whole, (np.float32,), f"{prefix}.weight_scale_2")
    expect_one(whole, f"{prefix}.weight_scale_2")
    return NarrowFloat(
        _bits.as_words(weight),
        scale.view(np.uint8),
        whole,
        kind="e2m1",
        scale_kind="e4m3",
        grouping=Grouping("block", 1, k // scale.shape[1]),
        formula="global_multiply",
        dtype=options.dtype,
        source=Source(NAME, (("kind", "nvfp4"),)),
    )


def _mxfp4(prefix: str, weight: np.ndarray, scale: np.ndarray, options: Options) -> NarrowFloat:
    n, k = weight.shape[0], 2 * weight.shape[1]
    expect_shape(scale, (n, -(-k // 32)), f"{prefix}.weight_scale", "one exponent for 32 inputs")
    return NarrowFloat(
        _bits.as_words(weight),
        scale,
        kind="e2m1",
        scale_kind="e8m0",
        grouping=Grouping("block", 1, 32),
        formula="f32",
        dtype=options.dtype,
        source=Source(NAME, (("kind", "mxfp4"),)),
    )


def _fp8(prefix: str, parts: Parts, weight: np.ndarray, options: Options) -> NarrowFloat:
    n, k = weight.shape
    scale = take(parts, "weight_scale", prefix)
    name = f"{prefix}.weight_scale"
    mx = scale.dtype == np.uint8
    expect_dtype(scale, (np.float32, ml_dtypes.bfloat16, np.float16, np.uint8), name)
    shape = scale.shape
    if mx:
        expect_shape(scale, (n, -(-k // 32)), name, "one exponent for 32 inputs")
        held, grouping = scale, Grouping("block", 1, 32)
    elif scale.size == 1:
        held, grouping = scale.reshape(1, 1), Grouping("block", 0, 0)
    elif shape in ((n,), (n, 1)):
        held, grouping = scale.reshape(n, 1), Grouping("block", 1, 0)
    else:
        grid = tuple(s for i, s in enumerate(shape) if scale.ndim == 2 or i % 2 == 0)  # [N/128, 1, K/128, 1]
        if len(grid) != 2 or int(np.prod(grid)) != scale.size:
            raise FormatError(f"{name}: found shape {shape}, expected one scale, ({n},), or a grid of 128x128 blocks")
        expect_shape(scale.reshape(grid), (-(-n // 128), -(-k // 128)), name, "blocks of 128x128")
        held, grouping = scale.reshape(grid), Grouping("block", 128, 128)
    return NarrowFloat(
        weight.view(np.uint8),
        held,
        kind="e4m3fn",
        scale_kind="e8m0" if mx else "float",
        grouping=grouping,
        formula="f32" if mx else "cast",
        dtype=options.dtype,
        source=Source(NAME, (("kind", "fp8"), ("rank", scale.ndim))),
    )


def _int8(prefix: str, parts: Parts, weight: np.ndarray, options: Options) -> Affine:
    n = weight.shape[0]
    scale = take(parts, "weight_scale", prefix)
    expect_dtype(scale, (np.float32, ml_dtypes.bfloat16, np.float16), f"{prefix}.weight_scale")
    if scale.size not in (1, n) or scale.shape not in ((), (1,), (n,), (n, 1)):
        raise FormatError(f"{prefix}.weight_scale: found shape {scale.shape}, expected ({n},): one for each output")
    each = scale.size == n and n > 1
    return Affine(
        _bits.as_words(weight),
        scale.reshape(-1, 1),
        code_bits=8,
        signed=True,
        grouping=Grouping("block", 1 if each else 0, 0),
        formula="cast_sub_mul",
        dtype=options.dtype,
        source=Source(NAME, (("kind", "int8"), ("rank", scale.ndim))),
    )


def _int4(prefix: str, parts: Parts, weight: np.ndarray, options: Options) -> Affine:
    n, k = 2 * weight.shape[0], weight.shape[1]
    scale = take(parts, "weight_scale", prefix)
    expect_dtype(scale, (np.float32, ml_dtypes.bfloat16, np.float16), f"{prefix}.weight_scale")
    if scale.ndim != 2 or scale.shape[0] != n or not scale.shape[1] or k % scale.shape[1]:
        raise FormatError(f"{prefix}.weight_scale: found shape {scale.shape}, expected ({n}, groups of {k} inputs)")
    second: dict[str, Any] = {}
    if "weight_scale_2" in parts:
        whole = parts["weight_scale_2"]
        expect_dtype(whole, (np.float32,), f"{prefix}.weight_scale_2")
        expect_one(whole, f"{prefix}.weight_scale_2")
        check_finite(whole, f"{prefix}.weight_scale_2")
        second = {"zeros": whole.reshape(1, 1)}
    nibbles = np.stack([weight & 15, weight >> 4], axis=1).reshape(n, k).astype(np.int8)
    return Affine.make(
        (nibbles ^ 8) - 8,
        scale,
        code_bits=4,
        name=prefix,
        signed=True,
        grouping=Grouping("block", 1, k // scale.shape[1]),
        formula="f32_e4m3" if second else "f32",
        dtype=options.dtype,
        source=Source(NAME, (("kind", "int4"), ("rank", parts["weight_scale_2"].ndim if second else 0))),
        **second,
    )


def _with_prepared_inputs(activation: Activation | None) -> Activation:
    """AWQ: inputs are multiplied by a stored vector, whether they are quantized after that or not."""
    found = activation or Activation(FLOAT)
    return Activation(
        found.scheme, (*found.parameters, "pre_quant_scale"), (*found.options, ("prepare", "pre_quant_scale"))
    )


def _activation(prefix: str, q: Any, extras: Parts, options: Options, label: str) -> Activation | None:
    """Inputs quantized as the algorithm says: with a stored scale, or per token for per-channel FP8."""
    algorithm = options.of(prefix)
    if algorithm in WEIGHT_ONLY:
        return None
    if "input_scale" in extras:
        expect_one(extras["input_scale"], f"{prefix}.input_scale")
        if q.source.get("kind") == "int8":
            return Activation("int8_static", ("input_scale",))
        small = q.source.get("kind") == "nvfp4" and algorithm != "W4A8_NVFP4_FP8"
        return Activation("nvfp4_static" if small else "fp8_static", ("input_scale",))
    if isinstance(q, NarrowFloat) and q.kind == "e4m3fn":
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            return Activation("fp8_block", (), (("cols", 0),))
        if algorithm == "MXFP8":
            return Activation("fp8_block", (), (("cols", 32), ("pow2", True)))
    if algorithm in STATIC:
        warn_once(label, f"{algorithm} quantizes inputs by a stored input_scale; layers without one have float inputs")
    return None


def dump(q: Any) -> Parts:
    """Stored tensors, identical to those that were loaded."""
    kind = q.source.get("kind")
    if isinstance(q, LowRank):
        low = {LOW_RANK[0]: np.asarray(q.down), LOW_RANK[1]: np.asarray(q.up)}
        return {**dump(q.base), **low, **{k: np.asarray(v) for k, v in q.extras.items()}}
    codes, scale = np.asarray(q.codes), np.asarray(q.scales)
    extras = {k: np.asarray(v) for k, v in q.extras.items()}
    if kind == "nvfp4":
        whole = np.asarray(q.global_scale)
        return {"weight": codes.view(np.uint8), "weight_scale": scale.view(E4M3), "weight_scale_2": whole, **extras}
    if kind == "mxfp4":
        return {"weight": codes.view(np.uint8), "weight_scale": scale, **extras}
    if kind == "int4":
        nibbles = (np.asarray(q.unpack()) & 15).astype(np.uint8)
        if q.zeros is not None:
            extras["weight_scale_2"] = np.asarray(q.zeros).reshape((1,) * q.source.get("rank"))
        return {"weight": nibbles[0::2] | nibbles[1::2] << 4, "weight_scale": scale, **extras}
    rank = q.source.get("rank")
    if rank == 4:
        scale = scale[:, None, :, None]
    elif rank != 2:
        scale = scale.reshape(() if rank == 0 else (-1,))
    return {"weight": codes.view(E4M3 if kind == "fp8" else np.int8), "weight_scale": scale, **extras}


@dataclasses.dataclass(frozen=True)
class NVFP4:
    """NVFP4 weights as modelopt exports them, inputs in float (W4A16_NVFP4); codes and scales identical on the CPU.

    modelopt gives q, k, v (and gate, up) one weight_scale_2: `jq.quantize` passes the largest magnitude of the set.
    """

    format: str = NAME
    shares: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    def quantize(self, w: Any, name: str = "weight", peak: float | None = None) -> NarrowFloat:
        """w [N, K], K a multiple of 16 -> codes and scales; `dequantize()` gives w's dtype."""
        w = blocks.weight(w, name)
        if w.shape[1] % 16:
            raise FormatError(f"{name}: found shape {w.shape}, expected [out, in] with in a multiple of 16")
        codes, scale, whole = narrow.nvfp4_modelopt(w, peak)
        packed = _bits.pack(codes, 4).view(np.uint8)
        parts = {"weight": packed, "weight_scale": scale.view(E4M3), "weight_scale_2": whole}
        made = load(name, parts, Options("W4A16_NVFP4", dtype=str(w.dtype)), Context())
        assert isinstance(made, NarrowFloat)
        return made

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        return {
            "quant_method": NAME,
            "quant_algo": "W4A16_NVFP4",
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": skip or [],
        }


FORMAT = Format(
    name=NAME,
    methods=(NAME, "modelopt_fp4", "modelopt_fp8", "modelopt_mixed"),
    title="NVIDIA ModelOpt: NVFP4, FP8, INT8, INT4 AWQ, mixed",
    parse=parse,
    markers=("weight_scale",),
    suffixes=("weight_scale_2",),
    load=load,
    dump=dump,
    detect=detect,
    group=group,
    beside=("input_scale", "output_scale"),
    methods_table={"NVFP4": NVFP4},
)
