"""`ByModule`: a method for each module of a model, where a config names modules."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ByModule:
    """Methods of one format under names; a subclass says which name is for which module.

    Fields:
      methods: {name: method, None where modules of that name stay float}.
    """

    methods: dict[str, Any]

    @property
    def bits(self) -> float:
        return max(getattr(m, "bits", 8) for m in self.methods.values() if m is not None)

    @property
    def format(self) -> str:
        return next(m.format for m in self.methods.values() if m is not None)

    def of(self, path: str) -> Any:
        """The method for the module at `path`, None where it stays float."""
        raise NotImplementedError
