"""Decoders in Flax NNX. A family is a module here with a `FAMILY`, and its name in `_MODULES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from jq.errors import UnsupportedError
from jq.models.family import Family as Family

_MODULES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "gemma",
    "mixtral",
    "qwen_moe",
    "gpt_oss",
)


@cache
def table() -> Mapping[str, Family]:
    """Every family, by `model_type`."""
    families = [importlib.import_module(f"jq.models.{name}").FAMILY for name in _MODULES]
    return {model_type: family for family in families for model_type in family.model_types}


def family_of(config: Mapping[str, Any], label: str = "config.json") -> Family:
    """The family of a config.json.

    Raises:
      UnsupportedError: no family has its `model_type`; the message lists those that exist.
    """
    found = table().get(str(config.get("model_type")))
    if found is None:
        raise UnsupportedError(
            f"{label}: model_type {config.get('model_type')!r} has no decoder here; known: {', '.join(table())}. "
            "jq.load_state reads the checkpoint of any architecture: its tensors, dequantize(), jq.save, jq.convert"
        )
    return found
