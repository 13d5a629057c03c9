"""Phi-3 and Phi-4-mini: q/k/v and gate/up stored as one matrix each, partial rotation, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models import rope as rope_module
from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # names of early uploads
        rope = {**rope, "rope_type": "longrope"}
    made = common({**config, "rope_parameters": rope, "rope_scaling": None}, DEFAULTS).replace(fused=True)
    switched = [r for r in made.ropes if r.kind == "longrope"]
    return made.replace(reread_at=rope_module.switch(switched[0])) if switched else made


FAMILY = Family(name="phi3", model_types=("phi3",), spec=spec)
