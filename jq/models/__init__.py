"""Decoders in Flax NNX. A family is a module here with a `FAMILY`, and its name in `_MODULES`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from jq.errors import CheckpointError, JqError, UnsupportedError
from jq.models.family import Family as Family
from jq.models.spec import DecoderSpec

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


def spec_of(config: Mapping[str, Any], label: str) -> DecoderSpec:
    """The decoder that a config.json describes.

    Args:
      config: config.json.
      label: directory, for messages.

    Raises:
      UnsupportedError: a family, position embedding, layer type or activation that is not known here.
      CheckpointError: a value that is missing or makes no sense.
    """
    from jq.models.decoder import ACTIVATIONS

    family = family_of(config, label)
    try:
        spec = family.spec(config)
        hash(spec)  # it is static: the key of what is compiled
    except JqError as e:
        raise type(e)(f"{label}: {e}") from e
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise CheckpointError(
            f"{label}: config.json: cannot be read as a {family.name} model ({type(e).__name__}: {e})"
        ) from e
    numbers = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.type in ("float", "float | None")}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{label}: config.json: {value!r:.80} (for {name}) is no number")
    if spec.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedError(
            f"{label}: config.json: hidden_act {spec.activation!r} is not known here; known: {known}"
        )
    return spec
