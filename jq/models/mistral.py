"""Mistral and Ministral: Llama with a sliding attention window (in all layers, or where `layer_types` says so)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common(config, DEFAULTS)


FAMILY = Family(name="mistral", model_types=("mistral", "ministral"), spec=spec)
