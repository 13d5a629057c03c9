"""SmolLM3: Llama in which some layers have no position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    made = common(config, DEFAULTS, theta=2000000.0)
    interval = config.get("no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(len(made.layers))]
    layers = tuple(layer if on else layer.without_rope() for layer, on in zip(made.layers, rotates))
    return made.replace(layers=layers)


FAMILY = Family(name="smollm3", model_types=("smollm3",), spec=spec)
