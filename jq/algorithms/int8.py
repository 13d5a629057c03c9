"""LLM.int8's row-wise 8-bit quantization of weights (bitsandbytes 0.50.2, CPU)."""

from __future__ import annotations

import numpy as np


def quantize_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One scale per output, from the weight rounded to float16.

    The library computes `127 / absmax` as `127 * (1 / absmax)`; a true division moves about 1 code of 10,000. Its
    CUDA code divides approximately, so codes differ there at ties.

    Args:
      w: float[N, K].

    Returns:
      codes int8[N, K] and SCB float32[N] (row maxima); weight = codes * SCB / 127. Rows of zeros have codes 0.
    """
    with np.errstate(over="ignore"):
        half = w.astype(np.float16)
    absmax = np.abs(half).max(axis=1).astype(np.float32)
    codes = np.empty(w.shape, np.int8)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.float32(127) * (np.float32(1) / absmax)
        step = max(1, (1 << 20) // max(w.shape[1], 1))
        for start in range(0, w.shape[0], step):
            rows = slice(start, start + step)
            scaled = np.rint(half[rows].astype(np.float32) * factor[rows, None])
            codes[rows] = np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
    return codes, absmax
