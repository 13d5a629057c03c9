"""Qwen3: Qwen2 without the biases, with an RMS norm on each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models import qwen2
from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common(config, DEFAULTS).replace(qk_norm="head")


FAMILY = Family(name="qwen3", model_types=("qwen3",), spec=spec)
