"""Granite: Llama with four constant multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models import llama
from jq.models.family import Family
from jq.models.spec import DecoderSpec, common


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common({**config, "sliding_window": None}, llama.DEFAULTS).replace(
        embedding_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        attention_scale=float(config.get("attention_multiplier", 1.0)),
        logits_divisor=float(config.get("logits_scaling", 1.0)),
    )


FAMILY = Family(name="granite", model_types=("granite",), spec=spec)
