"""peft on packed layers: LoRA modules that never write into a packed weight."""

from __future__ import annotations

from typing import Any


def patch(state: Any) -> None:
    """placeholder"""
