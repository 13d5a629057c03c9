"""Quanto: the checkpoints of optimum-quanto, which have no quantization_config.

Source: optimum-quanto 0.2.7 (nn/qmodule.py, tensor/{packed,grouped,qbits,qbytes}.py, library/quantize.py).
`quanto_qmap.json` (or `quantization_map.json`) says {module: {"weights": qtype, "activations": qtype or "none"}}.

| qtype | tensors of module m |
|---|---|
| qint8, qfloat8_e4m3fn, qfloat8_e5m2, qfloat8_e4m3fnuz | `m.weight._data` int8 or float8 [N, K], `m.weight._scale` [N, 1] |
| qint4, qint2 | `m.weight._data._data` uint8 [ceil(R / per), C], `m.weight._scale`, `m.weight._shift` [R, 1] |

and always `m.input_scale`, `m.output_scale` (scalars, 1 where not calibrated). All floats are in the model's dtype dt.
4 and 2 bit: the row-major weight is viewed as [R, C], C = the group (`group_size_of`) or K; codes lie in slabs of rows
(`jq.formats.slabs`), the first slab in the lowest bits, per = 8 / bits. Neither N, K nor the group is stored: K comes
from the model's config. N = 1 is quantized per tensor: scalar scales (8 bit), scales [1, C] (4 and 2 bit).

Dequantization: 8 bit `scale * dt(data)`; float shift `dt(scale * code) - shift`; integer shift
`scale * dt(code - shift)`. Activations are static per tensor; the output is quantized too (`jq.activation_schemes.quanto`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq.activations import Activation
from jq.algorithms import blocks
from jq.algorithms.quanto import QTYPES, affine_codes, group_size_of, symmetric_codes
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, take, warn_unknown
from jq.formats.layer_shapes import in_features_of
from jq.formats.slabs import pack_slabs, unpack_slabs
from jq.qtensor import Affine, Grouping, NarrowFloat, QTensor, Source

MAP_FILES = ("quanto_qmap.json", "quantization_map.json")
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
SUFFIXES = ("weight._data", "weight._data._data", "weight._scale", "weight._shift")
_SCALES = ("input_scale", "output_scale")
_KINDS = {
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3fn",
    np.dtype(ml_dtypes.float8_e5m2): "e5m2",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "e4m3fnuz",
}
# transformers' QuantoConfig names -> quanto's
_SHORT = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8_e4m3fn", "qfloat8": "qfloat8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Options:
    """weights and activations by module; "" holds for modules that the map does not name."""

    weights: Mapping[str, str | None]
    activations: Mapping[str, str | None]


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads `detect`'s map, or the quantization_config of transformers' QuantoConfig."""
    if "map" not in config:
        warn_unknown(config, ("quant_method", "weights", "activations", "modules_to_not_convert"), context.label)
        weights, activations = (_qtype(config.get(k), f"quantization_config.{k}") for k in ("weights", "activations"))
        return Options({"": weights}, {"": activations})
    weights_by, activations_by = {}, {}
    for module, entry in config["map"].items():
        if not isinstance(entry, Mapping):
            raise FormatError(f"quantization map: {module}: expected an object, found {entry!r:.60}")
        weights_by[module] = _qtype(entry.get("weights"), f"quantization map: {module}.weights")
        activations_by[module] = _qtype(entry.get("activations"), f"quantization map: {module}.activations")
    return Options(weights_by, activations_by)


def _qtype(value: Any, where: str) -> str | None:
    if value in (None, "none"):
        return None
    name = _SHORT.get(str(value), str(value))
    if name not in QTYPES:
        raise FormatError(f"{where}: found {value!r}, expected none, {', '.join(QTYPES)}")
    return name


def detect(checkpoint: Any) -> dict[str, Any] | None:
    """optimum-quanto writes a map file and no quantization_config; without a map the tensor names tell."""
    if not any(name.endswith(".weight._scale") for name in checkpoint.entries):
        return None
    for file in MAP_FILES:
        found = checkpoint.side_json(file)
        if found is not None:
            return {"quant_method": "quanto", "map": found}
    return {"quant_method": "quanto"}


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules are the prefixes of "weight._scale"; input_scale and output_scale belong to them only there."""
    have = set(names)
    found = {}
    for name in names:
        if name.endswith(".weight._scale"):
            prefix = name.removesuffix(".weight._scale")
            found[prefix] = {s: f"{prefix}.{s}" for s in (*SUFFIXES, *_SCALES) if f"{prefix}.{s}" in have}
    return found


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module: codes, scale, maybe shift -> `Affine` (integers) or `NarrowFloat`."""
    scale = take(parts, "weight._scale", prefix)
    expect_dtype(scale, FLOATS, f"{prefix}.weight._scale")
    extras = {k: parts[k] for k in _SCALES if k in parts}
    qtype = options.weights.get(prefix, options.weights.get(""))
    activations = options.activations.get(prefix, options.activations.get(""))
    common: dict[str, Any] = {"extras": extras, "name": prefix, "dtype": str(scale.dtype)}
    if activations:
        for key in _SCALES:
            take(parts, key, prefix, why=f"Activations are {activations}, which need it.")
        common["activation"] = Activation("quanto", _SCALES, (("dtype", activations.removeprefix("q")),))
    if "weight._data._data" in parts:
        return _load_packed(prefix, parts, qtype, context, common)
    data = take(parts, "weight._data", prefix)
    if data.ndim != 2 or scale.shape not in ((data.shape[0], 1), ()):
        raise FormatError(
            f"{prefix}.weight._scale: found shape {scale.shape} beside data of {data.shape}, expected (out_features, 1)"
        )
    rows = 0 if scale.ndim == 0 else 1
    common |= {"grouping": Grouping("block", rows, 0), "source": Source("quanto", (("rank", scale.ndim),))}
    if data.dtype == np.int8:
        return Affine.make(data, scale.reshape(-1, 1), code_bits=8, signed=True, formula="sub_mul", **common)
    if data.dtype not in _KINDS:
        raise FormatError(
            f"{prefix}.weight._data: found dtype {data.dtype}, expected int8 or {', '.join(map(str, _KINDS))}"
        )
    return NarrowFloat.make(data.view(np.uint8), scale.reshape(-1, 1), kind=_KINDS[data.dtype], formula="own", **common)


def _load_packed(prefix: str, parts: Parts, qtype: str | None, context: Context, common: dict[str, Any]) -> Affine:
    packed, scale = parts["weight._data._data"], parts["weight._scale"]
    shift = take(parts, "weight._shift", prefix)
    expect_dtype(packed, (np.uint8,), f"{prefix}.weight._data._data")
    expect_dtype(shift, (*FLOATS, np.uint8, np.int8), f"{prefix}.weight._shift")
    if packed.ndim != 2 or scale.ndim != 2 or 1 not in scale.shape or shift.shape != scale.shape:
        raise FormatError(
            f"{prefix}.weight._scale: found shapes {scale.shape} and {shift.shape} (shift) beside packed data of "
            f"{packed.shape}, expected (rows, 1) for both"
        )
    single = scale.shape[1] != 1  # one row, quantized per tensor: a scale for each column
    rows = 1 if single else scale.shape[0]
    bits = _bits(qtype, rows, packed.shape[0], prefix)
    per = 8 // bits
    columns = packed.shape[1]
    if packed.shape[0] != -(-rows // per) or (single and scale.shape[1] != columns):
        raise FormatError(
            f"{prefix}.weight._data._data: found shape {packed.shape}, expected {-(-rows // per)} rows for {rows} scales "
            f"of {bits} bit codes"
        )
    n, k = _shape(prefix, rows, columns, context)
    codes = unpack_slabs(packed, bits, per, high_first=False)
    extras = common.pop("extras")
    if codes[rows:].any():  # bits that hold no code: carried
        extras = {**extras, "weight._data._data": packed}
    if single:
        grouping, shaped = Grouping("block", 0, 1), (1, columns)
    else:
        grouping, shaped = Grouping("block", 1, 0 if k == columns else columns), (n, k // columns)
    return Affine.make(
        codes[:rows].reshape(n, k),
        scale.reshape(shaped),
        zeros=shift.reshape(shaped),
        code_bits=bits,
        grouping=grouping,
        formula="sub_mul" if shift.dtype.kind in "iu" else "mul_sub",
        source=Source("quanto", (("rank", 2), ("columns", columns))),
        extras=extras,
        **common,
    )


def _bits(qtype: str | None, rows: int, packed_rows: int, prefix: str) -> int:
    """Width of packed codes: from the map, or from the rows that a byte must hold."""
    if qtype in ("qint4", "qint2"):
        return int(qtype[-1])
    if qtype is not None:
        raise FormatError(f"{prefix}: the map says {qtype}, but the tensors are those of qint4 or qint2")
    fitting = [bits for bits in (4, 2) if -(-rows // (8 // bits)) == packed_rows]
    if len(fitting) != 1:
        raise FormatError(
            f"{prefix}.weight._data._data: {packed_rows} packed rows for {rows} scales do not tell the bits; "
            f"add {MAP_FILES[0]} with the module's qtype"
        )
    return fitting[0]


def _shape(prefix: str, rows: int, columns: int, context: Context) -> tuple[int, int]:
    """(N, K) of a packed weight, which stores only N * K = rows * columns and the group.

    Raises:
      UnsupportedError: a group smaller than a row, in a module whose in_features the model's config does not tell.
    """
    size = rows * columns
    if columns not in (128, 96, 64, 32):  # never the size of a group
        return rows, columns

    def fits(k: int) -> bool:
        return size % k == 0 and (group_size_of(k) or k) == columns

    bias = context.shapes.get(f"{prefix}.bias")
    if bias is not None and len(bias) == 1 and size % bias[0] == 0 and fits(size // bias[0]):
        return bias[0], size // bias[0]
    k = in_features_of(prefix, size, context.config, fits)
    if k is None:
        raise UnsupportedError(
            f"{prefix}.weight._data._data: quanto stores neither in_features nor the group size; found {rows} rows of "
            f"{columns} codes, and config.json names no dimension of the model that fits this module"
        )
    return size // k, k


def dump(q: Any) -> Parts:
    """The stored tensors of a module."""
    scale, rank = np.asarray(q.scales), q.source.get("rank")
    carried = {k: np.asarray(v) for k, v in q.extras.items()}
    if isinstance(q, NarrowFloat):
        data = np.asarray(q.codes).view(next(d for d, kind in _KINDS.items() if kind == q.kind))
        return {"weight._data": data, "weight._scale": scale.reshape(() if rank == 0 else (-1, 1)), **carried}
    columns = q.source.get("columns")
    if columns is None:
        data = np.asarray(q.unpack()).astype(np.int8)
        return {"weight._data": data, "weight._scale": scale.reshape(() if rank == 0 else (-1, 1)), **carried}
    codes = np.asarray(q.unpack()).reshape(-1, columns)
    packed = pack_slabs(codes, q.code_bits, 8 // q.code_bits, high_first=False)
    shaped = (1, -1) if q.grouping == Grouping("block", 0, 1) else (-1, 1)
    shift = np.asarray(q.zeros)
    return {
        "weight._data._data": packed,
        "weight._scale": scale.reshape(shaped),
        "weight._shift": shift.reshape(shaped),
    } | carried


@dataclasses.dataclass(frozen=True)
class Quanto:
    """optimum-quanto's default quantization, every operation rounded to the weight's dtype.

    Fields:
      weights: "int8", "int4", "int2", "float8" (e4m3fn), "float8_e5m2" or "float8_e4m3fnuz".
      integer_shift: 4 and 2 bit: shifts rounded to integer zero points (quanto's `zeropoint=True`).
    """

    weights: str = "int8"
    integer_shift: bool = False
    format = "quanto"

    @property
    def qtype(self) -> str:
        name = _SHORT.get(self.weights, self.weights if self.weights.startswith("q") else "q" + self.weights)
        if name not in QTYPES:
            raise FormatError(f"Quanto: weights {self.weights!r}; known: {', '.join((*_SHORT, *QTYPES))}")
        return name

    def quantize(self, w: Any, name: str = "weight") -> QTensor:
        """w: float16, bfloat16 or float32 [N, K] -> the tensor that `freeze` would store."""
        w = blocks.weight(w, name)
        qtype, one = self.qtype, np.ones((), w.dtype)
        parts: Parts = {"input_scale": one, "output_scale": one}
        if qtype in ("qint4", "qint2"):
            bits = int(qtype[-1])
            codes, scale, shift = affine_codes(w, bits, integer_shift=self.integer_shift)
            packed = pack_slabs(codes, bits, 8 // bits, high_first=False)
            parts |= {"weight._data._data": packed, "weight._scale": scale, "weight._shift": shift}
        else:
            data, scale = symmetric_codes(w, qtype)
            parts |= {"weight._data": data, "weight._scale": scale}
        shape = Context(shapes={f"{name}.bias": (w.shape[0],)})
        return load(name, parts, Options({name: qtype}, {}), shape)

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config in the words of transformers' QuantoConfig."""
        short = {v: k for k, v in reversed(_SHORT.items())}
        weights = short.get(self.qtype, self.qtype)
        return {"quant_method": "quanto", "weights": weights, "activations": None, "modules_to_not_convert": list(skip)}


FORMAT = Format(
    name="quanto",
    methods=("quanto",),
    title="optimum-quanto: int8, int4, int2, float8",
    parse=parse,
    markers=("weight._scale",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    detect=detect,
    group=group,
    methods_table={"Quanto": Quanto},
)
