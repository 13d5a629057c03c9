"""LLM.int8's row-wise 8-bit quantization of weights (bitsandbytes 0.50.2, CPU)."""

from __future__ import annotations

import numpy as np

from jq.algorithms import blocks


def quantize_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One scale per output, from the weight rounded to float16.

    The library computes `127 / absmax` as `127 * (1 / absmax)`; a true division moves about 1 code of 10,000. Its
    CUDA code divides approximately, so codes differ there at ties.

    Args:
      w: float[N, K].

    Returns:
      codes int8[N, K] and SCB float32[N] (row maxima); weight = codes * SCB / 127. Rows of zeros have codes 0.
    """
    codes = np.empty(w.shape, np.int8)
    absmax = np.empty(w.shape[0], np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        for rows in blocks.row_slices(w.shape):
            half = w[rows].astype(np.float16).astype(np.float32)
            top = np.abs(half).max(axis=1)
            factor = np.float32(127) * (np.float32(1) / top)
            scaled = np.rint(half * factor[:, None])
            codes[rows] = np.where(np.isfinite(scaled), scaled, 0)
            absmax[rows] = top
    return codes, absmax
