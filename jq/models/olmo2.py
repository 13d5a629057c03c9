"""OLMo 2: norms behind attention and MLP, and over all heads of q and k together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jq.models import llama
from jq.models.family import Family
from jq.models.spec import DecoderSpec, common

DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    return common({**config, "sliding_window": None}, DEFAULTS).replace(qk_norm="all", post_norm=True)


FAMILY = Family(name="olmo2", model_types=("olmo2",), spec=spec)
