"""compressed-tensors' min/max quantization of weights (observer `memoryless_minmax`), in the dtype of the weight.

Every operation rounds to the weight's dtype (bfloat16, float16 or float32), as its CPU path does; the Triton path of
0.20 divides in float32, so codes at ties differ on a GPU. numpy in, numpy out. Held against compressed-tensors 0.20.0
(quantization/utils/helpers.py `calculate_qparams`, lifecycle/forward_helpers.py `_quantize`).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jq.algorithms import narrow

F32 = np.float32
# `torch.finfo(dtype).eps`: what a scale of zero becomes.
EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float8_e4m3fn": 2.0**-3}
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23}
# bits of an MX element -> (mantissa bits whose half a step is added to the largest magnitude, what the exponent loses)
MX_SCALE = {4: (1, 2), 6: (3, 2), 8: (1, 8)}


def ranges(groups: np.ndarray, axes: int | tuple[int, ...] = -1) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value over `axes`, zero included, in the groups' dtype."""
    wide = groups.astype(F32)
    low, high = np.minimum(wide.min(axis=axes), 0), np.maximum(wide.max(axis=axes), 0)
    return low.astype(groups.dtype), high.astype(groups.dtype)


def symmetric_scale(low: np.ndarray, high: np.ndarray, width: float) -> np.ndarray:
    """max(|low|, |high|) / (width / 2), width the distance of the extreme codes (15 for int4, 896 for e4m3)."""
    dtype = low.dtype
    scale = np.maximum(-low, high) / np.asarray(width / 2, dtype)
    return np.where(scale == 0, np.asarray(EPS[str(dtype)], dtype), scale)


def asymmetric(low: np.ndarray, high: np.ndarray, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale (high - low) / (most - least) and int8 zero clamp(least - low / scale)."""
    dtype = low.dtype
    scale = (high - low) / np.asarray(most - least, dtype)
    safe = np.where(scale == 0, np.ones((), dtype), scale)
    zero = np.asarray(least, dtype) - low / safe
    zero = np.rint(np.clip(zero.astype(F32), least, most)).astype(np.int8)
    zero = np.where(scale == 0, np.int8(0), zero)
    return np.where(scale == 0, np.asarray(EPS[str(dtype)], dtype), scale), zero


def integer_codes(w: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, least: int, most: int) -> np.ndarray:
    """int8 codes round(clamp(w / scale + zero)); scale and zero broadcast to w."""
    scaled = w / scale
    if zero is not None:
        scaled = scaled + zero.astype(w.dtype)
    return np.rint(np.clip(scaled.astype(F32), least, most)).astype(np.int8)


def mx_exponents(peak: np.ndarray, bits: int) -> np.ndarray:
    """Exponents of MX scales (int32, -127..128) from largest magnitudes, rounded up from a significand of 1.75.

    Half a step of the element's mantissa is added to the bit pattern, the carry decides (`MX_SCALE`). float16 scales that underflow become one, as in the library.
    """
    mantissa = MANTISSA[str(peak.dtype)]
    pattern = np.abs(peak).view(f"u{peak.dtype.itemsize}").astype(np.int64)
    kept, largest = MX_SCALE[bits]
    field = (pattern + (1 << (mantissa - kept - 1))) >> mantissa
    exponent = field - (15 if mantissa == 10 else 127) - largest
    exponent = np.clip(np.where(field == 0, -127, exponent), -127, 128).astype(np.int32)
    return np.where(exponent < -24, 0, exponent) if mantissa == 10 else exponent


def float_codes(scaled: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 of w / scale: bit patterns of e4m3 (8), E2M3 (6) or E2M1 (4), saturating."""
    if bits == 8:
        return narrow.e4m3_codes(scaled)
    wide = scaled.astype(F32)
    # The library multiplies by torch.sign, which is +0 for -0: a weight of -0 becomes code 0.
    wide = np.where(wide == 0, F32(0), wide)
    return narrow.e2m1_codes(wide) if bits == 4 else narrow.e2m3_codes(wide)


def nvfp4(groups: np.ndarray, peak: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NVFP4: global scale 2688 / amax (torch's reciprocal times number, in dt), e4m3 scales of groups, E2M1 codes.

    Args:
      groups: [N, K/16, 16].
      peak: largest magnitude to use in place of the weight's own (fused q, k, v; gate, up share one).

    Returns:
      uint8 codes [N, K/16, 16], e4m3 bit patterns uint8 [N, K/16], float32 [1] (a divisor).
    """
    dtype = groups.dtype
    low, high = ranges(groups)
    top = np.asarray(max(float(-low.min()), float(high.max())) if peak is None else peak, dtype)
    top = np.maximum(top, np.asarray(ml_dtypes.finfo(dtype).tiny, dtype))
    with np.errstate(over="ignore"):
        whole = ((np.ones((), dtype) / top) * np.asarray(448.0 * 6.0, dtype)).astype(F32).reshape(1)
    whole = np.where(np.isfinite(whole), whole, F32(1))
    scale = whole * (np.maximum(-low, high) / np.asarray(6, dtype)).astype(F32)
    stored = np.clip(scale, F32(-448), F32(448)).astype(narrow.E4M3)
    stored = np.where(stored.astype(F32) == 0, np.asarray(EPS["float8_e4m3fn"], narrow.E4M3), stored)
    scaled = groups.astype(F32) / (stored.astype(F32) / whole)[..., None]
    return float_codes(scaled, 4), stored.view(np.uint8), whole
