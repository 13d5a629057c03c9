"""FP-Quant: NVFP4 or MXFP4 weights of rotated inputs.

    qweight              uint8 [N, K/2], two e2m1 codes a byte, low nibble first
    scales               uint8 [N, K/16] bytes of e4m3 (nvfp4) or [N, K/32] of e8m0 (mxfp4); rows padded to a multiple
                         of 128 and columns of 4 where the quantizing kernel padded them
    weight_global_scale, act_global_scale    dt [1]
    forward_hadamard_matrix, backward_hadamard_matrix    dt [g, g]
    dqweight             dt [N, K] in place of qweight and scales with pseudoquantization: the rotated weight, rounded

The stored weight is that of inputs x @ H, H = forward_hadamard_matrix in each block of g inputs; its values are
code * scale / weight_global_scale. `dequantize()` takes the rotation back. The library always quantizes activations
too: nvfp4 is executed with the arithmetic of its pseudoquantization kernel, mxfp4 is not.

Source: fp_quant 0.3.2 (module/linear.py, linear_fns.py, triton/nvfp4.py); the library needs a GPU and qutlass, no file
of it was at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.activations import Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_once
from jq.qtensor import Grouping, NarrowFloat, Source
from jq.qtensor.rotated import Rotated

FLOATS = (np.float16, "bfloat16", np.float32)
MATRICES = ("forward_hadamard_matrix", "backward_hadamard_matrix")
GLOBALS = ("weight_global_scale", "act_global_scale")
SUFFIXES = ("qweight", "scales", "dqweight", *GLOBALS, *MATRICES)
KNOWN = [
    "quant_method",
    "forward_dtype",
    "forward_method",
    "backward_dtype",
    "store_master_weights",
    "hadamard_group_size",
    "pseudoquantization",
    "transform_init",
    "modules_to_not_convert",
]
BLOCKS = {"nvfp4": 16, "mxfp4": 32}


@dataclasses.dataclass(frozen=True)
class Options:
    """Names as in the config."""

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: an unknown dtype or method.
      UnsupportedError: checkpoints whose weights are dense: pseudoquantized ones, and those with master weights.
    """
    for key in config.keys() - set(KNOWN):
        warn_once(context.label, f"quantization_config.{key} is not known to FP-Quant; ignored")
    dtype, method = config.get("forward_dtype", "nvfp4"), config.get("forward_method", "abs_max")
    if dtype not in BLOCKS or method not in ("abs_max", "quest"):
        raise FormatError(f"{context.label}: forward_dtype {dtype!r} with forward_method {method!r} is not FP-Quant's")
    if config.get("store_master_weights"):
        raise UnsupportedError(
            f"{context.label}: store_master_weights keeps plain weights that are quantized at run time; remove "
            "quantization_config from config.json to load them as they are"
        )
    if config.get("pseudoquantization"):
        raise UnsupportedError(
            f"{context.label}: pseudoquantization stores dense rotated weights (dqweight), which are not read; a "
            "checkpoint made without it is"
        )
    return Options(dtype, method)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Rotated:
    """One module's tensors as a rotated `NarrowFloat`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
    """
    weight, stored = take(parts, "qweight", prefix), take(parts, "scales", prefix)
    matrix = take(parts, MATRICES[0], prefix)
    whole = take(parts, GLOBALS[0], prefix)
    expect_dtype(weight, (np.uint8,), f"{prefix}.qweight")
    expect_dtype(stored, (np.uint8,), f"{prefix}.scales")
    expect_dtype(whole, FLOATS, f"{prefix}.{GLOBALS[0]}")
    expect_shape(whole, (1,), f"{prefix}.{GLOBALS[0]}", "one scale for the weight")
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(
            f"{prefix}.qweight: found shape {tuple(weight.shape)}, expected (out_features, in_features / 2)"
        )
    n, k = weight.shape[0], weight.shape[1] * 2
    block = BLOCKS[options.forward_dtype]
    if k % block:
        raise FormatError(f"{prefix}.qweight: {k} inputs are no multiple of {block}")
    exact, padded = (n, k // block), (-(-n // 128) * 128, -(-(k // block) // 4) * 4)
    if tuple(stored.shape) not in (exact, padded):
        expect_shape(stored, exact, f"{prefix}.scales", f"blocks of {block}, or {padded} with the kernel's padding")
    expect_dtype(matrix, FLOATS, f"{prefix}.{MATRICES[0]}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise FormatError(f"{prefix}.{MATRICES[0]}: found shape {tuple(matrix.shape)}, expected a square")
    codes = np.ascontiguousarray(weight)
    base = NarrowFloat(
        codes.view(np.uint32) if k % 8 == 0 else codes,
        np.ascontiguousarray(stored[:n, : k // block]),
        whole,
        kind="e2m1",
        scale_kind="e4m3" if block == 16 else "e8m0",
        grouping=Grouping("block", 1, block),
        formula="global_divide",
        dtype="float32",
    )
    base.check(prefix)
    extras = {s: parts[s] for s in (GLOBALS[1], MATRICES[1]) if s in parts}
    if tuple(stored.shape) != exact:
        extras["scales"] = stored  # the padding is carried with the rest: the kernel leaves arbitrary bytes there
    made = Rotated(
        base,
        matrix,
        extras,
        block=matrix.shape[0],
        dtype=context.model_dtype,
        activation=Activation(
            "fp_quant", GLOBALS[1:], (("dtype", options.forward_dtype), ("method", options.forward_method))
        ),
        source=Source("fp_quant"),
    )
    made.check(prefix)
    return made


def dump(q: Rotated) -> Parts:
    """Stored tensors of a module."""
    base = q.base
    return {
        "qweight": np.ascontiguousarray(np.asarray(base.codes)).view(np.uint8),
        "scales": np.asarray(base.scales),
        GLOBALS[0]: np.asarray(base.global_scale),
        MATRICES[0]: np.asarray(q.rotation),
        **{k: np.asarray(v) for k, v in q.extras.items()},
    }


FORMAT = Format(
    name="fp_quant",
    methods=("fp_quant",),
    title="FP-Quant: NVFP4 and MXFP4 weights of rotated inputs",
    parse=parse,
    markers=("qweight",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    evidence="source",
)
