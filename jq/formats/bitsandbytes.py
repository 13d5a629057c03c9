"""bitsandbytes (0.50.2, as transformers 5.23.0 saves it): LLM.int8, NF4 and FP4.

8 bits, linear layer [N, K]:

    weight         int8[N, K]     codes
    SCB            float32[N]     row maxima; weight = f32(f32(code * SCB) * f32(1/127))
    weight_format  uint8 scalar   0 = row major, the only order; may be missing

4 bits, n = N*K weights in blocks of B over the flattened (row-major) weight:

    weight                    bytes [ceil(n/2)] under the storage dtype, as a column; even elements in the high nibble
    weight.absmax             float32[ceil(n/B)], or uint8 codes of it (double quantization)
    weight.quant_map          float32[16]
    weight.nested_absmax      float32[ceil(ceil(n/B)/256)], weight.nested_quant_map float32[256]: double quantization
    weight.quant_state.bitsandbytes__nf4 (or __fp4)   JSON: quant_type, blocksize, dtype, shape, nested_*

The weight is `dtype(f32(quant_map[code] * absmax))`; a nested absmax is `f32(f32(map[code] * nested_absmax) + offset)`.
Storage dtypes other than uint8 are views of the bytes and never touched as numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import (
    Context,
    Format,
    Parts,
    expect_dtype,
    expect_shape,
    group_by_prefix,
    take,
    true_or_false,
    warn_unknown,
)
from jq.formats.bitsandbytes_methods import FP4, NF4, Int8, int8_tensor, nested_absmax, tensor_4bit
from jq.formats.gptq_config import first
from jq.qtensor import Affine, Codebook, QTensor
from jq.qtensor.affine import check_finite

STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_HARMLESS = (
    "quant_method _load_in_4bit _load_in_8bit load_in_4bit load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight "
    "llm_int8_skip_modules llm_int8_threshold bnb_4bit_blocksize"
)
_FLAGS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant", "llm_int8_has_fp16_weight")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a quantization_config says beyond the tensors: LLM.int8's outlier threshold."""

    threshold: float = 6.0


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config. Types, block sizes and dtypes come from each weight's own JSON, not from here."""
    warn_unknown(config, _HARMLESS.split(), context.label)
    for key in _FLAGS:
        true_or_false(config, key, f"{context.label}: quantization_config", default=False)
    threshold = first(config, "llm_int8_threshold", default=6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise FormatError(
            f"{context.label}: quantization_config.llm_int8_threshold is {threshold!r}, expected a number"
        )
    return Options(float(threshold))


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module's tensors: `Affine` for int8, `Codebook` for NF4 and FP4.

    Raises:
      FormatError: missing tensors; shapes, dtypes or JSON that disagree with each other.
      UnsupportedError: int8 weights in an order of old GPU kernels.
    """
    weight = take(parts, "weight", prefix)
    if "SCB" in parts:
        return _load_int8(prefix, weight, parts, options)
    kind = next((k for k in KINDS if STATE + k in parts), None)
    if kind is None:
        raise FormatError(
            f"{prefix}.{STATE}nf4: missing (as is __fp4); the module has only {', '.join(sorted(parts))}. "
            "Without it shape, block size and dtype are unknown: the file is incomplete"
        )
    return _load_4bit(prefix, weight, parts, kind)


def _load_int8(prefix: str, weight: np.ndarray, parts: Parts, options: Options) -> Affine:
    expect_dtype(weight, (np.int8,), f"{prefix}.weight")
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"{prefix}.weight: found shape {tuple(weight.shape)}, expected [out_features, in_features]")
    scb = parts["SCB"]
    expect_dtype(scb, (np.float32, np.float16, "bfloat16"), f"{prefix}.SCB")
    expect_shape(scb, (weight.shape[0],), f"{prefix}.SCB", "one scale for each row of the int8 weight")
    check_finite(scb, f"{prefix}.SCB")
    pairs: tuple[tuple[str, Any], ...] = (("kind", "int8"),)
    if "weight_format" in parts:
        order = int(np.asarray(parts["weight_format"]).reshape(-1)[0])
        if order != 0:
            names = {1: "col32", 2: "col_turing", 3: "col_ampere"}
            raise UnsupportedError(
                f"{prefix}.weight_format: {order} ({names.get(order, 'unknown')}) is the order of an old GPU kernel; only "
                "0 (row) is read. Save it again with bitsandbytes >= 0.45"
            )
        pairs += (("weight_format", (str(parts["weight_format"].dtype), parts["weight_format"].shape)),)
    return int8_tensor(weight, scb, options.threshold, pairs)


def _state_of(raw: np.ndarray, name: str) -> dict[str, Any]:
    """The JSON of a 4-bit weight, with the types of its keys checked."""
    try:
        state = json.loads(np.ascontiguousarray(raw).tobytes())
    except (ValueError, UnicodeDecodeError) as e:
        raise FormatError(f"{name}: is not JSON ({e}); the file is damaged") from e
    if not isinstance(state, dict):
        raise FormatError(f"{name}: holds a JSON {type(state).__name__}, expected an object")
    shape, size = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise FormatError(f"{name}: shape is {shape!r}, expected [out_features, in_features]")
    if type(size) is not int or size < 1:
        raise FormatError(f"{name}: blocksize is {size!r}, expected a positive integer")
    if state.get("dtype") not in ("float16", "bfloat16", "float32"):
        raise FormatError(f"{name}: dtype is {state.get('dtype')!r}, expected float16, bfloat16 or float32")
    if "nested_offset" in state:
        if not isinstance(state["nested_offset"], int | float) or type(state.get("nested_blocksize")) is not int:
            raise FormatError(f"{name}: nested_offset and nested_blocksize must be numbers, found {state}")
        if state["nested_blocksize"] < 1 or not math.isfinite(state["nested_offset"]):
            raise FormatError(f"{name}: nested_blocksize {state['nested_blocksize']} or nested_offset is out of range")
    return state


def _load_4bit(prefix: str, weight: np.ndarray, parts: Parts, kind: str) -> Codebook:
    name = f"{prefix}.{STATE}{kind}"
    raw = parts[STATE + kind]
    state = _state_of(raw, name)
    n, k = state["shape"]
    size, blocks = state["blocksize"], -(-n * k // state["blocksize"])
    count = f"shape {n} x {k} of quant_state in blocks of {size}"
    table = take(parts, "weight.quant_map", prefix)
    expect_shape(table, (16,), f"{prefix}.weight.quant_map", "one value for each 4-bit code")
    expect_dtype(table, (np.float32,), f"{prefix}.weight.quant_map")
    check_finite(table, f"{prefix}.weight.quant_map")
    stored = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    if stored.size != -(-n * k // 2):
        raise FormatError(
            f"{prefix}.weight: found {weight.dtype}{list(weight.shape)} = {stored.size} bytes, expected {-(-n * k // 2)} "
            f"({count}, two codes a byte)"
        )
    absmax = take(parts, "weight.absmax", prefix)
    expect_shape(absmax, (blocks,), f"{prefix}.weight.absmax", count)
    row_blocks = k % size == 0
    shape = (n, k // size) if row_blocks else (1, blocks)
    extras: dict[str, np.ndarray] = {}
    if n * k % 2 and stored[-1] & 15:  # the nibble after an odd number of codes
        extras["padding"] = stored[-1:] & 15
    nested: Any = None
    if "nested_offset" in state:
        nested = _nested(prefix, parts, absmax.reshape(shape), state)
    else:
        expect_dtype(absmax, (np.float32, np.float16, "bfloat16"), f"{prefix}.weight.absmax")
        check_finite(absmax, f"{prefix}.weight.absmax")
    tensor = tensor_4bit(
        unpack_flat(stored, n, k),
        table,
        nested if nested is not None else absmax.reshape(shape) if row_blocks else absmax,
        kind=kind,
        block_size=size,
        dtype=state["dtype"],
        storage=str(weight.dtype),
        extras=extras,
        row=weight.ndim == 2 and weight.shape[0] == 1 and weight.shape[1] != 1,
    )
    if not np.array_equal(_state_bytes(tensor), raw):  # another writer's order of keys or spelling of numbers
        tensor = tensor.replace(extras={**extras, STATE + kind: raw})
    return tensor


def _nested(prefix: str, parts: Parts, codes: np.ndarray, state: Mapping[str, Any]) -> Codebook:
    """The quantized absmax as a `Codebook` of the shape that absmax has."""
    absmax, table = (take(parts, suffix, prefix, why="absmax is quantized.") for suffix in NESTED)
    size = state["nested_blocksize"]
    expect_dtype(codes, (np.uint8,), f"{prefix}.weight.absmax")
    why = f"{codes.size} quantized block maxima in blocks of {size}"
    expect_shape(absmax, (-(-codes.size // size),), f"{prefix}.weight.nested_absmax", why)
    expect_shape(table, (256,), f"{prefix}.weight.nested_quant_map", "one value for each 8-bit code")
    for suffix, array in zip(NESTED, (absmax, table), strict=True):
        expect_dtype(array, (np.float32,), f"{prefix}.{suffix}")
        check_finite(array, f"{prefix}.{suffix}")
    return nested_absmax(codes, absmax, table, np.float32(state["nested_offset"]), size)


def unpack_flat(stored: np.ndarray, n: int, k: int) -> np.ndarray:
    """Codes uint8[N, K] of packed bytes uint8[ceil(N*K/2)], high nibble first."""
    codes = np.empty((stored.size, 2), np.uint8)
    codes[:, 0] = stored >> 4
    codes[:, 1] = stored & 15
    return codes.reshape(-1)[: n * k].reshape(n, k)


def dump(q: Any) -> Parts:
    """The stored tensors of a module, from the arrays of `q`."""
    q = q.to_numpy()
    return _dump_int8(q) if isinstance(q, Affine) else _dump_4bit(q)


def _dump_int8(q: Affine) -> Parts:
    assert q.source is not None
    parts = {"weight": np.ascontiguousarray(q.codes).view(np.int8), "SCB": q.scales.reshape(-1)}
    weight_format = q.source.get("weight_format")
    if weight_format is not None:
        parts["weight_format"] = np.zeros(weight_format[1], weight_format[0])
    return parts


def _dump_4bit(q: Codebook) -> Parts:
    assert q.source is not None
    kind, storage = q.source.get("quant_type"), np.dtype(q.source.get("storage"))
    flat = q.unpack().astype(np.uint8).reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, q.extras["padding"] if "padding" in q.extras else np.uint8(0))
    stored = (flat[0::2] << 4 | flat[1::2]).view(storage)
    parts = {
        "weight": stored.reshape((1, -1) if q.source.get("row") else (-1, 1)),
        "weight.quant_map": q.table,
    }
    if isinstance(q.absmax, Codebook):
        nested = q.absmax
        parts["weight.absmax"] = nested.unpack().astype(np.uint8).reshape(-1)
        parts["weight.nested_absmax"] = nested.absmax
        parts["weight.nested_quant_map"] = nested.table
    else:
        parts["weight.absmax"] = q.absmax.reshape(-1)
    parts[STATE + kind] = q.extras[STATE + kind] if STATE + kind in q.extras else _state_bytes(q)
    return parts


def _state_bytes(q: Codebook) -> np.ndarray:
    """The JSON of a 4-bit weight as bitsandbytes writes it, uint8[bytes]."""
    assert q.source is not None
    state: dict[str, Any] = {
        "quant_type": q.source.get("quant_type"),
        "blocksize": q.block_size,
        "dtype": q.dtype,
        "shape": list(q.shape),
    }
    if isinstance(q.absmax, Codebook):
        state["nested_blocksize"] = q.absmax.block_size
        state["nested_dtype"] = q.absmax.dtype
        state["nested_offset"] = float(np.asarray(q.absmax.offset))
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


MARKERS = ("SCB", "weight.absmax", "weight.quant_map", *(STATE + k for k in KINDS))
SUFFIXES = ("weight", "weight_format", *NESTED, *MARKERS)


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Quantized modules by name.

    Raises:
      FormatError: an int8 weight without its SCB, which would pass for a dense matrix.
    """
    found = group_by_prefix(names, MARKERS, SUFFIXES)
    for name in names:
        dtype = context.dtypes.get(name)
        if name.endswith(".weight") and name[:-7] not in found and dtype is not None and np.dtype(dtype) == np.int8:
            raise FormatError(
                f"{context.label}: {name[:-7]}.SCB: missing; {name} is int8 {list(context.shapes.get(name, ()))} and means "
                "nothing without its row scales. The file is incomplete"
            )
    return found


FORMAT = Format(
    name="bitsandbytes",
    methods=("bitsandbytes",),
    title="bitsandbytes: LLM.int8, NF4, FP4",
    parse=parse,
    markers=MARKERS,
    suffixes=SUFFIXES,
    group=group,
    load=load,
    dump=dump,
    methods_table={"NF4": NF4, "FP4": FP4, "Int8": Int8},
)
