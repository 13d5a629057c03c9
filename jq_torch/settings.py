"""What `jq_torch.enable` was told; a model keeps the settings under which it was loaded."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `enable`.

    Fields:
      quantize_activations: False computes with float activations where the checkpoint quantizes them.
      packed: False dequantizes every layer once, at its first use, and keeps the dense weight beside the packed one:
        faster on a CPU, at the memory of the float model.
    """

    quantize_activations: bool = True
    packed: bool = True


_current = Settings()


def current() -> Settings:
    return _current


def use(settings: Settings) -> Settings:
    """Sets the settings for models loaded from now on; returns those before."""
    global _current
    before, _current = _current, settings
    return before
