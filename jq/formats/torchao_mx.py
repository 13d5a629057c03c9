"""torchao's prototype tensor classes for microscaling: MXTensor and NVFP4Tensor (table in `jq.formats.torchao_tensors`).

Source: torchao 0.18.0, prototype/mx_formats/{mx_tensor,nvfp4_tensor,utils}.py. Scales may be stored "swizzled", in the
blocks of 128 rows and 4 columns that cuBLAS reads: row r, column c of a block is at 16 * (r % 32) + 4 * (r // 32) + c.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.errors import FormatError
from jq.formats.base import Parts, expect_dtype, expect_shape
from jq.formats.torchao_tensors import FLOAT8, Stored, TensorClass, dtype_name
from jq.qtensor import Grouping, NarrowFloat

E8M0, E4M3 = np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(ml_dtypes.float8_e4m3fn)
# elem_dtype -> (kind, codes a byte)
_ELEMENTS = {
    "float8_e4m3fn": ("e4m3fn", 1),
    "float8_e5m2": ("e5m2", 1),
    "fp6_e2m3": ("e2m3", 1),
    "fp6_e3m2": ("e3m2", 1),
    "float4_e2m1fn_x2": ("e2m1", 2),
}
_ROWS, _COLUMNS = 128, 4


def load_mx(stored: Stored) -> NarrowFloat:
    """MXTensor: codes uint8 or float8 with E8M0 scales of blocks, weight = value * scale in the tensor's own dtype."""
    qdata = stored.take("qdata")
    element = dtype_name(stored.attributes.get("elem_dtype"))
    if element not in _ELEMENTS:
        raise FormatError(f"{stored.name}: metadata: elem_dtype {element!r}, expected {', '.join(_ELEMENTS)}")
    kind, per = _ELEMENTS[element]
    return _load(stored, qdata, kind, per, E8M0, "e8m0", "own")


def load_nvfp4(stored: Stored) -> NarrowFloat:
    """NVFP4Tensor: two e2m1 codes a byte, e4m3 scales of 16, maybe one more scale for all."""
    qdata = stored.take("qdata")
    return _load(
        stored, qdata, "e2m1", 2, E4M3, "e4m3", "global_product" if "per_tensor_scale" in stored.parts else "f32"
    )


def _load(
    stored: Stored, qdata: np.ndarray, kind: str, per: int, scale_dtype: np.dtype, scale_kind: str, formula: str
) -> NarrowFloat:
    expect_dtype(qdata, (np.uint8, *FLOAT8), f"{stored.name}: qdata")
    if qdata.ndim != 2:
        raise FormatError(f"{stored.name}: qdata: found shape {qdata.shape}, expected a matrix")
    codes = np.ascontiguousarray(qdata).view(np.uint8)
    codes = _bits.unpack(codes, 4) if per == 2 else codes
    n, k = codes.shape
    size = stored.attributes.get("block_size")
    if type(size) is not int or size <= 0 or k % size:
        raise FormatError(f"{stored.name}: metadata: block_size {size!r} does not divide in_features {k}")
    scale = stored.take("scale")
    expect_dtype(scale, (scale_dtype, np.uint8), f"{stored.name}: scale")
    extras = dict(stored.common.get("extras", {}))
    plain = np.ascontiguousarray(scale).view(np.uint8)
    if stored.attributes.get("is_swizzled_scales"):
        plain = unswizzle(plain, n, k // size, f"{stored.name}: scale")
        if swizzle(plain).tobytes() != np.ascontiguousarray(scale).tobytes():
            extras["scale"] = scale  # padding that is not zero: carried as it is
    expect_shape(plain.reshape(-1, k // size), (n, k // size), f"{stored.name}: scale", f"blocks of {size}")
    whole = stored.parts.get("per_tensor_scale")
    if whole is not None and whole.size != 1:
        raise FormatError(
            f"{stored.name}: per_tensor_scale: found shape {whole.shape}, expected one value for a matrix"
        )
    return NarrowFloat.make(
        codes,
        plain.reshape(n, k // size),
        kind=kind,
        global_scale=whole,
        scale_kind=scale_kind,
        grouping=Grouping("block", 1, size),
        formula=formula,
        dtype=stored.dtype,
        name=stored.name,
        **{**stored.common, "extras": extras},
    )


def dump_mx(q: NarrowFloat) -> Parts:
    """Inverse of `load_mx` and `load_nvfp4`."""
    source = q.source
    assert source is not None
    codes = np.asarray(q.unpack()).astype(np.uint8)
    if q.kind == "e2m1":
        qdata = np.ascontiguousarray(_bits.pack(codes, 4)).view(np.uint8)
    else:
        qdata = codes
    dtype = next((d for d, kind in FLOAT8.items() if kind == q.kind), None)
    parts: Parts = {"qdata": qdata if dtype is None else qdata.view(dtype)}
    scale = np.asarray(q.scales)
    if source.get("scale_shape") is not None:
        scale = swizzle(scale).reshape(source.get("scale_shape"))
    if q.global_scale is not None:
        parts["per_tensor_scale"] = np.asarray(q.global_scale)
    return {**parts, "scale": scale.view(E8M0 if q.scale_kind == "e8m0" else E4M3)}


def swizzle(scale: np.ndarray) -> np.ndarray:
    """uint8[H, W] -> the blocked order, uint8[ceil(H/128) * ceil(W/4), 512], padded with zeros."""
    height, width = scale.shape
    rows, columns = -(-height // _ROWS), -(-width // _COLUMNS)
    padded = np.zeros((rows * _ROWS, columns * _COLUMNS), np.uint8)
    padded[:height, :width] = scale
    blocks = padded.reshape(rows, 4, 32, columns, _COLUMNS).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks).reshape(rows * columns, -1)


def unswizzle(stored: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """Inverse of `swizzle`: uint8[H, W]."""
    rows, columns = -(-height // _ROWS), -(-width // _COLUMNS)
    if stored.size != rows * columns * _ROWS * _COLUMNS:
        raise FormatError(
            f"{name}: found {stored.size} swizzled values, expected {rows * columns * _ROWS * _COLUMNS} for {height} x {width}"
        )
    blocks = stored.reshape(rows, columns, 32, 4, _COLUMNS).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks.reshape(rows * _ROWS, columns * _COLUMNS)[:height, :width])


MX_CLASSES: dict[str, TensorClass] = {
    "MXTensor": TensorClass(("qdata", "scale"), load_mx, dump_mx),
    "NVFP4Tensor": TensorClass(
        ("qdata", "scale"), load_nvfp4, dump_mx, ("per_tensor_scale",), ("act_per_tensor_scale",)
    ),
}
