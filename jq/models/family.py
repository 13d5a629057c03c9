"""What a model family is: a name, its `model_type` values, and how its config.json becomes a `DecoderSpec`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jq.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table in `jq.models`.

    Fields:
      name: of the family.
      model_types: values of config.json's `model_type` that mean it.
      spec: config.json -> DecoderSpec.
    """

    name: str
    model_types: tuple[str, ...]
    spec: Callable[[Mapping[str, Any]], DecoderSpec]
