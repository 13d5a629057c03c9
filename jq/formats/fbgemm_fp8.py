"""FBGEMM-FP8 checkpoints (`fbgemm_fp8`): float8 rows with a scale each, inputs quantized per token.

  <m>.weight        float8_e4m3fn [N, K]
  <m>.weight_scale  float32 (old files: bfloat16) [N, 1]
  Llama-4 experts   gate_up_proj float8 [E, H, 2I] with gate_up_proj_scale float32 [E, 1, 2I], down_proj [E, I, H] with
                    down_proj_scale [E, H, 1]: a scale for each output, held here as [E, out, in]

Dequantize: bfloat16(float32(q) * float32(s)); transformers forces the model to bfloat16. Inputs: see
`jq.activation_schemes.fp8.quantize_rows` with `activation_scale_ub` as the bound of the row maximum (not of the scale).

Quantize (FBGEMM `quantize_fp8_per_row`): the weight in bfloat16, then s = max(max|row| / 448, 1 / (448 * 512)),
q = e4m3(w / s) in float32. A CUDA build with fast division may differ at code borders.

Source: transformers 5.23.0 integrations/fbgemm_fp8.py; pytorch/FBGEMM 0c868aa quantize.cu. No code of the library runs
on a CPU: held against files written after its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq.activations import Activation
from jq.algorithms import blocks, narrow
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Grouping, NarrowFloat, Source

NAME = "fbgemm_fp8"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclasses.dataclass(frozen=True)
class Options:
    """A parsed config: upper bound of a token's largest magnitude, None for none."""

    upper: float | None = 1200.0


def parse(config: Mapping[str, Any], context: Context) -> Options:
    label = f"{context.label}: quantization_config"
    warn_unknown(config, ("quant_method", "activation_scale_ub", "modules_to_not_convert"), context.label)
    upper = config.get("activation_scale_ub", 1200.0)
    if upper is not None and (not isinstance(upper, int | float) or not upper > 0):
        raise FormatError(f"{label}: activation_scale_ub {upper!r}, expected a positive number")
    return Options(None if upper is None else float(upper))


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules and experts with float8 weights: {prefix: {suffix: stored name}}."""
    there, found = set(names), {}
    for name in names:
        if np.dtype(context.dtypes[name]) != E4M3:
            continue
        prefix = name.removesuffix(".weight")
        scale = f"{name}_scale"  # both "<m>.weight_scale" and "<p>_scale"
        if scale not in there:
            raise FormatError(f"{name}: float8 without {scale}; the file is incomplete")
        parts = {"weight": name, "weight_scale": scale} if name != prefix else {"": name, "_scale": scale}
        if name != prefix and f"{prefix}.input_scale_ub" in there:
            parts["input_scale_ub"] = f"{prefix}.input_scale_ub"
        found[prefix] = parts
    return found


def join(prefix: str, suffix: str) -> str:
    return prefix + suffix if suffix in ("", "_scale") else f"{prefix}.{suffix}"


def is_experts(prefix: str) -> bool:
    return prefix.endswith(EXPERTS)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> NarrowFloat:
    """One module's (or stack of experts') tensors as a QTensor."""
    stacked = "" in parts
    weight = parts[""] if stacked else take(parts, "weight", prefix)
    scale = parts["_scale"] if stacked else take(parts, "weight_scale", prefix)
    name = join(prefix, "_scale" if stacked else "weight_scale")
    expect_dtype(weight, (E4M3,), join(prefix, "" if stacked else "weight"))
    expect_dtype(scale, (np.float32, ml_dtypes.bfloat16, np.float16), name)
    pairs: dict[str, Any] = {}
    if stacked:
        if weight.ndim != 3:
            raise FormatError(f"{prefix}: found shape {weight.shape}, expected [experts, in, out]")
        experts, _, out = weight.shape
        across = scale.shape == (experts, 1, out)  # gate_up: along the last axis; down: [E, H, 1]
        if not across:
            expect_shape(scale, (experts, out, 1), name, "one scale for each output of each expert")
        weight = np.ascontiguousarray(weight.swapaxes(-1, -2))
        scale = np.ascontiguousarray(scale.swapaxes(-1, -2)) if across else scale
        pairs = {"experts": "across" if across else "along"}
    else:
        if weight.ndim != 2:
            raise FormatError(f"{prefix}.weight: found shape {weight.shape}, expected [out_features, in_features]")
        if scale.shape == (weight.shape[0],):
            scale, pairs = scale[:, None], {"scale_rank": 1}
        expect_shape(scale, (weight.shape[0], 1), name, "one scale for each output")
    made = NarrowFloat(
        weight.view(np.uint8),
        scale,
        None,
        {"input_scale_ub": parts["input_scale_ub"]} if "input_scale_ub" in parts else {},
        kind="e4m3fn",
        grouping=Grouping("block", 1, 0),
        formula="f32",
        dtype="bfloat16",
        activation=Activation("fbgemm_fp8", (), (("upper", options.upper),)),
        source=Source(NAME, tuple(pairs.items())),
    )
    made.check(prefix)
    return made


def dump(q: Any) -> Parts:
    """Stored tensors, identical to those that were loaded."""
    codes, scale = np.asarray(q.codes), np.asarray(q.scales)
    experts = q.source.get("experts")
    if experts:
        scale = np.ascontiguousarray(scale.swapaxes(-1, -2)) if experts == "across" else scale
        return {"": np.ascontiguousarray(codes.swapaxes(-1, -2)).view(E4M3), "_scale": scale}
    scale = scale.reshape(-1) if q.source.get("scale_rank") == 1 else scale
    return {"weight": codes.view(E4M3), "weight_scale": scale, **{k: np.asarray(v) for k, v in q.extras.items()}}


@dataclasses.dataclass(frozen=True)
class FbgemmFp8:
    """Row-wise float8 weights, inputs quantized per token under `activation_scale_ub`."""

    activation_scale_ub: float = 1200.0
    format: str = NAME

    def quantize(self, w: Any, name: str = "weight") -> NarrowFloat:
        """w [N, K] of any float dtype (cast to bfloat16 first, which the library demands) -> codes and scales."""
        x = blocks.weight(w, name).astype(ml_dtypes.bfloat16).astype(np.float32)
        codes, scale = narrow.fp8_rows(x)
        return load(
            name, {"weight": codes.view(E4M3), "weight_scale": scale}, Options(self.activation_scale_ub), Context()
        )

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": NAME,
            "activation_scale_ub": self.activation_scale_ub,
            "modules_to_not_convert": skip,
        }


FORMAT = Format(
    name=NAME,
    methods=(NAME,),
    title="FBGEMM-FP8: float8 rows, inputs per token",
    parse=parse,
    markers=("weight_scale",),
    suffixes=(),
    load=load,
    dump=dump,
    group=group,
    join=join,
    parameter=is_experts,
    methods_table={"FbgemmFp8": FbgemmFp8},
    evidence="source",
)
