"""GGUF block types as quantized tensors: raw rows of blocks in, one of the quantized tensors out.

Every type is rearranged without loss: the codes of a row become one packed stream, the scales arrays of their own,
quantized scales (K-quants, IQ4_XS) a nested `Affine`. The sum of the arrays has the bytes of the blocks. Layouts:
ggml-common.h and gguf 0.19.0, gguf/quants.py, whose `dequantize` gives the same bits (float32, scales first).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.formats.gguf_types import BY_NAME
from jq.qtensor import Affine, Codebook, Grouping, NarrowFloat, QTensor, Source
from jq.qtensor.blocks import KINDS as LATTICES
from jq.qtensor.blocks import Blocks

# 4-bit table of IQ4_NL and IQ4_XS (ggml-common.h, kvalues_iq4nl).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Rows are taken apart in pieces of about this many weights, so that unpacked codes never take much memory.
PIECE = 1 << 24

Split = dict[str, np.ndarray]


def _low_high(b: np.ndarray) -> np.ndarray:
    """Bytes [..., n] -> codes [..., 2n]: all low nibbles, then all high ones."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _planes(b: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Bytes [..., n] -> codes: for each run of `width` bytes the fields of `bits` bits, lowest first, run by run."""
    runs = b.reshape(*b.shape[:-1], -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(*b.shape[:-1], -1)


def _half(b: np.ndarray) -> np.ndarray:
    """Two bytes [..., 2] -> float16[..., 1]."""
    return np.ascontiguousarray(b).view(np.float16)


def _fifth_bit(b: np.ndarray) -> np.ndarray:
    """32 bits in 4 bytes -> the fifth bit of 32 codes, in place."""
    return np.unpackbits(b, axis=-1, bitorder="little") << np.uint8(4)


def _six_bits(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of Q4_K and Q5_K -> 8 scales and 8 minima of 6 bits."""
    a, m, c = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    minima = np.concatenate([m & 63, (c >> 4) | ((m >> 6) << 4)], axis=-1)
    return scales, minima


def _q1_0(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "codes": np.unpackbits(b[..., 2:], axis=-1, bitorder="little")}


def _q4_0(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "codes": _low_high(b[..., 2:])}


def _q4_1(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "m": _half(b[..., 2:4]), "codes": _low_high(b[..., 4:])}


def _q5_0(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "codes": _low_high(b[..., 6:]) | _fifth_bit(b[..., 2:6])}


def _q5_1(b: np.ndarray) -> Split:
    codes = _low_high(b[..., 8:]) | _fifth_bit(b[..., 4:8])
    return {"d": _half(b[..., :2]), "m": _half(b[..., 2:4]), "codes": codes}


def _q8_0(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "codes": b[..., 2:]}


def _q8_1(b: np.ndarray) -> Split:
    """The second number is d times the sum of the codes, which only serves dot products."""
    return {"d": np.ascontiguousarray(b[..., :4]).view(np.float32), "codes": b[..., 8:]}


def _q8_1_half(b: np.ndarray) -> Split:
    return {"d": _half(b[..., :2]), "codes": b[..., 4:]}


def _q8_k(b: np.ndarray) -> Split:
    """The 16 sums at the end only serve dot products; they follow from the codes."""
    return {"d": np.ascontiguousarray(b[..., :4]).view(np.float32), "codes": b[..., 4:260]}


def _q2_k(b: np.ndarray) -> Split:
    return {
        "scales": b[..., :16] & 15,
        "minima": b[..., :16] >> 4,
        "codes": _planes(b[..., 16:80], 2, 32),
        "d": _half(b[..., 80:82]),
        "m": _half(b[..., 82:84]),
    }


def _q3_k(b: np.ndarray) -> Split:
    high = _planes(b[..., :32], 1, 32)
    low = _planes(b[..., 32:96], 2, 32)
    scales = _low_high(b[..., 96:104]) | (_planes(b[..., 104:108], 2, 4) << 4)
    return {"codes": low | (high << 2), "scales": scales, "d": _half(b[..., 108:110])}


def _q4_k(b: np.ndarray) -> Split:
    scales, minima = _six_bits(b[..., 4:16])
    codes = _planes(b[..., 16:], 4, 32)
    return {"d": _half(b[..., :2]), "m": _half(b[..., 2:4]), "scales": scales, "minima": minima, "codes": codes}


def _q5_k(b: np.ndarray) -> Split:
    scales, minima = _six_bits(b[..., 4:16])
    codes = _planes(b[..., 48:], 4, 32) | (_planes(b[..., 16:48], 1, 32) << 4)
    return {"d": _half(b[..., :2]), "m": _half(b[..., 2:4]), "scales": scales, "minima": minima, "codes": codes}


def _q6_k(b: np.ndarray) -> Split:
    codes = _planes(b[..., :128], 4, 64) | (_planes(b[..., 128:192], 2, 32) << 4)
    return {"codes": codes, "scales": b[..., 192:208], "d": _half(b[..., 208:210])}


def _iq4_xs(b: np.ndarray) -> Split:
    high = _planes(b[..., 2:4], 2, 1)
    low = _planes(b[..., 4:8], 4, 1)
    nibbles = b[..., 8:].reshape(*b.shape[:-1], 8, 16)
    codes = _low_high(nibbles).reshape(*b.shape[:-1], 256)
    return {"d": _half(b[..., :2]), "scales": low | (high << 4), "codes": codes}


def _tq2_0(b: np.ndarray) -> Split:
    return {"codes": _planes(b[..., :64], 2, 32), "d": _half(b[..., 64:66])}


def _mxfp4(b: np.ndarray) -> Split:
    return {"d": b[..., :1], "codes": _low_high(b[..., 1:])}


def _nvfp4(b: np.ndarray) -> Split:
    nibbles = b[..., 4:].reshape(*b.shape[:-1], 4, 8)
    return {"d": b[..., :4], "codes": _low_high(nibbles).reshape(*b.shape[:-1], 64)}


def _packed(split: Split, widths: dict[str, int]) -> Split:
    """Joins the blocks of each row ([..., N, blocks, n] -> [..., N, blocks * n]) and packs the code fields."""
    rows = {key: a.reshape(*a.shape[:-2], -1) for key, a in split.items()}
    return {key: _bits.pack(a, widths[key]) if key in widths else np.ascontiguousarray(a) for key, a in rows.items()}


def _nested(codes: np.ndarray, d: np.ndarray, bits: int, per: int, **fields: Any) -> Affine:
    """Quantized scales: float32(d * (code - zero_point)), `per` of them for each float16 d."""
    pad = _bits.capacity(codes, bits) - d.shape[-1] * per
    return Affine(
        codes, d, code_bits=bits, grouping=Grouping("block", 1, per), formula="f32", dtype="float32", pad=pad, **fields
    )


def _affine(split: Split, bits: int, group: int, source: Source, **fields: Any) -> Affine:
    """`d * (code - zero_point)`, or `d * code + m` where the blocks hold a minimum."""
    formula = "f32_mul_add" if "m" in split else "f32"
    return Affine(
        split["codes"],
        split["d"],
        split.get("m"),
        code_bits=bits,
        grouping=Grouping("block", 1, group),
        formula=formula,
        dtype="float32",
        source=source,
        **fields,
    )


def _k_quant(split: Split, bits: int, group: int, scale_bits: int, source: Source, **fields: Any) -> Affine:
    """K-quants: scales (and minima) are themselves codes, times one float16 per 256 weights."""
    per = 256 // group
    signed = scale_bits == 8
    zero_point = 32 if "minima" not in split and not signed else 0
    scales = _nested(split["scales"], split["d"], scale_bits, per, signed=signed, zero_point=zero_point)
    zeros = _nested(split["minima"], split["m"], scale_bits, per) if "minima" in split else None
    return Affine(
        split["codes"],
        scales,
        zeros,
        code_bits=bits,
        grouping=Grouping("block", 1, group),
        formula="f32" if zeros is None else "mul_sub",
        dtype="float32",
        source=source,
        **fields,
    )


def _signs(split: Split, source: Source) -> Codebook:
    """A bit a weight: d where it is set, -d where not (ggml-quants.c; gguf 0.19.0 has no Python code for it)."""
    table = np.broadcast_to(np.array([-1, 1], np.float32), (*split["codes"].shape[:-2], 2)).copy()
    grouping = Grouping("block", 1, 128)
    return Codebook(split["codes"], table, split["d"], code_bits=1, grouping=grouping, dtype="float32", source=source)


def _iq4(split: Split, group: int, source: Source) -> Codebook:
    d = split["d"]
    absmax = _nested(split["scales"], d, 6, 8, zero_point=32) if "scales" in split else d
    return Codebook(
        split["codes"],
        np.broadcast_to(np.array(IQ4_VALUES, np.float32), (*split["codes"].shape[:-2], 16)).copy(),
        absmax,
        code_bits=4,
        grouping=Grouping("block", 1, group),
        dtype="float32",
        source=source,
    )


def _narrow(split: Split, group: int, scale_kind: str, source: Source) -> NarrowFloat:
    return NarrowFloat(
        split["codes"],
        split["d"],
        kind="e2m1",
        scale_kind=scale_kind,
        grouping=Grouping("block", 1, group),
        formula="gguf",
        dtype="float32",
        source=source,
    )


# type -> (split, packed width of its fields, build)
Row = tuple[Callable[[np.ndarray], Split], dict[str, int], Callable[[Split, Source], QTensor]]
ROWS: dict[str, Row] = {
    "Q1_0": (_q1_0, {"codes": 1}, lambda s, o: _signs(s, o)),
    "Q4_0": (_q4_0, {"codes": 4}, lambda s, o: _affine(s, 4, 32, o, zero_point=8)),
    "Q4_1": (_q4_1, {"codes": 4}, lambda s, o: _affine(s, 4, 32, o)),
    "Q5_0": (_q5_0, {"codes": 5}, lambda s, o: _affine(s, 5, 32, o, zero_point=16)),
    "Q5_1": (_q5_1, {"codes": 5}, lambda s, o: _affine(s, 5, 32, o)),
    "Q8_0": (_q8_0, {"codes": 8}, lambda s, o: _affine(s, 8, 32, o, signed=True)),
    "Q8_1": (_q8_1, {"codes": 8}, lambda s, o: _affine(s, 8, 32, o, signed=True)),
    "Q8_1_HALF": (_q8_1_half, {"codes": 8}, lambda s, o: _affine(s, 8, 32, o, signed=True)),
    "Q8_K": (_q8_k, {"codes": 8}, lambda s, o: _affine(s, 8, 256, o, signed=True)),
    "Q2_K": (_q2_k, {"codes": 2, "scales": 4, "minima": 4}, lambda s, o: _k_quant(s, 2, 16, 4, o)),
    "Q3_K": (_q3_k, {"codes": 3, "scales": 6}, lambda s, o: _k_quant(s, 3, 16, 6, o, zero_point=4)),
    "Q4_K": (_q4_k, {"codes": 4, "scales": 6, "minima": 6}, lambda s, o: _k_quant(s, 4, 32, 6, o)),
    "Q5_K": (_q5_k, {"codes": 5, "scales": 6, "minima": 6}, lambda s, o: _k_quant(s, 5, 32, 6, o)),
    "Q6_K": (_q6_k, {"codes": 6, "scales": 8}, lambda s, o: _k_quant(s, 6, 16, 8, o, zero_point=32)),
    "TQ2_0": (_tq2_0, {"codes": 2}, lambda s, o: _affine(s, 2, 256, o, zero_point=1)),
    "IQ4_NL": (_q4_0, {"codes": 4}, lambda s, o: _iq4(s, 32, o)),
    "IQ4_XS": (_iq4_xs, {"codes": 4, "scales": 6}, lambda s, o: _iq4(s, 32, o)),
    "MXFP4": (_mxfp4, {"codes": 4}, lambda s, o: _narrow(s, 32, "e8m0", o)),
    "NVFP4": (_nvfp4, {"codes": 4}, lambda s, o: _narrow(s, 16, "ue4m3", o)),
}


def tensor_of(raw: np.ndarray, kind: str, name: str = "weight") -> QTensor:
    """The quantized tensor of raw blocks.

    Args:
      raw: uint8[*stack, N, bytes of a row].
      kind: GGUF type name, e.g. "Q4_K".
      name: for messages.

    Returns:
      QTensor [*stack, N, K] of dtype float32, which is what gguf's `dequantize` returns.

    Raises:
      FormatError: scales that are not finite.
    """
    source = Source("gguf", (("type", kind),))
    if raw.ndim == 1:
        raw = raw[None]
    if kind in LATTICES:
        return Blocks.make(raw, kind=kind, name=name, source=source)
    split, widths, build = ROWS[kind]
    size = BY_NAME[kind].bytes
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // size, size)
    rows = blocks.reshape(-1, *blocks.shape[-2:])
    step = max(1, PIECE // max(1, rows.shape[1] * BY_NAME[kind].elements))
    pieces = [_packed(split(rows[i : i + step]), widths) for i in range(0, max(1, len(rows)), step)]
    joined = {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]}
    made = build({k: a.reshape(*raw.shape[:-1], a.shape[-1]) for k, a in joined.items()}, source)
    _check(made, name)
    return made


def _check(tensor: QTensor, name: str) -> None:
    for part in ("scales", "zeros", "absmax"):
        nested = getattr(tensor, part, None)
        if isinstance(nested, Affine):
            nested.check(f"{name}: {part}")
    tensor.check(name)  # type: ignore[attr-defined]
