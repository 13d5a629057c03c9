"""FP-Quant: rotated weights in NVFP4 or MXFP4, scales from the largest magnitude or from the standard deviation.

Source: fp_quant 0.3.2 (module/linear.py) for rotations and global scales; QuTLASS's tests (mxfp4_test.py, nvfp4_test.py,
`_forward_quantize_ref`) for what its kernels compute. Those need a GPU; nothing of them was run. `fake_nvfp4` and
`fake_mxfp4` are fp_quant's pseudoquantization kernels (module/triton), which Triton's interpreter runs on a CPU.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jq import exact
from jq.algorithms import narrow
from jq.bits import namespace

# Largest magnitude of 32 normally distributed values that gives the least square error, over 6.
QUEST = 2.92247856 / 6.0
TINY = 1e-8
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def rotation(name: str, size: int) -> np.ndarray:
    """float32[size, size]: "hadamard", "identity", or "gsr", the Hadamard columns by their number of sign changes.

    Raises:
      ValueError: another name, or a Hadamard matrix whose size is no power of two.
    """
    if name == "identity":
        return np.eye(size, dtype=np.float32)
    if name not in ("hadamard", "gsr") or size < 1 or size & (size - 1):
        raise ValueError(
            f"FP-Quant: no rotation {name!r} of {size} inputs; hadamard, identity and gsr of powers of two"
        )
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if name == "gsr":
        matrix = matrix[:, np.argsort((np.diff(matrix, axis=0) != 0).sum(axis=0))]
    return (matrix * size**-0.5).astype(np.float32)


def quantize(
    w: np.ndarray, matrix: np.ndarray, block: int, whole: float, *, quest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of the rotated weight.

    Args:
      w: float[N, K], rounded to bfloat16 first.
      matrix: rotation [g, g], rounded to bfloat16 first.
      block: 16 for e4m3 scales, 32 for powers of two.
      whole: global scale; values are codes * scale / whole.
      quest: scales from the standard deviation, for powers of two.

    Returns:
      uint8 [N, K] e2m1 codes, uint8 [N, K/block] bytes of the scales.
    """
    size = len(matrix)
    half = w.astype(ml_dtypes.bfloat16).astype(np.float64).reshape(-1, size)
    rotated = (half @ matrix.astype(ml_dtypes.bfloat16).astype(np.float64)).reshape(w.shape[0], -1, block)
    peak = np.abs(rotated).max(axis=-1)
    if block == 16:
        stored = np.minimum(peak * whole / 6, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        scale, stored = stored.astype(np.float64), stored.view(np.uint8)
    else:
        exponent = np.floor(np.log2((rotated.std(axis=-1) * QUEST if quest else peak) + TINY))
        scale, stored = np.exp2(exponent), (exponent + 127).astype(np.uint8)
    scaled = rotated * whole / np.where(scale == 0, 1, scale)[..., None]
    return narrow.e2m1_codes(np.where(scale[..., None] == 0, 0, scaled)).reshape(w.shape), stored


def fake_nvfp4(groups: Any, whole: Any) -> Any:
    """float32[..., 16] after e4m3 scales and e2m1 values; numpy or JAX.

    Args:
      whole: the global scale, float32.
    """
    xp = namespace(groups)
    peak = xp.max(xp.abs(groups), axis=-1, keepdims=True)
    bounded = xp.clip(exact.div(whole * peak, np.float32(6)), 0, 448)
    scale = exact.float8(bounded, ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = _fake_e2m1(exact.div(groups * whole, xp.where(scale == 0, np.float32(1), scale)))
    return exact.div(values * scale, whole)


def fake_mxfp4(groups: Any, *, quest: bool) -> Any:
    """float32[..., 32] after e2m1 values times powers of two, a third of them without `quest`; numpy or JAX."""
    xp = namespace(groups)
    if quest:
        mean = exact.div(xp.sum(groups, axis=-1, keepdims=True), np.float32(32))
        square = exact.div(xp.sum(groups * groups, axis=-1, keepdims=True), np.float32(32))
        spread = xp.sqrt(exact.mul_add(-mean, mean, square)) * np.float32(QUEST) + np.float32(TINY)
        scale = exact.pow2(xp.frexp(spread)[1] - 1)
    else:
        peak = xp.max(xp.abs(groups), axis=-1, keepdims=True)
        power = exact.div(exact.pow2(xp.frexp(peak)[1] - 3), np.float32(0.75))
        scale = xp.where(peak == 0, np.float32(0), power)
    return _fake_e2m1(exact.div(groups, xp.where(scale == 0, np.float32(1), scale))) * scale


def _fake_e2m1(scaled: Any) -> Any:
    """The nearest e2m1 value, ties to the smaller; what is not above 0 is negative, zeros too."""
    xp = namespace(scaled)
    size = xp.abs(scaled)
    level = sum((size > bound).astype(np.int32) for bound in narrow.E2M1_BOUNDS)
    return xp.take(xp.asarray(_VALUES), level) * xp.where(scaled > 0, np.float32(1), np.float32(-1))


def fake(w: np.ndarray, matrix: np.ndarray, block: int, whole: float, *, quest: bool = False) -> np.ndarray:
    """The rotated weight [N, K] rounded to what codes and scales can hold, in w's dtype: `dqweight`.

    Args:
      w: float[N, K].
      matrix: rotation [g, g] of w's dtype.
      block, whole, quest: as in `quantize`.
    """
    size = len(matrix)
    rotated = w.astype(np.float32).reshape(-1, size) @ matrix.astype(np.float32)
    groups = rotated.reshape(w.shape[0], -1, block)
    rounded = fake_nvfp4(groups, np.float32(whole)) if block == 16 else fake_mxfp4(groups, quest=quest)
    return rounded.reshape(w.shape).astype(w.dtype)
