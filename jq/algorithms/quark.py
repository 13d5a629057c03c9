"""AMD Quark's scales, zero points and codes for weights, by largest magnitude or range.

numpy in, numpy out. Source: amd-quark 0.13 (torch/quantization/observer/observer.py, quantization/utils.py `even_round`,
torch/kernel/hw_emulation/hw_emulation_interface.py `real_quantize_*`), whose code runs on a CPU.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jq.algorithms import narrow

F32 = np.float32
EPS = F32(2.0**-23)  # torch.finfo(torch.float32).eps
# kind -> (mantissa bits, largest exponent)
MX = {"fp4": (1, 2), "fp6_e2m3": (3, 2), "fp6_e3m2": (2, 4)}


def integers(
    groups: np.ndarray, bits: int, *, signed: bool, symmetric: bool, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of groups along the last axis.

    Args:
      groups: float32[..., G].
      dtype: in which scales are formed and stored.

    Returns:
      int32[..., G]; dtype[..., 1]; int32[..., 1].
    """
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0).astype(dtype)
    high = np.maximum(groups.max(axis=-1, keepdims=True), 0).astype(dtype)
    bottom = -(1 << (bits - 1)) if signed else 0
    top = bottom + (1 << bits) - 1
    if symmetric:
        scale = (np.maximum(-low, high).astype(F32) / F32((top - bottom) / 2)).astype(dtype)
        scale = np.maximum(scale, EPS.astype(dtype))
        zero = np.zeros(scale.shape, np.int32)
    else:
        scale = ((high - low).astype(F32) / F32(top - bottom)).astype(dtype)
        scale = np.maximum(scale, EPS.astype(dtype))
        steps = (low.astype(F32) / scale.astype(F32)).astype(dtype)
        zero = np.clip(bottom - np.rint(steps.astype(F32)), bottom, top).astype(np.int32)
    # The inverse is multiplied, and the zero point added before rounding.
    inverse, wide = F32(1) / scale.astype(F32), zero.astype(F32)
    first = np.clip(np.rint(groups * inverse) + wide, bottom, top)
    # A model is frozen to fake-quantized weights in its dtype; what is exported are codes of those.
    frozen = ((first - wide) * scale.astype(F32)).astype(dtype).astype(F32)
    return np.clip(np.rint(frozen * inverse + wide), bottom, top).astype(np.int32), scale, zero


def float8(groups: np.ndarray, kind: type, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Float8 values and scales of groups along the last axis: `kind`[..., G], dtype[..., 1]."""
    top = F32(ml_dtypes.finfo(kind).max)
    scale = (np.abs(groups).max(axis=-1, keepdims=True) / top).astype(dtype)
    scale = np.where(scale == 0, EPS.astype(dtype), scale)
    scaled = (groups / scale.astype(F32)).astype(dtype).astype(F32)
    return np.clip(scaled, -top, top).astype(kind), scale


def powers(groups: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Small floats with power-of-two scales: uint8 codes [..., G] and exponent bytes [...], "even" rounding of scales."""
    mantissa, largest = MX[kind]
    peak = np.ascontiguousarray(np.abs(groups).max(axis=-1).astype(F32))
    raised = ((peak.view(np.int32) + (1 << (22 - mantissa))) >> 23) - 127
    exponent = np.clip(np.where(peak == 0, -126, raised) - largest, -127, 127)
    scaled = np.ldexp(groups.astype(F32), -exponent[..., None])
    encode = {"fp4": narrow.e2m1_codes, "fp6_e2m3": narrow.e2m3_codes, "fp6_e3m2": narrow.e3m2_codes}[kind]
    codes, sign = encode(scaled), {"fp4": 8}.get(kind, 32)
    return np.where(codes == sign, 0, codes).astype(np.uint8), (exponent + 127).astype(np.uint8)  # no -0
