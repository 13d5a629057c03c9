"""FP-Quant's inputs: rotated, then rounded to NVFP4 or MXFP4.

NVFP4 after fp_quant 0.3.2's pseudoquantization kernel (module/triton/nvfp4.py): ties go to the smaller magnitude. MXFP4
after the reference of QuTLASS's tests (mxfp4_test.py): ties to even. Both kernels need a GPU, so this follows their text;
the order of its float32 sums is its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import exact
from jq.activation_schemes.torchao_mx import to_element
from jq.activations import register
from jq.algorithms.fp_quant import QUEST, TINY
from jq.matmul import dense_matmul

_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@register("fp_quant")
def fp_quant(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: rotated and rounded inputs times the rotated weight."""
    whole = jnp.asarray(w.extras["act_global_scale"]).astype(jnp.float32).reshape(())
    rotated = w.rotate(x.astype(jnp.bfloat16))
    if w.activation.get("dtype") == "nvfp4":
        rounded = _nvfp4(rotated.reshape(x.shape[0], -1, 16), whole)
    else:
        rounded = _mxfp4(rotated.reshape(x.shape[0], -1, 32), whole, quest=w.activation.get("method") == "quest")
    return dense_matmul(rounded.reshape(x.shape).astype(x.dtype), w.base.replace(dtype=str(x.dtype)).dequantize())


def _nvfp4(groups: jax.Array, whole: jax.Array) -> jax.Array:
    """float32[M, blocks, 16] after e4m3 scales and e2m1 values."""
    peak = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    bounded = jnp.clip(exact.div(whole * peak, jnp.float32(6)), 0, 448)
    scale = exact.float8(bounded, ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    scaled = exact.div(groups * whole, jnp.where(scale == 0, jnp.float32(1), scale))
    level = jnp.searchsorted(jnp.asarray(_BOUNDS), jnp.abs(scaled), side="left")
    values = jnp.take(jnp.asarray(_VALUES), level) * jnp.where(scaled > 0, jnp.float32(1), jnp.float32(-1))
    return exact.div(values * scale, whole)


def _mxfp4(groups: jax.Array, whole: jax.Array, *, quest: bool) -> jax.Array:
    """float32[M, blocks, 32] after powers of two and e2m1 values; values beyond 6 are clipped."""
    spread = jnp.std(groups, axis=-1) * jnp.float32(QUEST) if quest else jnp.max(jnp.abs(groups), axis=-1)
    _, exponent = jnp.frexp(spread + jnp.float32(TINY))
    exponent = (exponent - 1)[..., None]
    values = to_element(groups * exact.pow2(-exponent) * whole, "float4_e2m1fn_x2")
    return exact.div(values * exact.pow2(exponent), whole)
