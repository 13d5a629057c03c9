"""Rounding of weights to 4-, 6- and 8-bit floats with the scale rules of the libraries that made them usual.

numpy in, numpy out: IEEE arithmetic step by step, subnormals kept. torch evaluates `number / tensor` as the reciprocal
of the tensor times the number; where a library writes that, so do these functions.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

F32 = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
# Boundaries between the magnitudes 0 .5 1 1.5 2 3 4 6; a value on a boundary goes to the even code.
E2M1_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """Bit patterns uint8 of the nearest e4m3 values, half to even, saturating at 448."""
    top = np.asarray(448, x.dtype)
    return np.clip(x, -top, top).astype(E4M3).view(np.uint8)


def e2m1_codes(x: np.ndarray, *, keep_zero_sign: bool = True) -> np.ndarray:
    """Codes uint8 (sign in bit 3) of the nearest of 0 .5 1 1.5 2 3 4 6, ties to the even code, saturating.

    Args:
      x: float32.
      keep_zero_sign: the sign bit is x's, so that -0 has code 8; else it is that of x < 0 (modelopt).
    """
    magnitude = np.abs(x)
    low = np.searchsorted(E2M1_BOUNDS, magnitude, "left")
    high = np.searchsorted(E2M1_BOUNDS, magnitude, "right")
    code = np.where(low % 2 == 0, low, high)
    sign = np.signbit(x) if keep_zero_sign else x < 0
    return (code | (sign.astype(np.int64) << 3)).astype(np.uint8)


def e2m3_codes(x: np.ndarray) -> np.ndarray:
    """Codes uint8 (sign in bit 5) of the nearest E2M3 values, half to even, saturating at 7.5."""
    magnitude = np.minimum(np.abs(x).astype(F32), F32(7.5))
    step = np.where(magnitude < 2, F32(0.125), np.where(magnitude < 4, F32(0.25), F32(0.5)))
    value = np.rint(magnitude / step) * step
    # Values are (1 + m/8) * 2**e above 1 and m/8 below, so codes count the steps.
    code = np.where(value < 2, value * 8, np.where(value < 4, 8 + value * 4, 16 + value * 2))
    return (code.astype(np.int64) | (np.signbit(x).astype(np.int64) << 5)).astype(np.uint8)


def e3m2_codes(x: np.ndarray) -> np.ndarray:
    """Codes uint8 (sign in bit 5) of the nearest E3M2 values, half to even, saturating at 28."""
    magnitude = np.minimum(np.abs(x).astype(F32), F32(28))
    _, exponent = np.frexp(magnitude)
    place = np.maximum(exponent - 1, -2)  # the exponent of the leading digit; -2 for subnormal numbers too
    value = np.ldexp(np.rint(np.ldexp(magnitude, 2 - place)), place - 2)
    _, exponent = np.frexp(value)
    place = np.where(value == 0, -2, np.maximum(exponent - 1, -2))
    code = np.ldexp(value, 2 - place).astype(np.int64) + 4 * (place + 2)
    return (code | (np.signbit(x).astype(np.int64) << 5)).astype(np.uint8)


def tiles(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """w [N, K] -> [N/rows, rows, K/cols, cols], zero padded where the block does not divide it."""
    n, k = w.shape
    padded = np.pad(w, ((0, -n % block[0]), (0, -k % block[1])))
    return padded.reshape(-(-n // block[0]), block[0], -(-k // block[1]), block[1])


def untile(t: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `tiles`."""
    flat = t.reshape(t.shape[0] * t.shape[1], t.shape[2] * t.shape[3])
    return np.ascontiguousarray(flat[: shape[0], : shape[1]])


def fp8_blocks(w: np.ndarray, block: tuple[int, int], *, pow2: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """transformers' `Fp8Quantize`: e4m3 codes of blocks and the inverse scales (multipliers of dequantization).

    Args:
      w: float32 [N, K], tiled by `block` without remainder.
      pow2: round the inverse scale up to a power of two (scale_fmt "ue8m0").

    Returns:
      uint8 [N, K] bit patterns, float32 [N/rows, K/cols].
    """
    t = tiles(w, block)
    peak = np.abs(t).max(axis=(1, 3))
    one = F32(1)
    # 448 / peak in torch is (1 / peak) * 448: with a division 1 ulp of a scale and its codes differ.
    scale = np.where(peak > 0, (one / np.where(peak > 0, peak, one)) * F32(448), one).astype(F32)
    inverse = (one / scale).astype(F32)
    if pow2:
        exponent = np.ceil(np.log2(np.maximum(inverse, np.finfo(F32).tiny))).astype(np.int32)
        inverse = np.ldexp(one, exponent).astype(F32)
        scale = (one / inverse).astype(F32)
    return untile(e4m3_codes(t * scale[:, None, :, None]), w.shape), inverse


def fp8_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FBGEMM `quantize_fp8_per_row` of weights: s = max(max|row| / 448, 1 / (448 * 512)), codes e4m3(w / s).

    Args:
      w: float32 [..., N, K] (bfloat16 values).

    Returns:
      uint8 [..., N, K] bit patterns, float32 [..., N, 1].
    """
    scale = np.maximum(np.abs(w).max(axis=-1, keepdims=True) / F32(448), F32(1.0 / (448.0 * 512.0)))
    return e4m3_codes(w / scale), scale


def mxfp4_ocp(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX v1.0, section 6.3: exponent floor(log2(amax)) - 2 for 32 values, E2M1 half to even, saturating.

    Args:
      w: float [..., K], K a multiple of 32.

    Returns:
      uint8 codes [..., K], uint8 [..., K/32] = exponent + 127.
    """
    groups = w.astype(F32).reshape(*w.shape[:-1], w.shape[-1] // 32, 32)
    peak = np.abs(groups).max(axis=-1)
    _, exponent = np.frexp(peak)
    exponent = np.where(peak > 0, np.clip(exponent - 1 - 2, -127, 127), -127)
    scaled = np.ldexp(groups, -exponent[..., None])
    return e2m1_codes(scaled).reshape(w.shape), (exponent + 127).astype(np.uint8)


def mxfp4_triton(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """triton_kernels' `downcast_to_mxfp_torch`: the exponent of amax / 6 rounded up, so that nothing saturates.

    Values half way between two codes go away from zero; w is rounded to bfloat16 first, as transformers does.

    Args:
      w: float [..., K], K a multiple of 32.

    Returns:
      uint8 codes [..., K], uint8 [..., K/32] = exponent + 127 (0 for a block of zeros).
    """
    groups = w.astype(ml_dtypes.bfloat16).astype(F32).reshape(*w.shape[:-1], w.shape[-1] // 32, 32)
    step = np.abs(groups).max(axis=-1) / F32(6)
    stored = (np.ascontiguousarray(step).view(np.int32) + 0x7FFFFF) >> 23
    scaled = np.where(stored[..., None] == 0, groups * F32(0), np.ldexp(groups, 127 - stored[..., None]))
    code = np.searchsorted(E2M1_BOUNDS, np.abs(scaled), "right")
    sign = np.signbit(scaled).astype(np.int64) << 3
    return (code | sign).astype(np.uint8).reshape(w.shape), stored.astype(np.uint8)


def nvfp4_modelopt(w: np.ndarray, peak: float | np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """modelopt's NVFP4QTensor on the CPU (0.47.0).

    s2 = amax / 2688; block s = e4m3(clamp(amax_block / (6 * s2), 2**-9, 448)), 1 for a block of zeros;
    code = E2M1(w / (s * s2)), the sign bit that of w < 0.

    Args:
      w: float [N, K], K a multiple of 16 (its own dtype decides nothing: all work is float32).
      peak: largest magnitude to use in place of w's own (fused q, k, v share one scale).

    Returns:
      uint8 codes [N, K], uint8 [N, K/16] e4m3 bit patterns, float32 [] s2.
    """
    x = w.astype(F32)
    top = np.abs(x).max() if peak is None else peak
    whole = np.asarray(F32(top) / F32(6.0 * 448.0), F32)
    groups = x.reshape(x.shape[0], -1, 16)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.abs(groups).max(axis=-1) / (F32(6) * whole)
    scale = np.where((scale == 0) | ~np.isfinite(scale), F32(1), scale)
    stored = np.clip(scale, F32(2.0**-9), F32(448)).astype(E4M3)
    step = stored.astype(F32) * whole
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(step[..., None] > 0, groups / step[..., None], F32(0))
    return e2m1_codes(scaled, keep_zero_sign=False).reshape(x.shape), stored.view(np.uint8), whole
