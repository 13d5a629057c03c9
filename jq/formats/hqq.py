"""HQQ (half-quadratic quantization): `quant_method: hqq`, and hqq's own `qmodel.pt`.

Source: hqq 0.2.8.post1 (core/quantize.py, core/bitpack.py), 0.1.7 for the nested form; transformers 4.57
(integrations/hqq.py), the last release that wrote these checkpoints.

The row-major weight [N, K] is viewed as a matrix [R, C] of groups: axis 1 gives [N*K/G, G], one group a row; axis 0
gives [G, N*K/G], one group a column, so that the members of a group are N*K/G elements apart. Codes lie in slabs of
rows (`jq.formats.slabs`), the first slab in the highest bits:

| packing | bits | codes a word | W_q |
|---|---|---|---|
| 8bit_u8 (8, 6 and 5 bit) | 8 | 1 | uint8[R, C] |
| 4bit_u8 | 4 | 2 | uint8[R/2, C] |
| 3bit_32 | 3 | 10 | int32[ceil(R/10), C], missing rows 0 |
| 2bit_u8 (2 and 1.58 bit) | 2 | 4 | uint8[R/4, C] |
| 1bit_u8 | 1 | 8 | uint8[R/8, C] |

`view_as_float`: the same bytes viewed as the compute dtype. weight = (dt(code) - zero) * scale, rounded to the compute
dtype dt after each step; scale and zero are [R, 1] (axis 1) or [1, C] (axis 0).

Safetensors form: every attribute is a tensor beside `W_q` (numbers int32, flags uint8, text as uint8 characters).
qmodel.pt is a torch pickle {module: state}; the state is flat (0.2) or nested under "meta" (0.1), where zeros and
scales may themselves be 8-bit codes: `zero_q` + `meta_zero`, `scale_q` + `meta_scale`, or both stacked in `zero_scale`.
It is read only: such a tensor is dumped in the safetensors form, with quantized zeros and scales in the compute dtype
(the weights keep every bit; hqq's safetensors form has no quantized zeros).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.algorithms import blocks
from jq.algorithms.hqq import NBITS, hqq_codes, max_code
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, take, warn_unknown
from jq.formats.hqq_forms import ATTRIBUTES, DTYPES, PACKINGS, TENSORS, Form, as_words, encode, read_form, thawed
from jq.formats.slabs import pack_slabs, unpack_slabs
from jq.qtensor import Affine, Grouping, QTensor, Source

PACKING_OF_NBITS = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}


def parse(config: Mapping[str, Any], context: Context) -> None:
    """Checks quantization_config. Each module's own attributes decide how it is read."""
    known = {"quant_method", "quant_config", "skip_modules", "nbits", "group_size", "quant_zero", "quant_scale", "axis"}
    known |= {"offload_meta", "view_as_float", "dynamic_config"}
    warn_unknown(config, known, context.label)
    quant_config = config.get("quant_config") or {}
    if not isinstance(quant_config, Mapping):
        raise FormatError(f"quantization_config.quant_config: expected an object, found {type(quant_config).__name__}")
    for tag, params in _per_tag(quant_config).items():
        _check_params(params, f"quantization_config.quant_config{tag}")


def _per_tag(quant_config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """weight_quant_params by tag ("" where one holds for all)."""
    if "weight_quant_params" in quant_config:
        return {"": quant_config["weight_quant_params"] or {}}
    return {
        f"[{tag!r}]": (p or {}).get("weight_quant_params") or {}
        for tag, p in quant_config.items()
        if isinstance(p, Mapping)
    }


def _check_params(params: Mapping[str, Any], where: str) -> None:
    nbits, axis, group = params.get("nbits", 4), params.get("axis", 1), params.get("group_size")
    if nbits not in NBITS:
        raise FormatError(f"{where}.nbits: found {nbits!r}, hqq has {', '.join(map(str, NBITS))}")
    if axis not in (0, 1):
        raise FormatError(f"{where}.axis: found {axis!r}, expected 0 or 1")
    if group is not None and (not isinstance(group, int) or group <= 0):
        raise FormatError(f"{where}.group_size: found {group!r}, expected a positive number or null")


def detect(checkpoint: Any) -> dict[str, Any] | None:
    """hqq's own save has no quantization_config: modules with `W_q` are the sign."""
    names = checkpoint.entries
    return {"quant_method": "hqq"} if any(name.endswith(".W_q") for name in names) else None


def group(names: list[str], options: None, context: Context) -> dict[str, dict[str, str]]:
    """Modules are the prefixes of `W_q`; names like "scale" or "shape" mean HQQ only beside one."""
    have = set(names)
    found = {}
    for name in names:
        if name.endswith(".W_q"):
            prefix = name.removesuffix(".W_q")
            wanted = (*TENSORS, *ATTRIBUTES)
            found[prefix] = {s: f"{prefix}.{s}" for s in wanted if f"{prefix}.{s}" in have}
    return found


def load(prefix: str, parts: Parts, options: None, context: Context) -> Affine:
    """One module: its tensors and attributes -> `Affine`."""
    form = read_form(prefix, parts, context)
    codes = _codes(form.w_q, form.packing, form.size, f"{prefix}.W_q")
    matrix = codes.shape  # [R, C]
    n, k = form.shape
    scales = _parameter(form, "scale", prefix)
    zeros = _parameter(form, "zero", prefix)
    grouping, count = _grouping(form, matrix, scales, prefix)
    if zeros.size != scales.size:
        raise FormatError(f"{prefix}.zero: {zeros.size} values, but scale has {scales.size}; the file is damaged")
    bits, per, word = PACKINGS[form.packing]
    same = {str(p.dtype) for p in (scales, zeros)} == {form.dtype}
    q = Affine.make(
        codes.reshape(n, k),
        _shaped(scales, grouping, count),
        zeros=_shaped(zeros, grouping, count),
        code_bits=bits,
        grouping=grouping,
        formula="sub_mul" if same else "cast_sub_mul",
        dtype=form.dtype,
        source=Source("hqq", (*form.attributes, ("rank", _rank(form, scales)), ("view", form.view))),
        name=prefix,
    )
    packed = pack_slabs(codes, bits, per, high_first=True, dtype=word)
    if not np.array_equal(packed, form.w_q):  # bits that hold no code: carried, since another writer may have set them
        q = q.replace(extras={"W_q": form.stored})
    return q


def _codes(w_q: np.ndarray, packing: str, size: int, name: str) -> np.ndarray:
    """Packed words -> uint8 codes [R, C] without padding rows, R * C = size."""
    bits, per, _ = PACKINGS[packing]
    rows, columns = w_q.shape
    if columns == 0 or size % columns or -(-(size // columns) // per) != rows:
        raise FormatError(
            f"{name}: found {rows} x {columns} words of {packing}, which hold {rows * per * columns} codes; "
            f"the weight has {size}"
        )
    return unpack_slabs(w_q, bits, per, high_first=True)[: size // columns]


def _parameter(form: Form, which: str, prefix: str) -> Any:
    """scale or zero: an array, or a nested Affine [1, groups] of 8-bit codes."""
    tensors = form.tensors
    if "zero_scale" in tensors:
        both = tensors["zero_scale"]
        if both.shape[0] != 2:
            raise FormatError(f"{prefix}.zero_scale: found shape {both.shape}, expected (2, ...) = zeros, scales")
        picked = both[0 if which == "zero" else 1]
        tensors = {**tensors, which + ("_q" if both.dtype == np.uint8 else ""): picked}
    if which in tensors:
        array = tensors[which]
        expect_dtype(array, tuple(DTYPES.values()), f"{prefix}.{which}")
        return array
    codes = take(tensors, which + "_q", prefix, why=f"A module has {which}, {which}_q or zero_scale.")
    meta = form.nested[which]
    inner = {k: take(tensors, f"meta_{which}.{k}", prefix) for k in ("scale", "zero")}
    shape = tuple(int(v) for v in meta.get("shape", ()))
    size, packing = math.prod(shape), meta.get("packing", "8bit_u8")
    dtype = str(meta.get("compute_dtype", "torch.float16")).removeprefix("torch.")
    if packing not in PACKINGS or dtype not in DTYPES:
        raise FormatError(f"{prefix}.meta_{which}: unknown packing {packing!r} or compute_dtype {dtype!r}")
    words = as_words(codes.reshape(codes.shape[0], -1), np.dtype(PACKINGS[packing][2]), f"{prefix}.{which}_q")[0]
    unpacked = _codes(words, packing, size, f"{prefix}.{which}_q")
    count = inner["scale"].size
    if count == 1:
        grouping = Grouping("block", 0, 0)
    elif count == unpacked.shape[1 if meta.get("axis", 0) == 0 else 0]:
        grouping = Grouping("strided" if meta.get("axis", 0) == 0 else "flat", 0, size // count)
    else:
        raise FormatError(f"{prefix}.meta_{which}.scale: {count} values for codes of {unpacked.shape}")
    return Affine.make(
        unpacked.reshape(1, size),
        _shaped(inner["scale"], grouping, (1, 1)),
        zeros=_shaped(inner["zero"], grouping, (1, 1)),
        code_bits=PACKINGS[packing][0],
        grouping=grouping,
        formula="cast_sub_mul",
        dtype=dtype,
        name=f"{prefix}.{which}_q",
    )


def _shaped(param: Any, grouping: Grouping, block: tuple[int, int]) -> Any:
    """A parameter in the shape that `Affine` holds for a grouping."""
    if isinstance(param, QTensor):
        return param
    return param.reshape(block) if grouping.kind == "block" else param.reshape(-1)


def _grouping(form: Form, matrix: tuple[int, int], scales: Any, prefix: str) -> tuple[Grouping, tuple[int, int]]:
    """Where the groups lie, and the shape of block parameters."""
    n, k = form.shape
    rows, columns = matrix
    if (
        scales.size == 1 and rows * columns > 1 and (form.axis == 1) == (rows > 1)
    ):  # not channel_wise: one scale for all
        return Grouping("block", 0, 0), (1, 1)
    size = columns if form.axis == 1 else rows
    if scales.size != rows * columns // size or (form.group_size is not None and form.group_size != size):
        raise FormatError(
            f"{prefix}.scale: {scales.size} values for codes of {rows} x {columns} with axis {form.axis} and group_size "
            f"{form.group_size}; expected {rows * columns // size} groups of {size}"
        )
    if form.axis == 0:
        return Grouping("strided", 0, size), (0, 0)
    if k % size == 0 and not isinstance(scales, QTensor):
        return Grouping("block", 1, 0 if size == k else size), (n, k // size)
    return Grouping("flat", 0, size), (0, 0)


def _rank(form: Form, scales: Any) -> str:
    """How the safetensors form shapes scale and zero."""
    if not isinstance(scales, QTensor) and scales.ndim == 0:
        return "scalar"
    return "column" if form.axis == 1 else "row"


def dump(q: Affine) -> Parts:
    """The safetensors form of a module."""
    assert q.source is not None
    options = dict(q.source.options)
    attributes = {k: thawed(options[k]) for k in ATTRIBUTES if k in options}
    packing = bytes(attributes["packing"]).decode("latin-1")
    bits, per, word = PACKINGS[packing]
    n, k = q.shape
    scale, zero = (_dense_parameter(p, options["rank"], q.dtype) for p in (q.scales, q.zeros))
    parts: Parts = {"W_q": np.asarray(q.extras["W_q"])} if "W_q" in q.extras else {}
    if not parts:
        columns = _columns(q, int(np.asarray(attributes["axis"]).item()), scale.size)
        codes = np.asarray(q.unpack()).reshape(-1, columns)
        packed = pack_slabs(codes, bits, per, high_first=True, dtype=word)
        parts["W_q"] = packed.view(
            DTYPES[options["view"]] if options["view"] else np.int32 if word is np.uint32 else word
        )
    parts |= {"scale": scale, "zero": zero, "shape": np.array([n, k], np.int64)}
    return parts | attributes


def _columns(q: Affine, axis: int, groups: int) -> int:
    """Columns C of the grouped matrix."""
    n, k = q.shape
    if q.grouping == Grouping("block", 0, 0):
        return k
    return n * k // groups if axis == 1 else groups


def _dense_parameter(param: Any, rank: str, dtype: str) -> np.ndarray:
    value = np.asarray(param.dequantize(dtype)) if isinstance(param, QTensor) else np.asarray(param)
    return value.reshape({"scalar": (), "column": (-1, 1), "row": (1, -1)}[rank])


def build(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, shape: tuple[int, int], params: Mapping[str, Any], name: str
) -> Affine:
    """A module of its own from codes in the grouped order.

    Args:
      codes: integer[R, C].
      scale, zero: float [R, 1] (axis 1) or [1, C] (axis 0), in the compute dtype.
      shape: (N, K).
      params: hqq's weight_quant_params.
      name: for messages.
    """
    packing = PACKING_OF_NBITS[params["nbits"]]
    bits, per, word = PACKINGS[packing]
    packed = pack_slabs(codes, bits, per, high_first=True, dtype=word)
    parts: Parts = {
        key: thawed(v) for key, v in encode({**params, "packing": packing, "compute_dtype": f"torch.{scale.dtype}"})
    }
    if params["view_as_float"]:
        parts["W_q"] = packed.view(scale.dtype)
    else:
        parts["W_q"] = packed.view(np.int32) if word is np.uint32 else packed
    parts |= {"scale": scale, "zero": zero, "shape": np.array(shape, np.int64)}
    return load(name, parts, None, Context())


@dataclasses.dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantization, without data (Badri and Shaji 2023; hqq 0.2.8 on the CPU).

    Fields:
      bits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
      group_size: weights that share scale and zero; None for a row (axis 1) or a column (axis 0).
      axis: 1: groups lie along a row; 0: members of a group are N*K/group_size elements apart.
      optimize: refine the zeros by the half-quadratic solver; False is plain min-max rounding.
      round_zero: round the zeros before the solver; None as hqq does (4 bit only).
      view_as_float: store the packed bytes under the weight's dtype.
    """

    bits: float = 4
    group_size: int | None = 64
    axis: int = 1
    optimize: bool = True
    round_zero: bool | None = None
    view_as_float: bool = False
    format = "hqq"

    def quantize(self, w: Any, name: str = "weight") -> Affine:
        """w: float[N, K] in the model's dtype, which scales and zeros are rounded to.

        Raises:
          FormatError: a group size that does not divide N*K, or rows that do not fill a word.
        """
        w = blocks.weight(w, name)
        params = self._params()
        _check_params(params, name)
        n, k = w.shape
        size = self.group_size or (k if self.axis == 1 else n)
        packing = PACKING_OF_NBITS[self.bits]
        rows = n * k // size if self.axis == 1 else size
        if n * k % size or (packing != "3bit_32" and rows % PACKINGS[packing][1]):
            raise FormatError(
                f"{name}: groups of {size} of a ({n}, {k}) weight with axis {self.axis} give {n * k / size:g} groups; "
                f"{packing} needs whole groups and a multiple of {PACKINGS[packing][1]} rows. Choose another group_size"
            )
        codes, scale, zero = hqq_codes(
            w.astype(np.float32).reshape((-1, size) if self.axis == 1 else (size, -1)),
            top=max_code(self.bits), axis=self.axis, round_zero=params["round_zero"], optimize=self.optimize,
        )  # fmt: skip
        return build(
            codes, scale.astype(w.dtype), zero.astype(w.dtype), (n, k), {**params, "group_size": size}, name=name
        )

    def _params(self) -> dict[str, Any]:
        rounds = self.bits == 4 if self.round_zero is None else self.round_zero
        return {
            "nbits": self.bits, "channel_wise": True, "group_size": self.group_size, "optimize": self.optimize,
            "round_zero": rounds, "axis": self.axis, "view_as_float": self.view_as_float,
        }  # fmt: skip

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of transformers 4.57."""
        quant_config = {
            "weight_quant_params": self._params(),
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }
        return {"quant_config": quant_config, "quant_method": "hqq", "skip_modules": list(skip)}


FORMAT = Format(
    name="hqq",
    methods=("hqq",),
    title="HQQ: float zeros, 8 to 1 bit, groups along either axis",
    parse=parse,
    markers=("W_q",),
    suffixes=("W_q", "zero_q", "scale_q", "zero_scale", "meta.zero_q", "meta.scale_q", "meta.zero_scale"),
    load=load,
    dump=dump,
    detect=detect,
    group=group,
    methods_table={"HQQ": HQQ},
)
