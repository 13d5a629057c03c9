"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and an optional window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common(config, DEFAULTS).replace(attention_bias=True, output_bias=False)


FAMILY = Family(name="qwen2", model_types=("qwen2",), spec=spec)
