"""Gemma's own quantized checkpoints: 2, 4 or 8 bits by output channel, static ranges of inputs and outputs.

    weight                    uint8 [N, ceil(K/2)] (4 bits: low nibble first, value + 8) or [N, ceil(K/4)] (2 bits, lowest
                              first, value + 2), int8 [N, K] (8 bits)
    weight_scale              float32 [N, 1] (read in 16 bits too)
    input_activation_scale, output_activation_scale    float32 scalars, 0 where the layer is not calibrated
    embedding_quantized, embedding_scale               an embedding table [V, K] and float32 [V, 1] or [V, blocks]

Dequantize: dt(q) * dt(scale), dt the model's dtype. Static ranges: x = clamp(round(x / s), -128, 127) * s in x's dtype,
before the product and after it (bias included). Which width a module has is told by the config: the first alternative
of the joined patterns of `module_quant_configs` that matches its name, else `num_bits`.

Source: transformers 5.23.0 integrations/gemma_quant.py; no published checkpoint was at hand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_one, expect_shape, take, warn_unknown
from jq.formats.layer_shapes import in_features_of
from jq.qtensor import Affine, Grouping, Source

RANGES = ("input_activation_scale", "output_activation_scale")
WIDTHS = (2, 4, 8)
KNOWN = ("quant_method", "num_bits", "quantize_embeddings", "module_quant_configs", "modules_to_not_convert")


@dataclasses.dataclass(frozen=True)
class Options:
    """Width of a code by module name: `patterns` and `widths` belong together, `bits` where none matches."""

    bits: int = 4
    patterns: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    def of(self, prefix: str) -> int:
        if not self.patterns:
            return self.bits
        joined = "|".join(f"(?P<g{i}>{p})" for i, p in enumerate(self.patterns))
        match = re.search(joined, prefix)
        if match is None:
            return self.bits
        return self.widths[next(i for i in range(len(self.patterns)) if match[f"g{i}"] is not None)]


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a width other than 2, 4 or 8, or a pattern that is no regular expression.
    """
    warn_unknown(config, KNOWN, context.label)

    def width(value: Any, where: str) -> int:
        if type(value) is not int or value not in WIDTHS:
            raise FormatError(f"{context.label}: quantization_config.{where} is {value!r}, expected 2, 4 or 8")
        return value

    bits = width(config.get("num_bits", 4), "num_bits")
    table = config.get("module_quant_configs") or {}
    if not isinstance(table, Mapping) or not all(isinstance(v, Mapping) for v in table.values()):
        raise FormatError(f"{context.label}: quantization_config.module_quant_configs must map patterns to settings")
    widths = tuple(width(v.get("num_bits", bits), f"module_quant_configs[{p!r}].num_bits") for p, v in table.items())
    options = Options(bits, tuple(table), widths)
    try:
        options.of("")
    except re.error as e:
        raise FormatError(
            f"{context.label}: quantization_config.module_quant_configs: no regular expression: {e}"
        ) from e
    return options


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine | None:
    """One linear layer or embedding as an `Affine`; None for a layer left in floating point.

    Raises:
      FormatError: missing tensors, shapes or dtypes that do not fit the width that the config gives.
    """
    table = "embedding_quantized" in parts
    codes_name, scale_name = ("embedding_quantized", "embedding_scale") if table else ("weight", "weight_scale")
    stored = take(parts, codes_name, prefix)
    if (not table and stored.dtype.kind == "f") or stored.dtype.name == "bfloat16":
        return None
    name = f"{prefix}.{codes_name}"
    bits = options.of(prefix)
    scale = take(parts, scale_name, prefix)
    expect_dtype(stored, (np.int8 if bits == 8 else np.uint8,), name)
    expect_dtype(scale, (np.float32, np.float16, ml_dtypes.bfloat16), f"{prefix}.{scale_name}")
    if stored.ndim != 2 or 0 in stored.shape:
        raise FormatError(f"{name}: found shape {tuple(stored.shape)}, expected two axes that are not empty")
    rows, bytes_ = stored.shape
    columns = _columns(prefix, bytes_, bits, rows, context)
    blocks = scale.shape[1] if table and scale.ndim == 2 else 1
    expect_shape(
        scale, (rows, blocks), f"{prefix}.{scale_name}", "one scale for each row (of an embedding: each block)"
    )
    if blocks < 1 or columns % blocks:
        raise FormatError(f"{prefix}.{scale_name}: {blocks} blocks do not divide {columns} columns")
    extras = {s: parts[s] for s in RANGES if s in parts}
    for suffix, value in extras.items():
        expect_dtype(value, (np.float32,), f"{prefix}.{suffix}")
        expect_one(value, f"{prefix}.{suffix}")
    calibrated = any(float(v.reshape(-1)[0]) != 0 for v in extras.values())
    codes = np.ascontiguousarray(stored).view(np.uint8)
    codes = codes.view(np.uint32) if columns * bits % 32 == 0 else codes
    tensor = Affine(
        codes,
        scale,
        code_bits=bits,
        signed=bits == 8,
        zero_point=0 if bits == 8 else 1 << (bits - 1),
        grouping=Grouping("block", 1, 0 if blocks == 1 else columns // blocks),
        formula="cast_sub_mul",
        dtype=context.model_dtype,
        pad=_bits.capacity(codes, bits) - columns,
        extras=extras,
        activation=Activation("gemma_static_range", RANGES) if calibrated and len(extras) == 2 else None,
        source=Source("gemma", (("embedding", table),)),
    )
    tensor.check(prefix)
    return tensor


def _columns(prefix: str, bytes_: int, bits: int, rows: int, context: Context) -> int:
    """in_features: what config.json says where that fits the bytes of a row (the last byte may be half used)."""
    per = 8 // bits
    full = bytes_ * per
    for k in (full, *range(full - per + 1, full)):
        if in_features_of(prefix, rows * k, context.config, k.__eq__) == k:
            return k
    return full


def dump(q: Affine) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    table = q.source.get("embedding")
    codes = np.ascontiguousarray(np.asarray(q.codes)).view(np.int8 if q.code_bits == 8 else np.uint8)
    scale = np.asarray(q.scales)
    found = (
        {"embedding_quantized": codes, "embedding_scale": scale} if table else {"weight": codes, "weight_scale": scale}
    )
    return {**found, **{k: np.asarray(v) for k, v in q.extras.items()}}


FORMAT = Format(
    name="gemma",
    methods=("gemma",),
    title="Gemma: 2, 4 or 8 bits by channel, static activation ranges",
    parse=parse,
    markers=("weight_scale", "embedding_quantized"),
    suffixes=("weight", "weight_scale", *RANGES, "embedding_quantized", "embedding_scale"),
    load=load,
    dump=dump,
    deferrable=False,
    evidence="library",
)
