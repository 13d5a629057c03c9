"""FP-Quant: rotated weights in NVFP4 or MXFP4, scales from the largest magnitude or from the standard deviation.

Source: fp_quant 0.3.2 (module/linear.py) for rotations and global scales; QuTLASS's tests (mxfp4_test.py, nvfp4_test.py,
`_forward_quantize_ref`) for what its kernels compute. Those need a GPU; nothing of them was run.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jq.algorithms import narrow

QUEST = (
    2.92247856 / 6.0
)  # largest magnitude of 32 normally distributed values that gives the least square error, over 6
TINY = 1e-8


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
