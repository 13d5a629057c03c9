"""AQLM: additive quantization, each group of weights the sum of one entry of each codebook.

Stored tensors of a linear layer [N, K] with output groups of `out_group_size` (og), input groups of `in_group_size`
(ig), M codebooks of B bits:

    codes      int8 (B <= 8), int16 (<= 16) or int32 [N/og, K/ig, M]; code c >= 2**(B-1) is stored as c - 2**B
    codebooks  float16, bfloat16 or float32 [M, 2**B, og, ig]
    scales     the codebooks' dtype [N/og, 1, 1, 1]

Source: aqlm 1.1.7 (inference.py, utils.py); dequantization as on a CPU (`vector_codebook._sum_scale`). Config keys:
transformers AqlmConfig. `linear_weights_not_to_quantize` holds parameter names; what is quantized is told by the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Source
from jq.qtensor.vector_codebook import VectorCodebook

SUFFIXES = ("codes", "codebooks", "scales")
FLOATS = (np.float16, "bfloat16", np.float32)
MAX_BITS = 16  # of a code here; aqlm's own kernels end there too
KNOWN = ("quant_method", "linear_weights_not_to_quantize", "modules_to_not_convert")
NUMBERS = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}


@dataclasses.dataclass(frozen=True)
class Options:
    """One setting for the whole model; names as in the config."""

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a size that is no positive integer.
      UnsupportedError: codebooks of more than 16 bits.
    """
    sizes = {}
    for key, default in NUMBERS.items():
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{context.label}: quantization_config.{key} is {value!r}, expected a positive integer")
        sizes[key] = value
    if sizes["nbits_per_codebook"] > MAX_BITS:
        raise UnsupportedError(
            f"{context.label}: quantization_config.nbits_per_codebook is {sizes['nbits_per_codebook']}; up to "
            f"{MAX_BITS} bits are read"
        )
    warn_unknown(config, (*NUMBERS, *KNOWN), context.label)
    return Options(**sizes)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> VectorCodebook:
    """One module's tensors as a `VectorCodebook`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config, codes outside the codebook.
    """
    o = options
    entries = 1 << o.nbits_per_codebook
    codes = take(parts, "codes", prefix)
    codebooks = take(parts, "codebooks", prefix)
    scales = take(parts, "scales", prefix)
    why = "check in_group_size, out_group_size, num_codebooks and nbits_per_codebook of quantization_config"
    expect_dtype(codes, (code_dtype(o.nbits_per_codebook),), f"{prefix}.codes")
    expect_dtype(codebooks, FLOATS, f"{prefix}.codebooks")
    expect_dtype(scales, (codebooks.dtype,), f"{prefix}.scales")
    expect_shape(codebooks, (o.num_codebooks, entries, o.out_group_size, o.in_group_size), f"{prefix}.codebooks", why)
    if codes.ndim != 3 or codes.shape[2] != o.num_codebooks or 0 in codes.shape:
        raise FormatError(
            f"{prefix}.codes: found shape {tuple(codes.shape)}, expected (out_features / {o.out_group_size}, "
            f"in_features / {o.in_group_size}, {o.num_codebooks})"
        )
    if scales.shape != (codes.shape[0], 1, 1, 1) and scales.shape == (codes.shape[1], 1, 1, 1):
        raise FormatError(
            f"{prefix}.codes: found shape {tuple(codes.shape)} with {scales.shape[0]} scales: the first two axes are "
            "swapped. aqlm's forward on a CPU does that in place; save the model before its first forward"
        )
    expect_shape(scales, (codes.shape[0], 1, 1, 1), f"{prefix}.scales", "one scale for each row of codes")
    half = entries // 2
    wide = codes.astype(np.int32)
    if wide.min() < -half or wide.max() >= max(half, 1):
        raise FormatError(
            f"{prefix}.codes: values {wide.min()}..{wide.max()} are outside {-half}..{max(half, 1) - 1} "
            f"(nbits_per_codebook {o.nbits_per_codebook}); the file is damaged"
        )
    return VectorCodebook.make(
        wide & (entries - 1),
        codebooks[None],
        code_bits=o.nbits_per_codebook,
        name=prefix,
        scales=np.ascontiguousarray(scales).reshape(-1, 1),
        formula="sum_scale",
        source=Source("aqlm"),
    )


def code_dtype(bits: int) -> np.dtype:
    """Stored dtype of codes of `bits` bits."""
    return np.dtype(np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)


def dump(q: VectorCodebook) -> Parts:
    """Stored tensors of a module."""
    codes = np.asarray(q.unpack())
    bits = q.code_bits
    signed = codes - ((codes >> (bits - 1)) << bits)
    assert q.scales is not None
    return {
        "codes": signed.astype(code_dtype(bits)),
        "codebooks": np.asarray(q.codebooks)[0],
        "scales": np.asarray(q.scales).reshape(-1, 1, 1, 1),
    }


FORMAT = Format(
    name="aqlm",
    methods=("aqlm",),
    title="AQLM: sums of codebook vectors, any group sizes, 1 to 16 bits a codebook",
    parse=parse,
    markers=("codes", "codebooks"),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
)
