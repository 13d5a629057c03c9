"""AWQ's scaled activation: `act(x) / scales`, with the scales of the file."""

from __future__ import annotations

import torch
from torch import nn


class ScaledActivation(nn.Module):
    """An activation function whose output is divided by per-channel `scales` (autoawq's `ScaledActivation`).

    autoawq moves the scales of the layer behind GELU into the activation, since they cannot be folded into a linear
    layer before it (autoawq 0.2.9, awq/modules/act.py).
    """

    scales: torch.Tensor

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) / self.scales.view(1, 1, -1).to(x.device)
