"""Gemma 1, 2 and 3 (text): norm weights around 1, scaled embeddings, and from Gemma 2 on norms on both sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq.models.family import Family
from jq.models.rope import read
from jq.models.spec import DecoderSpec, common

ONE: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TWO: dict[str, Any] = {
    **ONE,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
THREE: dict[str, Any] = {
    **TWO,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    kind = config.get("model_type")
    defaults = {"gemma": ONE, "gemma2": TWO}.get(str(kind), THREE)
    count = int(config.get("num_hidden_layers") or defaults["num_hidden_layers"])
    config = dict(config)
    if kind == "gemma":
        config["sliding_window"] = None
    elif not config.get("layer_types"):
        period = 2 if kind == "gemma2" else config.get("sliding_window_pattern") or 6
        config["layer_types"] = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    ropes = {"rope_parameters": None, "rope_scaling": None} if kind == "gemma3_text" else {}  # `_two_ropes` reads them
    made = common({**config, **ropes}, defaults)
    made = made.replace(
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        embedding_scale=made.hidden_size**0.5,
        final_softcap=config.get("final_logit_softcapping", defaults.get("final_logit_softcapping")),
    )
    if kind == "gemma":
        return made
    scalar = float(config.get("query_pre_attn_scalar") or 256)
    made = made.replace(
        sandwich=True,
        attention_scale=scalar**-0.5,
        attention_softcap=config.get("attn_logit_softcapping", defaults["attn_logit_softcapping"]),
    )
    return made if kind == "gemma2" else _two_ropes(made, config)


def _two_ropes(made: DecoderSpec, config: Mapping[str, Any]) -> DecoderSpec:
    """Gemma 3: sliding layers rotate with their own base and no scaling; q and k are normed by head."""
    full = read(config, made.head_dim, theta=1e6, layer_type="full_attention")
    local_config = {**config, "rope_theta": config.get("rope_local_base_freq"), "rope_scaling": None}
    local = read(local_config, made.head_dim, theta=1e4, layer_type="sliding_attention")
    layers = tuple(dataclasses.replace(x, rope=0 if x.window is None else 1) for x in made.layers)
    return made.replace(qk_norm="head", ropes=(full, local), layers=layers)


FAMILY = Family(name="gemma", model_types=("gemma", "gemma2", "gemma3_text"), spec=spec)
