"""Llama (1, 2, 3.x) and the models that are stored as `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common({**config, "sliding_window": None}, DEFAULTS)


FAMILY = Family(name="llama", model_types=("llama",), spec=spec)
