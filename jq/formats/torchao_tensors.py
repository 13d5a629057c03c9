"""torchao's tensor classes: stored arrays and attributes of one parameter -> QTensor, and back.

Source: torchao 0.18.0, quantization/quantize_/workflows/{int8,intx,int4,float8} and prototype/mx_formats. Each class
stores named arrays; its attributes (block_size, dtype, ...) lie as JSON in the safetensors metadata. N, K is the
weight's shape, [r, c] its block_size.

| class | arrays | weight, with dt = the `dtype` attribute |
|---|---|---|
| Int8Tensor | qdata int8[N, K], scale f32[N/r, K/c], zero_point int8 | dt(f32(q - zp) * scale) |
| IntxUnpackedToInt8Tensor | qdata int8[N, K] in the range of target_dtype, scale, zero_point int8 or float [N/r, K/c] | dt(q - zp) * scale |
| Float8Tensor | qdata float8[N, K], scale f32[N/r, K/c] | dt(f32(q) * scale) |
| Int4Tensor | qdata int8[N, K/2], low nibble first, signed; scale, zero_point dt[K/c, N] | dt(f32(q) * scale + zp) |
| Int4PlainInt32Tensor | qdata int32[N, K/8], low nibble first; scale dt, zero_point int8 [K/c, N] | (q - zp) * scale |
| Int4TilePackedTo4dTensor | qdata int32[N'/8, K'/128, 32, 4], scale_and_zero bf16[K'/c, N', 2] | bf16(bf16((q - 8) * scale) + zero) |
| MXTensor | qdata float8[N, K], fp6 uint8[N, K] or fp4 uint8[N, K/2], scale e8m0[N, K/32] | dt(q) * dt(scale) |
| NVFP4Tensor | qdata uint8[N, K/2], scale e4m3[N, K/16], per_tensor_scale f32 | dt(f32(q) * (per_tensor * scale)) |

N' and K' are N and K up to multiples of 8 and 1024; the codes and scales of the padding are carried. Word (nt, ko, t, i)
of a tile holds in nibble 4h + p the code of row 8 nt + t/4 and column 128 ko + 32 i + 8 p + 2 (t % 4) + h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Parts, expect_dtype, expect_shape, take
from jq.qtensor import Affine, Grouping, NarrowFloat, QTensor

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
FLOAT8 = {
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3fn",
    np.dtype(ml_dtypes.float8_e5m2): "e5m2",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "e4m3fnuz",
}
_TILE_ROWS, _TILE_COLUMNS = 8, 1024


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter as it is stored.

    Fields:
      name: parameter name, for messages.
      parts: arrays by torchao's names.
      attributes: the `_data` object of the metadata.
      common: fields of the QTensor that do not depend on the class (extras, activation, source).
    """

    name: str
    parts: Parts
    attributes: Mapping[str, Any]
    common: Mapping[str, Any]

    def take(self, part: str) -> np.ndarray:
        return take(self.parts, part, self.name, why="The safetensors metadata lists it.")

    @property
    def dtype(self) -> str:
        found = dtype_name(self.attributes.get("dtype") or self.attributes.get("orig_dtype"))
        if found not in ("float16", "bfloat16", "float32"):
            raise FormatError(f"{self.name}: metadata: dtype {found!r} is none of float16, bfloat16, float32")
        return found

    def shape(self) -> tuple[int, int]:
        """The `shape` attribute (N, K)."""
        found = self.attributes.get("shape")
        if not isinstance(found, (list, tuple)) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
            raise FormatError(f"{self.name}: metadata: shape {found!r}, expected [out_features, in_features]")
        return found[0], found[1]

    def grouping(self, n: int, k: int) -> Grouping:
        """`block_size` as a Grouping; an empty one means one scale for the tensor."""
        block = self.attributes.get("block_size") or [n, k]
        block = [n, k] if block == -1 else block
        if not isinstance(block, (list, tuple)) or len(block) < 2 or not all(type(b) is int and b > 0 for b in block):
            raise FormatError(f"{self.name}: metadata: block_size {block!r}, expected two positive numbers")
        rows, columns = block[-2:]
        if n % rows or k % columns:
            raise FormatError(f"{self.name}: metadata: block_size {block} does not divide a weight of ({n}, {k})")
        return Grouping("block", 0 if rows == n and n > 1 else rows, 0 if columns == k else columns)

    def blocks(self, part: str, grouping: Grouping, n: int, k: int) -> np.ndarray:
        """An array with one value a block, [N/r, K/c]."""
        found = self.take(part)
        shape = (n // (grouping.rows or n), k // (grouping.cols or k))
        if found.size == shape[0] * shape[1] and found.ndim != 2:
            return found.reshape(shape)
        expect_shape(found, shape, f"{self.name}: {part}", f"one for each block of {grouping}")
        return found


def dtype_name(value: Any) -> str:
    """Name of an encoded torch.dtype ({"_type": "torch.dtype", "_data": "bfloat16"})."""
    found = value.get("_data") if isinstance(value, Mapping) else value
    return str(found).removeprefix("torch.")


def _matrix(stored: Stored, part: str) -> np.ndarray:
    found = stored.take(part)
    if found.ndim != 2:
        raise FormatError(f"{stored.name}: {part}: found shape {found.shape}, expected a matrix")
    return found


def load_int8(stored: Stored) -> Affine:
    """Int8Tensor: int8 codes [N, K] with scales and maybe zero points of blocks."""
    qdata = _matrix(stored, "qdata")
    expect_dtype(qdata, (np.int8,), f"{stored.name}: qdata")
    n, k = qdata.shape
    grouping = stored.grouping(n, k)
    scale = stored.blocks("scale", grouping, n, k)
    expect_dtype(scale, FLOATS, f"{stored.name}: scale")
    zeros = stored.blocks("zero_point", grouping, n, k) if "zero_point" in stored.parts else None
    return _integers(stored, qdata, 8, scale, zeros, grouping)


def load_intx(stored: Stored) -> Affine:
    """IntxUnpackedToInt8Tensor: codes of 1 to 8 bits, one in each int8 of [N, K]."""
    qdata = _matrix(stored, "qdata")
    expect_dtype(qdata, (np.int8,), f"{stored.name}: qdata")
    n, k = qdata.shape
    target = dtype_name(stored.attributes.get("target_dtype"))
    if target not in [f"int{b}" for b in range(1, 9)]:
        raise FormatError(f"{stored.name}: metadata: target_dtype {target!r}, expected int1 .. int8")
    bits = int(target[3:])
    if int(qdata.min()) < -(1 << (bits - 1)) or int(qdata.max()) >= 1 << (bits - 1):
        raise FormatError(
            f"{stored.name}: qdata: values {qdata.min()}..{qdata.max()} do not fit target_dtype {target}; "
            "the file is damaged"
        )
    grouping = stored.grouping(n, k)
    scale = stored.blocks("scale", grouping, n, k)
    expect_dtype(scale, FLOATS, f"{stored.name}: scale")
    zeros = stored.blocks("zero_point", grouping, n, k)
    return _integers(stored, qdata, bits, scale, zeros, grouping)


def _integers(
    stored: Stored, codes: np.ndarray, bits: int, scale: np.ndarray, zeros: Any, grouping: Grouping
) -> Affine:
    """dt(code - zero) times a scale of any dtype: the product is in the wider of both dtypes."""
    dtype = stored.dtype
    return Affine.make(
        codes,
        scale,
        zeros=zeros,
        code_bits=bits,
        signed=True,
        grouping=grouping,
        formula="sub_mul" if str(scale.dtype) == dtype else "f32",
        dtype=dtype,
        name=stored.name,
        **stored.common,
    )


def dump_integers(q: Affine) -> Parts:
    """Inverse of `load_int8` and `load_intx`."""
    parts: Parts = {"qdata": np.asarray(q.unpack()).astype(np.int8), "scale": np.asarray(q.scales)}
    if q.zeros is not None:
        parts["zero_point"] = np.asarray(q.zeros)
    return parts


def load_float8(stored: Stored) -> NarrowFloat:
    """Float8Tensor: float8 codes [N, K] with float32 scales of blocks."""
    qdata = _matrix(stored, "qdata")
    expect_dtype(qdata, tuple(FLOAT8), f"{stored.name}: qdata")
    n, k = qdata.shape
    grouping = stored.grouping(n, k)
    return NarrowFloat.make(
        qdata.view(np.uint8),
        stored.blocks("scale", grouping, n, k),
        kind=FLOAT8[qdata.dtype],
        grouping=grouping,
        dtype=stored.dtype,
        name=stored.name,
        **stored.common,
    )


def dump_float8(q: NarrowFloat) -> Parts:
    """Inverse of `load_float8`."""
    dtype = next(d for d, kind in FLOAT8.items() if kind == q.kind)
    return {"qdata": np.asarray(q.codes).view(dtype), "scale": np.asarray(q.scales)}


def load_int4(stored: Stored) -> Affine:
    """Int4Tensor: two signed codes a byte, [N, K/2], scales and float zeros [K/G, N]."""
    qdata, (n, k) = _matrix(stored, "qdata"), stored.shape()
    expect_dtype(qdata, (np.int8, np.uint8), f"{stored.name}: qdata")
    expect_shape(qdata, (n, k // 2), f"{stored.name}: qdata", f"two codes a byte of ({n}, {k})")
    codes = _bits.unpack(np.ascontiguousarray(qdata).view(np.uint8), 4, signed=True)
    scale, zero, grouping = _transposed_groups(stored, n, k)
    return Affine.make(
        codes,
        scale,
        zeros=zero,
        code_bits=4,
        signed=True,
        grouping=grouping,
        formula="f32_mul_add",
        dtype=str(scale.dtype),
        name=stored.name,
        **stored.common,
    )


def dump_int4(q: Affine) -> Parts:
    """Inverse of `load_int4`."""
    packed = np.ascontiguousarray(np.asarray(q.codes)).view(np.int8)
    return {"qdata": packed, "scale": _columns(q.scales), "zero_point": _columns(q.zeros)}


def _transposed_groups(stored: Stored, n: int, k: int) -> tuple[np.ndarray, np.ndarray, Grouping]:
    """scale and zero_point of [K/c, N] as [N, K/c]."""
    grouping = stored.grouping(n, k)
    if grouping.rows != 1:
        raise FormatError(
            f"{stored.name}: metadata: block_size {stored.attributes.get('block_size')}, expected [1, group]"
        )
    groups = k // (grouping.cols or k)
    for part in ("scale", "zero_point"):
        expect_shape(stored.take(part), (groups, n), f"{stored.name}: {part}", "groups by rows")
    expect_dtype(stored.take("scale"), FLOATS, f"{stored.name}: scale")
    return (
        np.ascontiguousarray(stored.take("scale").T),
        np.ascontiguousarray(stored.take("zero_point").T),
        grouping,
    )


def _columns(array: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array).T)


def load_plain_int32(stored: Stored) -> Affine:
    """Codes 0..15 with int8 zero points (Intel GPUs), or -8..7 with float ones (Ascend NPUs)."""
    qdata, (n, k) = _matrix(stored, "qdata"), stored.shape()
    expect_dtype(qdata, (np.int32,), f"{stored.name}: qdata")
    expect_shape(qdata, (n, k // 8), f"{stored.name}: qdata", f"eight codes a word of ({n}, {k})")
    scale, zero, grouping = _transposed_groups(stored, n, k)
    signed = zero.dtype.kind not in "iu"
    return Affine.make(
        _bits.unpack(np.ascontiguousarray(qdata).view(np.uint32), 4, signed=signed),
        scale,
        zeros=zero,
        code_bits=4,
        signed=signed,
        grouping=grouping,
        formula="sub_mul",
        dtype=str(scale.dtype),
        name=stored.name,
        **stored.common,
    )


def dump_plain_int32(q: Affine) -> Parts:
    """Inverse of `load_plain_int32`."""
    return {**dump_int4(q), "qdata": np.asarray(q.codes).view(np.int32)}


def load_tile(stored: Stored) -> Affine:
    """Int4TilePackedTo4dTensor: tinygemm's tiles of (8, 128) codes, sizes padded to whole tiles."""
    qdata, both = stored.take("qdata"), stored.take("scale_and_zero")
    n, k = stored.shape()
    if qdata.ndim != 4 or qdata.shape[2:] != (32, 4):
        raise UnsupportedError(
            f"{stored.name}: qdata: found shape {qdata.shape}; only tinygemm's tiles of (8, 128) codes for CUDA, "
            "(N/8, K/128, 32, 4), are read. Quantize with int4_tile_packed_ntile 8"
        )
    expect_dtype(qdata, (np.int32,), f"{stored.name}: qdata")
    padded = qdata.shape[0] * 8, qdata.shape[1] * 128
    group = (stored.attributes.get("block_size") or [1, padded[1]])[-1]
    if padded[0] < n or padded[1] < k or type(group) is not int or group <= 0 or padded[1] % group:
        raise FormatError(
            f"{stored.name}: tiles of {padded} codes in groups of {group} do not hold a weight of ({n}, {k})"
        )
    expect_shape(both, (padded[1] // group, padded[0], 2), f"{stored.name}: scale_and_zero", f"groups of {group}")
    expect_dtype(both, (ml_dtypes.bfloat16,), f"{stored.name}: scale_and_zero")
    codes, groups = unpack_tiles(qdata), -(-k // group)
    scale, zero = both[..., 0].T, both[..., 1].T
    extras = dict(stored.common.get("extras", {}))
    if padded != (n, k):
        extras["padding_codes"] = _bits.pack(_outside(codes, n, k), 4)
        extras["padding_scales"] = np.concatenate([_outside(scale, n, groups), _outside(zero, n, groups)])
    return Affine.make(
        codes[:n, :k].astype(np.int8) - 8,
        np.ascontiguousarray(scale[:n, :groups]),
        zeros=np.ascontiguousarray(zero[:n, :groups]),
        code_bits=4,
        signed=True,
        grouping=Grouping("block", 1, group if groups > 1 or group < k else 0),
        formula="mul_add",
        dtype="bfloat16",
        name=stored.name,
        **{**stored.common, "extras": extras},
    )


def dump_tile(q: Affine) -> Parts:
    """Inverse of `load_tile`; what lies in the padding is carried."""
    n, k = q.shape
    source = q.source
    assert source is not None
    padded, group = source.get("padded"), source.get("group")
    codes = (np.asarray(q.unpack()) + 8).astype(np.uint8)
    scale, zero = np.asarray(q.scales), np.asarray(q.zeros)
    if padded != (n, k):
        groups = padded[1] // group
        count = padded[0] * padded[1] - n * k
        codes = _inside(_bits.unpack(np.asarray(q.extras["padding_codes"]), 4, count), codes, padded)
        first, second = np.split(np.asarray(q.extras["padding_scales"]), 2)
        scale = _inside(first, scale, (padded[0], groups))
        zero = _inside(second, zero, (padded[0], groups))
    both = np.ascontiguousarray(np.stack([scale.T, zero.T], axis=-1))
    return {"qdata": pack_tiles(codes), "scale_and_zero": both}


def unpack_tiles(words: np.ndarray) -> np.ndarray:
    """int32[N/8, K/128, 32, 4] -> codes uint8[N, K]."""
    rows, columns = words.shape[:2]
    nibbles = (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))).astype(np.uint8) & 15
    split = nibbles.reshape(rows, columns, 8, 4, 4, 2, 4)  # nt, ko, t/4, t%4, i, h, p
    return split.transpose(0, 2, 1, 4, 6, 3, 5).reshape(rows * 8, columns * 128)


def pack_tiles(codes: np.ndarray) -> np.ndarray:
    """Inverse of `unpack_tiles`."""
    n, k = codes.shape
    split = codes.astype(np.uint32).reshape(n // 8, 8, k // 128, 4, 4, 4, 2)  # nt, t/4, ko, i, p, t%4, h
    nibbles = split.transpose(0, 2, 1, 5, 3, 6, 4).reshape(n // 8, k // 128, 32, 4, 8)
    shifted = nibbles << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)


def _outside(array: np.ndarray, n: int, k: int) -> np.ndarray:
    """What lies right of and below the first [n, k] of a matrix, flat."""
    return np.concatenate([array[:n, k:].reshape(-1), array[n:].reshape(-1)])


def _inside(rest: np.ndarray, core: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Inverse of `_outside`: the whole matrix."""
    n, k = core.shape
    whole = np.empty(shape, core.dtype)
    whole[:n, :k] = core
    right = n * (shape[1] - k)
    whole[:n, k:] = rest[:right].reshape(n, -1) if right else 0
    whole[n:] = rest[right:].reshape(-1, shape[1])
    return whole


@dataclasses.dataclass(frozen=True)
class TensorClass:
    """A tensor class: which arrays it has, and both ways.

    Fields:
      required, optional: torchao's names of stored arrays.
      load: Stored -> QTensor.
      dump: QTensor -> arrays, without the optional ones that travel in `extras`.
      carried: optional arrays that travel in `extras`.
    """

    required: tuple[str, ...]
    load: Callable[[Stored], QTensor]
    dump: Callable[[Any], Parts]
    optional: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *self.carried)


_STATIC = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")
CLASSES: dict[str, TensorClass] = {
    "Int8Tensor": TensorClass(("qdata", "scale"), load_int8, dump_integers, ("zero_point",), _STATIC),
    "IntxUnpackedToInt8Tensor": TensorClass(("qdata", "scale", "zero_point"), load_intx, dump_integers),
    "Float8Tensor": TensorClass(("qdata", "scale"), load_float8, dump_float8),
    "Int4Tensor": TensorClass(("qdata", "scale", "zero_point"), load_int4, dump_int4, (), ("act_pre_scale",)),
    "Int4PlainInt32Tensor": TensorClass(
        ("qdata", "scale", "zero_point"), load_plain_int32, dump_plain_int32, (), ("act_pre_scale",)
    ),
    "Int4TilePackedTo4dTensor": TensorClass(("qdata", "scale_and_zero"), load_tile, dump_tile, (), ("act_pre_scale",)),
}
