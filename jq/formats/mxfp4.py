"""MXFP4 as gpt-oss stores it (`mxfp4`): stacked experts in blocks of 32 E2M1 codes with a power-of-two scale.

  <p>_blocks  uint8 [E, N, K/32, 16]: element k of a row is a nibble of byte (k % 32) // 2 of block k // 32, even k low
  <p>_scales  uint8 [E, N, K/32]: 2**(byte - 127); 255 is OCP's NaN, and an error
  <p>_bias    bfloat16 [E, N], a plain array of the State

with <p> = "...mlp.experts.gate_up_proj" (rows of gate and up interleaved) or "...down_proj". A row is an output: the
QTensor is [E, out, in], the transpose of the parameter that transformers computes with ([E, in, out]).

Dequantize: bfloat16(value * 2**(byte - 127)). Codes of -0 stay -0.
Quantize: as transformers does (triton_kernels' downcast: exponents rounded up), or by OCP MX v1.0 (exponent
floor(log2(amax)) - 2, largest values saturate); reading does not care.

Source: transformers 5.23.0 integrations/mxfp4.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.algorithms import narrow
from jq.algorithms.blocks import weight
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Grouping, NarrowFloat, Source
from jq.qtensor.narrow_float import check_bits

NAME = "mxfp4"
SUFFIXES = ("blocks", "scales")


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing in the config changes what is stored."""


def parse(config: Mapping[str, Any], context: Context) -> Options:
    warn_unknown(config, ("quant_method", "modules_to_not_convert", "dequantize"), context.label)
    return Options()


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Parameters with blocks and scales: {prefix: {suffix: stored name}}.

    Raises:
      FormatError: blocks without scales, or the other way round.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for suffix in SUFFIXES:
            if name.endswith(f"_{suffix}") and np.dtype(context.dtypes[name]) == np.uint8:
                found.setdefault(name[: -len(suffix) - 1], {})[suffix] = name
    for prefix, parts in found.items():
        for suffix in SUFFIXES:
            if suffix not in parts:
                raise FormatError(
                    f"{prefix}_{suffix}: missing beside {', '.join(parts.values())}; the file is incomplete"
                )
    return found


def join(prefix: str, suffix: str) -> str:
    return f"{prefix}_{suffix}"


def load(prefix: str, parts: Parts, options: Options, context: Context) -> NarrowFloat:
    """One stack of experts (or one matrix) as a QTensor [*stack, N, K]."""
    blocks, scales = take(parts, "blocks", prefix), take(parts, "scales", prefix)
    for suffix, array in (("blocks", blocks), ("scales", scales)):
        expect_dtype(array, (np.uint8,), f"{prefix}_{suffix}")
    if blocks.ndim < 3 or blocks.shape[-1] != 16:
        raise FormatError(f"{prefix}_blocks: found shape {blocks.shape}, expected [experts, out, in / 32, 16]")
    expect_shape(scales, blocks.shape[:-1], f"{prefix}_scales", "one byte for each block of 32")
    codes = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1).view(np.uint32)
    made = NarrowFloat(
        codes,
        scales,
        None,
        {},
        kind="e2m1",
        scale_kind="e8m0",
        grouping=Grouping("block", 1, 32),
        formula="own",
        dtype="bfloat16",
        source=Source(NAME),
    )
    check_bits(scales, (255,), f"{prefix}_scales")
    return made


def dump(q: NarrowFloat) -> Parts:
    """Stored tensors, identical to those that were loaded."""
    scales = np.asarray(q.scales)
    return {"blocks": np.asarray(q.codes).view(np.uint8).reshape(*scales.shape, 16), "scales": scales}


@dataclasses.dataclass(frozen=True)
class MXFP4:
    """Experts [E, out, in] in MXFP4. For Linear layers: jq.CompressedTensors("MXFP4A16").

    Fields:
      exponents: "up", as transformers quantizes (triton_kernels' `downcast_to_mxfp`), or "floor", the rule of OCP MX v1.0.
    """

    exponents: str = "up"
    format: str = NAME

    def __post_init__(self) -> None:
        if self.exponents not in ("up", "floor"):
            raise ValueError(f"MXFP4: exponents are 'up' or 'floor', got {self.exponents!r}")

    def quantize(self, w: Any, name: str = "weight") -> NarrowFloat:
        """w [E, N, K] (K a multiple of 32) -> codes and scales."""
        w = np.asarray(w)
        if w.ndim != 3 or w.shape[-1] % 32:
            raise FormatError(
                f"{name}: found shape {w.shape}; the mxfp4 format stores experts [E, out, in] with in a multiple of 32. "
                'For Linear layers take jq.CompressedTensors("MXFP4A16")'
            )
        w = weight(w, name, stacked=True)
        codes, scales = narrow.mxfp4_triton(w) if self.exponents == "up" else narrow.mxfp4_ocp(w)
        blocks = _bits.pack(codes, 4).view(np.uint8).reshape(*scales.shape, 16)
        return load(name, {"blocks": blocks, "scales": scales}, Options(), Context())

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {"quant_method": NAME, "modules_to_not_convert": skip}


FORMAT = Format(
    name=NAME,
    methods=(NAME,),
    title="MXFP4 experts of gpt-oss (blocks and scales)",
    parse=parse,
    markers=("blocks", "scales"),
    suffixes=(),
    load=load,
    dump=dump,
    group=group,
    join=join,
    parameter=lambda prefix: True,
    methods_table={"MXFP4": MXFP4},
)
