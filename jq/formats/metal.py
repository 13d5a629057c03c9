"""metal: MLX's affine groups as transformers stores them for Apple GPUs.

    weight            uint32 [N, K*b/32], element i of a word at bits b*i, b = 2, 4 or 8
    scales, qbiases   the model's dtype (or float32) [N, K/G]

Dequantize: dt(float32(q) * float32(scale) + float32(qbias)), dt the dtype of scales. Quantize: in float32
scale = max((max - min) / (2**b - 1), 1e-8), q = clamp(round((w - min) / scale)), scale and min rounded to dt afterwards.

Source: transformers 5.23.0 integrations/metal_quantization.py, whose functions run on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.algorithms import blocks
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.affine import check_finite

FLOATS = (np.float16, "bfloat16", np.float32)
WIDTHS = (2, 4, 8)
KNOWN = ("quant_method", "bits", "group_size", "modules_to_not_convert", "dequantize")


@dataclasses.dataclass(frozen=True)
class Options:
    """One setting for the whole model."""

    bits: int = 4
    group_size: int = 64


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: bits other than 2, 4 or 8, or a group size that is no positive integer.
    """
    warn_unknown(config, KNOWN, context.label)
    bits, group = config.get("bits", 4), config.get("group_size", 64)
    if type(bits) is not int or bits not in WIDTHS:
        raise FormatError(f"{context.label}: quantization_config.bits is {bits!r}, expected 2, 4 or 8")
    if type(group) is not int or group < 1:
        raise FormatError(f"{context.label}: quantization_config.group_size is {group!r}, expected a positive integer")
    return Options(bits, group)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    """One module's tensors as an `Affine`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
    """
    weight = take(parts, "weight", prefix)
    scales = take(parts, "scales", prefix)
    biases = take(parts, "qbiases", prefix)
    expect_dtype(weight, (np.uint32,), f"{prefix}.weight")
    expect_dtype(scales, FLOATS, f"{prefix}.scales")
    expect_dtype(biases, (scales.dtype,), f"{prefix}.qbiases")
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"{prefix}.weight: found shape {tuple(weight.shape)}, expected two axes that are not empty")
    rows, words = weight.shape
    columns = words * (32 // options.bits)
    if columns % options.group_size:
        raise FormatError(
            f"{prefix}.weight: {words} words of {options.bits}-bit codes are {columns} inputs, no multiple of "
            f"group_size {options.group_size}; check quantization_config"
        )
    shape = (rows, columns // options.group_size)
    for name, array in (("scales", scales), ("qbiases", biases)):
        expect_shape(array, shape, f"{prefix}.{name}", f"{columns} inputs in groups of {options.group_size}")
    check_finite(biases, f"{prefix}.qbiases")
    tensor = Affine(
        np.ascontiguousarray(weight),
        scales,
        biases,
        code_bits=options.bits,
        grouping=Grouping("block", 1, options.group_size),
        formula="f32_mul_add",
        dtype=str(scales.dtype),
        source=Source("metal"),
    )
    tensor.check(prefix)
    return tensor


def dump(q: Affine) -> Parts:
    """Stored tensors of a module."""
    return {"weight": np.asarray(q.codes), "scales": np.asarray(q.scales), "qbiases": np.asarray(q.zeros)}


@dataclasses.dataclass(frozen=True)
class Metal:
    """Affine groups as MLX makes them, `_affine_quantize_tensor` of transformers: codes identical on the CPU.

    Fields:
      bits: 2, 4 or 8.
      group_size: inputs that share a scale; must divide in_features.
    """

    bits: int = 4
    group_size: int = 64
    format: str = "metal"

    def quantize(self, w: Any, name: str = "weight") -> Affine:
        """w [N, K] of any float dtype -> codes and scales; `dequantize()` gives w's dtype.

        Raises:
          FormatError: in_features that groups or words do not divide, or an option.
        """
        options = parse({"bits": self.bits, "group_size": self.group_size}, Context(label=name))
        w = blocks.weight(w, name)
        n, k = w.shape
        if k % self.group_size or k * self.bits % 32:
            raise FormatError(f"{name}: in_features {k} are no multiple of group_size {self.group_size} and of a word")
        groups = w.astype(np.float32).reshape(n, -1, self.group_size)
        low, high = groups.min(-1), groups.max(-1)
        top = (1 << self.bits) - 1
        scales = np.maximum((high - low) / np.float32(top), np.float32(1e-8))
        codes = np.rint((groups - low[..., None]) / scales[..., None]).clip(0, top).astype(np.int32).reshape(n, k)
        made = Affine.make(
            codes,
            scales.astype(w.dtype),
            code_bits=self.bits,
            name=name,
            zeros=low.astype(w.dtype),
            grouping=Grouping("block", 1, self.group_size),
            formula="f32_mul_add",
            dtype=str(w.dtype),
        )
        return load(name, dump(made), options, Context(label=name))

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "metal",
            "bits": self.bits,
            "group_size": self.group_size,
            "modules_to_not_convert": list(skip) if skip else None,
        }


FORMAT = Format(
    name="metal",
    methods=("metal",),
    title="metal: MLX affine groups of 2, 4 or 8 bits",
    parse=parse,
    markers=("qbiases",),
    suffixes=("weight", "scales", "qbiases"),
    load=load,
    dump=dump,
    methods_table={"Metal": Metal},
)
