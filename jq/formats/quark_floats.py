"""Quark's floats of 8, 6 and 4 bits: with scales beside them, and in "mx" containers (see `jq.formats.quark`)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Parts, expect_dtype, take
from jq.formats.quark_config import Spec
from jq.qtensor import Grouping, NarrowFloat, Source

FLOATS = (np.float16, "bfloat16", np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8 = {"fp8_e4m3": ("e4m3fn", ml_dtypes.float8_e4m3fn), "fp8_e5m2": ("e5m2", ml_dtypes.float8_e5m2)}
SMALL = {"fp4": ("e2m1", 4), "fp6_e2m3": ("e2m3", 6), "fp6_e3m2": ("e3m2", 6)}
# dtype of the stage that quantizes scales -> scale_kind and stored dtype
SECOND = {"fp8_e4m3": ("e4m3", E4M3)}
BLOCK = 32  # values of a container's block


def in_features(weight: np.ndarray, spec: Spec) -> int:
    return weight.shape[1] * 8 // (8 if spec.dtype in FLOAT8 else SMALL[spec.dtype][1])


def shape_of(weight: np.ndarray, spec: Spec) -> tuple[int, int]:
    return weight.shape[0], in_features(weight, spec)


def load_floats(
    prefix: str, parts: Parts, spec: Spec, scales: np.ndarray, grouping: Grouping, fields: dict[str, Any]
) -> NarrowFloat:
    """A module with scales beside its codes.

    Args:
      scales: stored scales [rows, groups] with `grouping`.

    Raises:
      FormatError: dtypes or shapes that disagree with the settings.
      UnsupportedError: a form of scales that is not read.
    """
    stored, scale = parts["weight"], parts["weight_scale"]
    kind, dtypes = _scale_kind(prefix, spec)
    expect_dtype(scale, dtypes, f"{prefix}.weight_scale")
    if spec.dtype in FLOAT8:
        number, dtype = FLOAT8[spec.dtype]
        expect_dtype(stored, (dtype,), f"{prefix}.weight")
        codes = np.ascontiguousarray(stored).view(np.uint8)
    else:
        number, width = SMALL[spec.dtype]
        expect_dtype(stored, (np.uint8,), f"{prefix}.weight")
        codes = np.ascontiguousarray(stored)
        if in_features(stored, spec) * width % 32 == 0:
            codes = codes.view(np.uint32)
    whole = None
    if spec.scales is not None:
        whole = take(parts, "weight_scale_2", prefix, why="Its block scales are multiplied by it.")
        expect_dtype(whole, FLOATS, f"{prefix}.weight_scale_2")
        if whole.size != 1:
            raise FormatError(f"{prefix}.weight_scale_2: found shape {tuple(whole.shape)}, expected one number")
    pairs = [("dtype", spec.dtype), ("scalar", scale.ndim == 0), ("qscheme", spec.qscheme)]
    made = NarrowFloat(
        codes,
        scales if kind == "float" else np.ascontiguousarray(scales).view(np.uint8),
        whole,
        kind=number,
        scale_kind=kind,
        grouping=grouping,
        formula="f32" if whole is None else "global_product",
        source=Source("quark", (*pairs, ("scale_dtype", str(scale.dtype)))),
        **fields,
    )
    made.check(prefix)
    return made


def _scale_kind(prefix: str, spec: Spec) -> tuple[str, tuple[Any, ...]]:
    """scale_kind and stored dtypes of a weight's scales."""
    if spec.scales is not None:
        if spec.scales.dtype not in SECOND or spec.scales.qscheme != "per_tensor":
            raise UnsupportedError(
                f"{prefix}.weight_scale: scales of {spec.scales.dtype} {spec.scales.qscheme} are not read; "
                f"{', '.join(SECOND)} per tensor is (Quark 0.13 stores e5m3 ones as integers that have wrapped around)"
            )
        kind, dtype = SECOND[spec.scales.dtype]
        return kind, (dtype,)
    if spec.scale_format == "e8m0":
        return "e8m0", (np.uint8, ml_dtypes.float8_e8m0fnu)
    if spec.scale_format == "e5m3":
        return "e5m3", (np.uint8,)
    if spec.scale_format in ("float", "float32", "e4m3"):  # e4m3 of one stage: the rounded scale is stored as a float
        return "float", FLOATS
    raise UnsupportedError(
        f"{prefix}.weight_scale: scale_format {spec.scale_format!r} is not read; e8m0, e5m3, e4m3 and floats are"
    )


def load_container(prefix: str, weight: np.ndarray, spec: Spec, fields: dict[str, Any]) -> NarrowFloat:
    """An "mx" container: for each 32 inputs a signed exponent and their codes.

    fp4: 16 bytes, low nibble first. fp6: eight times three bytes for four codes: their two high bits, the first code in
    the highest, then their four low bits, two codes a byte, the first in the high half.

    Raises:
      FormatError: sizes that no container has, or an exponent of -128.
      UnsupportedError: elements that Quark does not pack.
    """
    if spec.element not in SMALL:
        raise UnsupportedError(
            f"{prefix}.weight: mx_element_dtype {spec.element!r} is not read; {', '.join(SMALL)} are"
        )
    number, width = SMALL[spec.element]
    size = 1 + BLOCK * width // 8
    expect_dtype(weight, (np.uint8,), f"{prefix}.weight")
    if weight.shape[1] % size:
        raise FormatError(
            f"{prefix}.weight: found shape {tuple(weight.shape)}; containers of {spec.element} have {size} bytes for "
            f"{BLOCK} inputs"
        )
    blocks = weight.reshape(weight.shape[0], -1, size)
    exponents = blocks[..., 0].view(np.int8).astype(np.int32) + 127
    if (exponents < 0).any():
        raise FormatError(f"{prefix}.weight: an exponent of -128; the file is damaged")
    codes = _container_codes(blocks[..., 1:], width).reshape(weight.shape[0], -1)
    return NarrowFloat.make(
        codes,
        exponents.astype(np.uint8),
        kind=number,
        name=prefix,
        scale_kind="e8m0",
        grouping=Grouping("block", 1, BLOCK),
        formula="f32",
        source=Source("quark", (("dtype", "mx"), ("element", spec.element))),
        **fields,
    )


def _container_codes(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8[..., 32 * width / 8] -> codes uint8[..., 32]."""
    if width == 4:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], BLOCK)
    fours = packed.reshape(*packed.shape[:-1], 8, 3)
    high = (fours[..., :1] >> np.array([6, 4, 2, 0], np.uint8)) & 3
    low = np.stack([fours[..., 1] >> 4, fours[..., 1] & 15, fours[..., 2] >> 4, fours[..., 2] & 15], axis=-1)
    return (high << 4 | low).reshape(*packed.shape[:-1], BLOCK)


def _container(codes: np.ndarray, exponents: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `load_container`: codes uint8[N, K], exponents + 127 uint8[N, K/32] -> uint8[N, bytes]."""
    blocks = codes.reshape(codes.shape[0], -1, BLOCK)
    if width == 4:
        packed = blocks[..., ::2] | blocks[..., 1::2] << 4
    else:
        fours = blocks.reshape(*blocks.shape[:2], 8, 4)
        high = np.bitwise_or.reduce((fours >> 4) << np.array([6, 4, 2, 0], np.uint8), axis=-1)
        low = (fours[..., ::2] & 15) << 4 | fours[..., 1::2] & 15
        packed = np.concatenate([high[..., None], low], axis=-1).reshape(*blocks.shape[:2], -1)
    first = (exponents.astype(np.int32) - 127).astype(np.int8).view(np.uint8)
    return np.concatenate([first[..., None], packed], axis=-1).reshape(codes.shape[0], -1)


def dump_floats(q: NarrowFloat, scale: np.ndarray, extras: Parts) -> Parts:
    """Stored tensors of a module; `scale` in its stored shape."""
    assert q.source is not None
    if q.source.get("dtype") == "mx":
        codes = np.asarray(q.unpack()).astype(np.uint8)
        return {"weight": _container(codes, np.asarray(q.scales), SMALL[q.source.get("element")][1]), **extras}
    if q.scale_kind != "float":
        scale = scale.view(np.dtype(getattr(ml_dtypes, q.source.get("scale_dtype"), q.source.get("scale_dtype"))))
    codes = np.ascontiguousarray(np.asarray(q.codes)).view(np.uint8)
    dtype = FLOAT8.get(q.source.get("dtype"))
    if q.global_scale is not None:
        extras = {"weight_scale_2": np.asarray(q.global_scale), **extras}
    return {"weight": codes.view(dtype[1]) if dtype else codes, "weight_scale": scale, **extras}


def packed_codes(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of 4 or 6 bits as a module beside its scales stores them: uint8[N, K * width / 8]."""
    return np.ascontiguousarray(_bits.pack(codes, SMALL[dtype][1])).view(np.uint8)
