"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq.models import mistral
from jq.models.family import Family
from jq.models.spec import DecoderSpec, Experts, common

DEFAULTS = {**mistral.DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": None}
NAMES = ("block_sparse_moe", "gate", "w1", "w3", "w2")


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    made = common(config, DEFAULTS, theta=1e6)
    experts = Experts(
        count=int(config.get("num_local_experts", 8)),
        top=int(config.get("num_experts_per_tok", 2)),
        width=made.intermediate_size,
        names=NAMES,
    )
    return made.replace(layers=tuple(dataclasses.replace(x, experts=True) for x in made.layers), experts=experts)


FAMILY = Family(name="mixtral", model_types=("mixtral",), spec=spec)
