"""NVIDIA ModelOpt's int8 inputs, as its quantizers simulate them, and the low-rank product beside a weight (SVDQuant).

After nvidia-modelopt 0.47.0 (torch/quantization/nn/modules/tensor_quantizer.py), which runs on a CPU; held against the
outputs of its layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jq import exact
from jq.activation_schemes.fp8 import static_scale
from jq.activations import register, scheme_of
from jq.matmul import dense_matmul


@register("low_rank")
def low_rank(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: the product with `w.base`, whose inputs are quantized, plus (x @ down.T) @ up.T in x's dtype."""
    y = scheme_of(w.base.activation)(x, w.base)
    narrow = exact.rounded(dense_matmul(x, jnp.asarray(w.down).astype(x.dtype)))
    return y + dense_matmul(narrow, jnp.asarray(w.up).astype(x.dtype))


@register("int8_static")
def int8_static(x: jax.Array, w: Any) -> jax.Array:
    """x [M, K] -> [M, N]: clip(round(x / input_scale), -128, 127) * input_scale, rounded to x's dtype."""
    scale = static_scale(w)
    codes = jnp.clip(jnp.round(exact.div(exact.cast(x, jnp.float32), scale)), -128, 127)
    return dense_matmul(exact.rounded((codes * scale).astype(x.dtype)), w.dequantize(x.dtype))
