"""The quantizers of optimum-quanto 0.2.7: weights -> codes and scales, every operation rounded to the weight's dtype.

Source: tensor/optimizers/{absmax_optimizer,max_optimizer,affine_optimizer}.py, library/quantize.py, nn/qmodule.py
(group sizes), tensor/weights/tinygemm/qbits.py (the shift of bfloat16 4-bit groups of 128).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

# qtype -> (largest magnitude that the scale maps the maximum to, storage dtype)
QTYPES: dict[str, tuple[float, np.dtype]] = {
    "qint2": (1, np.dtype(np.uint8)),
    "qint4": (7, np.dtype(np.uint8)),
    "qint8": (127, np.dtype(np.int8)),
    "qfloat8_e4m3fn": (448, np.dtype(ml_dtypes.float8_e4m3fn)),
    "qfloat8_e4m3fnuz": (240, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "qfloat8_e5m2": (57344, np.dtype(ml_dtypes.float8_e5m2)),
}


def group_size_of(in_features: int) -> int | None:
    """Group of 4 and 2 bit weights: 128, or the next smaller multiple of 32 that divides a row; None: no groups."""
    size = 128
    if in_features <= size:
        return None
    while in_features % size and size > 32:
        size -= 32
    return None if in_features % size else size


def symmetric_codes(w: np.ndarray, qtype: str) -> tuple[np.ndarray, np.ndarray]:
    """8-bit quantization by row.

    Args:
      w: float[N, K].
      qtype: an 8-bit key of `QTYPES`.

    Returns:
      data int8 or float8 [N, K]; scale in w's dtype, [N, 1], or a scalar where N = 1.
    """
    top, storage = QTYPES[qtype]
    magnitude = np.abs(w).max() if w.shape[0] == 1 else np.abs(w).max(1, keepdims=True)
    scale = np.asarray(magnitude / w.dtype.type(top), w.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        data = w / scale
    if storage.kind == "i":
        return _to_integer(np.clip(np.rint(data), -128, 127), storage), scale
    limit = w.dtype.type(top)
    codes = np.clip(data, -limit, limit).astype(storage).view(np.uint8)
    if storage == ml_dtypes.float8_e5m2:  # an all-zero row gives 0 / 0; torch's NaN has all mantissa bits
        codes = np.where(np.isnan(data), codes | np.uint8(0x7F), codes)
    return codes.view(storage), scale


def affine_codes(w: np.ndarray, bits: int, *, integer_shift: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4 and 2 bit quantization by group of `group_size_of` weights, or by row.

    Args:
      w: float[N, K].
      bits: 4 or 2.
      integer_shift: round the shifts to integers 0 .. 2**bits - 1.

    Returns:
      codes uint8[R, C]; scale and shift in w's dtype (shift uint8 where integer), [R, 1], or [1, C] where R = 1.
    """
    size = group_size_of(w.shape[1])
    grouped = w.reshape(-1, size) if size else w
    axis = 1 if grouped.shape[0] > 1 else 0  # one row: quanto reduces along the other axis
    low, high = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
    top = 2**bits - 1
    scale = (high - low) / w.dtype.type(top)
    shift = -low
    with np.errstate(divide="ignore", invalid="ignore"):
        if integer_shift:
            shift = _to_integer(np.clip(np.rint(shift / scale), 0, top), np.dtype(np.uint8))
            codes = np.rint(grouped / scale) + shift.astype(w.dtype)
        else:
            codes = np.rint((grouped + shift) / scale)
    codes = _to_integer(np.clip(codes, 0, top), np.dtype(np.uint8))
    if w.dtype == ml_dtypes.bfloat16 and bits == 4 and size == 128:
        shift = _tinygemm_shift(scale, shift)
    return codes, scale, shift


def _tinygemm_shift(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The shift after its way through tinygemm's middle of the range, which rounds twice to bfloat16."""
    if shift.dtype == np.uint8:
        shift = scale * shift.astype(scale.dtype)
    half = scale * scale.dtype.type(8)
    return half - (half - shift)


def _to_integer(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast of values in range; NaN (0 / 0 of an all-zero row) becomes 0, as on the CPUs that torch runs on."""
    return np.where(np.isnan(values), values.dtype.type(0), values).astype(dtype)
