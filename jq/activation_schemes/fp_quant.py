"""FP-Quant's inputs: rotated, then rounded to NVFP4 as its pseudoquantization kernel does.

After fp_quant 0.3.2 (module/triton/nvfp4.py): ties go to the smaller magnitude. That kernel needs a GPU, so this follows
its text; the order of its float32 sums is its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import exact
from jq.activations import register
from jq.errors import UnsupportedError
from jq.matmul import dense_matmul

_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@register("fp_quant")
def fp_quant(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: rotated and rounded inputs times the rotated weight.

    Raises:
      UnsupportedError: mxfp4.
    """
    if w.activation.get("dtype") != "nvfp4":
        raise UnsupportedError(
            "FP-Quant's mxfp4 activations are not done here, nvfp4 is; quantize_activations=False computes with float "
            "activations"
        )
    whole = jnp.asarray(w.extras["act_global_scale"]).astype(jnp.float32).reshape(())
    groups = w.rotate(x.astype(jnp.bfloat16)).reshape(x.shape[0], -1, 16)
    peak = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    scale = (
        jnp.clip(exact.div(whole * peak, jnp.float32(6)), 0, 448).astype(ml_dtypes.float8_e4m3fn).astype(jnp.float32)
    )
    scaled = exact.div(groups * whole, jnp.where(scale == 0, jnp.float32(1), scale))
    level = jnp.searchsorted(jnp.asarray(_BOUNDS), jnp.abs(scaled), side="left")
    values = jnp.take(jnp.asarray(_VALUES), level) * jnp.where(scaled > 0, jnp.float32(1), jnp.float32(-1))
    rounded = exact.div(values * scale, whole).reshape(x.shape).astype(x.dtype)
    return dense_matmul(rounded, w.base.replace(dtype=str(x.dtype)).dequantize())
