"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with experts in most layers, the former with one that all tokens pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq.models import qwen2
from jq.models.family import Family
from jq.models.spec import DecoderSpec, Experts, common

TWO = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
THREE = {
    **TWO,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "shared_expert_intermediate_size": 0,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    two = config.get("model_type") == "qwen2_moe"
    merged = {**(TWO if two else THREE), **config}
    made = common(merged, {}).replace(qk_norm="" if two else "head")
    if two:
        made = made.replace(attention_bias=bool(merged.get("qkv_bias", True)), output_bias=False)
    experts = Experts(
        count=int(config.get("num_experts") or config.get("num_local_experts") or merged["num_experts"]),
        top=int(merged["num_experts_per_tok"]),
        width=int(merged["moe_intermediate_size"]),
        normalize=bool(merged.get("norm_topk_prob", False)),
        shared=int(merged["shared_expert_intermediate_size"]) if two else 0,
    )
    dense = set(merged.get("mlp_only_layers") or ())
    step = int(merged.get("decoder_sparse_step") or 1)
    layers = tuple(
        dataclasses.replace(x, experts=i not in dense and experts.count > 0 and (i + 1) % step == 0)
        for i, x in enumerate(made.layers)
    )
    return made.replace(layers=layers, experts=experts)


FAMILY = Family(name="qwen_moe", model_types=("qwen2_moe", "qwen3_moe"), spec=spec)
