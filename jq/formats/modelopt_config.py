"""NVIDIA ModelOpt's configs: `quantization_config` of config.json, or hf_quant_config.json of older exports.

Source: nvidia-modelopt 0.47.0 torch/export (quant_utils.py `process_layer_quant_config`, convert_hf_config.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, warn_unknown

NAME = "modelopt"
NONE = "NONE"  # nothing but the KV cache is quantized
# Every quant_algo that the export writes; those without a name of TensorRT-LLM in lower case (fp8_pb_wo).
ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8", "W8A16", "W8A8_SQ_PER_CHANNEL"),
    *("W4A16_AWQ", "W4A8_AWQ", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8"),
    *("MXFP4", "W4A8_MXFP4_FP8", "MIXED_PRECISION", NONE),
)
_FROM_BITS: dict[tuple[Any, Any], str] = {
    (4, "float"): "NVFP4",
    (4, "int"): "W4A16_AWQ",
    (8, "float"): "FP8",
    (8, "int"): "W8A8_SQ_PER_CHANNEL",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """A parsed config: the algorithm, that of single layers where they are mixed, and the model's dtype."""

    algorithm: str = "NVFP4"
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"

    def of(self, prefix: str) -> str:
        return self.layers.get(prefix, self.algorithm)


def detect(checkpoint: Any) -> dict | None:
    """The config of an export that has hf_quant_config.json alone."""
    found = checkpoint.side_json("hf_quant_config.json")
    if not found or not isinstance(found.get("quantization"), Mapping):
        return None
    return {"quant_method": NAME, **found}


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads either form of the config.

    Raises:
      FormatError: no algorithm named.
      UnsupportedError: an algorithm whose tensors are not read.
    """
    label = f"{context.label}: quantization_config"
    nested = config.get("quantization")
    inner = nested if isinstance(nested, Mapping) else config
    algorithm = inner.get("quant_algo") or _from_groups(config.get("config_groups"))
    if not algorithm and (inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")):
        algorithm = NONE
    if not algorithm:
        raise FormatError(f"{label}: no quant_algo; it names the algorithm, e.g. 'NVFP4' or 'FP8'")
    layers = inner.get("quantized_layers") or {}
    algorithm = str(algorithm).upper()
    named = {p: str(layer.get("quant_algo")).upper() for p, layer in layers.items() if isinstance(layer, Mapping)}
    for name in (algorithm, *named.values()):
        if name not in ALGORITHMS:
            raise UnsupportedError(
                f"{label}: quant_algo {name!r} is not read here; those that are: {', '.join(ALGORITHMS)}"
            )
    known = {
        *("quant_method", "quant_algo", "config_groups", "ignore", "producer", "kv_cache_scheme", "quantized_layers"),
        *("quantization", "group_size", "exclude_modules", "kv_cache_quant_algo", "has_zero_point", "pre_quant_scale"),
        "lora_rank",
    }
    warn_unknown({**config, **inner}, known, context.label)
    given = context.config.get("dtype") or context.config.get("torch_dtype")
    return Options(algorithm, named, context.model_dtype if given else "bfloat16")


def _from_groups(groups: Any) -> str | None:
    """The algorithm of a config that has config_groups alone, by the bits of its weights."""
    if not isinstance(groups, Mapping) or not groups:
        return None
    weights = [g.get("weights") or {} for g in groups.values() if isinstance(g, Mapping)]
    kinds = {(w.get("num_bits"), w.get("type", "float")) for w in weights}
    return _FROM_BITS.get(kinds.pop()) if len(kinds) == 1 else "MIXED_PRECISION"
