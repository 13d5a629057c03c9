"""BitNet's ternary rounding (`WeightQuant` of transformers 5.23, integrations/bitnet.py)."""

from __future__ import annotations

import numpy as np

from jq.algorithms.torch_sum import mean_all


def absmean_codes(w: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes and scale of a whole weight.

    Args:
      w: float32[N, K].

    Returns:
      codes int8[N, K] of -1, 0, 1; scale float32, which codes are divided by: 1 / max(mean|w|, 1e-5).
    """
    scale = absmean_scale(w)
    return np.clip(np.rint(w * scale), -1, 1).astype(np.int8), scale


def absmean_scale(w: np.ndarray) -> np.float32:
    """1 / max(mean|w|, 1e-5) of a float32 array."""
    return np.float32(1) / np.maximum(mean_all(np.abs(w)), np.float32(1e-5))
