"""What `jq_torch.enable` was told; a model keeps the settings under which it was loaded."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `enable`.

    Fields:
      quantize_activations: False computes with float activations where the checkpoint quantizes them.
      packed: False dequantizes every layer once, at its first use, and keeps the dense weight beside the packed one
        (no work at each call, the memory of the float model on top).
      kernels: GPU kernels on torch's current stream where they fit (4 and 8 bits, compute capability 9.0, jax 0.11);
        False dequantizes at each call.
    """

    quantize_activations: bool = True
    packed: bool = True
    kernels: bool = True

    def apply(self, module: Any) -> None:
        """Tells a packed layer or experts module."""
        if not self.packed:
            module.keep_dense()
        module.use(quantize_activations=self.quantize_activations, kernels=self.kernels)


_current = Settings()


def current() -> Settings:
    return _current


def use(settings: Settings) -> Settings:
    """Sets the settings for models loaded from now on; returns those before."""
    global _current
    before, _current = _current, settings
    return before
