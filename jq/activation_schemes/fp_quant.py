"""FP-Quant's inputs: rotated, then rounded to NVFP4 or MXFP4.

NVFP4, and MXFP4 of pseudoquantized checkpoints, after fp_quant 0.3.2's pseudoquantization kernels (module/triton): ties
go to the smaller magnitude. Other MXFP4 after the reference of QuTLASS's tests (mxfp4_test.py): ties to even; that kernel
needs a GPU, so this follows its text. The order of the float32 sums is its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activation_schemes.elements import to_element
from jq.activations import register
from jq.algorithms.fp_quant import QUEST, TINY, fake_mxfp4, fake_nvfp4
from jq.matmul import dense_matmul


@register("fp_quant")
def fp_quant(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: rotated and rounded inputs times the rotated weight."""
    whole = jnp.asarray(w.extras["act_global_scale"]).astype(jnp.float32).reshape(())
    pseudo, quest = w.activation.get("pseudo"), w.activation.get("method") == "quest"
    rotated = w.rotate(x if pseudo else x.astype(jnp.bfloat16))
    if w.activation.get("dtype") == "nvfp4":
        rounded = fake_nvfp4(rotated.reshape(x.shape[0], -1, 16), whole)
    elif pseudo:
        rounded = fake_mxfp4(rotated.reshape(x.shape[0], -1, 32), quest=quest)
    else:
        rounded = _mxfp4(rotated.reshape(x.shape[0], -1, 32), whole, quest=quest)
    inputs = exact.rounded(rounded.reshape(x.shape).astype(x.dtype))
    return dense_matmul(inputs, w.base.replace(dtype=str(x.dtype)).dequantize())


def _mxfp4(groups: jax.Array, whole: jax.Array, *, quest: bool) -> jax.Array:
    """float32[M, blocks, 32] after powers of two and e2m1 values; values beyond 6 are clipped."""
    spread = jnp.std(groups, axis=-1) * jnp.float32(QUEST) if quest else jnp.max(jnp.abs(groups), axis=-1)
    _, exponent = jnp.frexp(spread + jnp.float32(TINY))
    exponent = (exponent - 1)[..., None]
    values = to_element(groups * exact.pow2(-exponent) * whole, "float4_e2m1fn_x2")
    return exact.div(values * exact.pow2(exponent), whole)
