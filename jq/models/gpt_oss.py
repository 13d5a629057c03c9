"""gpt-oss: stacked experts (MXFP4 in the published files), attention sinks, alternating windows, YaRN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.rope import read
from jq.models.spec import DecoderSpec, Experts, common

DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "attention_bias": True,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    config = dict(config)
    count = int(config.get("num_hidden_layers") or DEFAULTS["num_hidden_layers"])
    if not config.get("layer_types"):
        config["layer_types"] = ["sliding_attention" if (i + 1) % 2 else "full_attention" for i in range(count)]
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = ROPE
    made = common(config, DEFAULTS, theta=150000.0)
    experts = Experts(
        count=int(config.get("num_local_experts") or config.get("num_experts") or 128),
        top=int(config.get("num_experts_per_tok") or config.get("experts_per_token") or 4),
        width=made.intermediate_size,
        softmax_first=False,
        names=("mlp", "router", "gate_up_proj", "gate_up_proj", "down_proj"),
        stacked=True,
        alpha=float(config.get("swiglu_alpha") or 1.702),
        limit=float(config.get("swiglu_limit") or 7.0),
    )
    return made.replace(
        layers=tuple(dataclasses.replace(x, experts=True) for x in made.layers),
        ropes=(read({**DEFAULTS, **config}, made.head_dim, theta=150000.0),),
        experts=experts,
        sinks=True,
    )


FAMILY = Family(name="gpt_oss", model_types=("gpt_oss",), spec=spec)
