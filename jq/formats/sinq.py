"""SINQ: HQQ's packing with 8-bit scales and zeros, and a second scale for each input.

    W_q            uint8 or int32 (3, 5 and 6 bits): codes [N*K/G, G] in slabs of rows, the first slab in the high bits
    meta.scale.x   uint8 [32, C], C = N*K/G / 32, with meta.scale.s and meta.scale.m float16 [1, C]; flattened, one scale
                   for each group. Without quantized scales: meta.scale float16 [N*K/G, 1]
    meta.zero.x    uint8 [N*K/G, 1], with meta.zero.s and meta.zero.m float16 [1, 1]; or meta.zero
    meta.scale2    float16 [1, K]; with two-dimensional tiles float16 [T, 1, G], tile (i, j) of GxG at i * K/G + j, and
                   scales and zeros (in x; plain float16 [T, G, 1]) in the order (tile, row of the tile)
    meta.awq_scale carried where it is there; it takes no part in dequantization
Where group_size does not divide in_features, SINQ halves it until it does: the width of W_q tells.

Dequantize: scale = float16(x * s) + m and zero alike; dt((q - zero) * scale * scale2) where a model of bfloat16 or
float32 computes in float32 with three roundings and one of float16 in float16. Methods of SINQ's own interface: "nf4" and
"nf3" look the codes up in a table and compute in float16, "noz" has one zero for the whole matrix. Plain values (shape,
packing, method) lie in model.safetensors.index.json.meta.json, which is kept as it is and which stands for the
quantization_config where SINQ itself saved the model.

Quantize: `jq.algorithms.sinq`, from the weight in float16, a tile for each group of columns.

Source: sinq 0.2.0 (sinqlinear_hf.py, quantizer.py, patch_model.py), whose layer runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.algorithms import blocks
from jq.algorithms import sinq as algorithm
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.formats.layer_shapes import in_features_of
from jq.formats.slabs import pack_slabs, unpack_slabs
from jq.qtensor import Affine, Grouping, Source
from jq.qtensor.scaled import Scaled, Tiles

HALF = np.dtype(np.float16)
TILE = 32  # scales that share s and m lie C apart: x has this many rows
# bits -> (codes of a word, stored dtype)
PACKING = {
    8: (1, np.uint8),
    6: (5, np.int32),
    5: (6, np.int32),
    4: (2, np.uint8),
    3: (10, np.int32),
    2: (4, np.uint8),
    1: (8, np.uint8),
}
TABLES = {"nf4": (4, "nf4_sub_mul"), "nf3": (3, "nf3_sub_mul")}  # least width, formula
SIDE_FILE = "model.safetensors.index.json.meta.json"
QUANTIZED = tuple(f"meta.{name}.{part}" for name in ("scale", "zero") for part in "xsm")
SUFFIXES = ("W_q", "meta.scale", "meta.zero", "meta.scale2", "meta.awq_scale", *QUANTIZED)
PLAIN = ("nbits", "group_size", "method")
KNOWN = ("quant_method", "nbits", "group_size", "tiling_mode", "method", "modules_to_not_convert", "_extra_kwargs")


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the model: width, group size and, for table codes, the formula."""

    bits: int = 4
    group_size: int = 64
    formula: str = ""


def detect(checkpoint: Any) -> dict | None:
    """The config of a model that SINQ itself saved, from the plain values of its first layer."""
    found = checkpoint.side_json(SIDE_FILE)
    metas = [v.get("meta") for v in found.values() if isinstance(v, Mapping)] if found else []
    meta = next((m for m in metas if isinstance(m, Mapping) and "nbits" in m), None)
    return (
        None
        if meta is None
        else {"quant_method": "sinq", **{k: meta[k] for k in ("nbits", "group_size", "method") if k in meta}}
    )


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: a width or group size that SINQ does not have.
    """
    warn_unknown(config, KNOWN, context.label)
    label = f"{context.label}: quantization_config"
    bits, group = config.get("nbits", 4), config.get("group_size", 64)
    bits = 2 if bits == 1.58 else bits
    if type(bits) is not int or bits not in PACKING:
        raise FormatError(f"{label}.nbits is {bits!r}, expected one of {sorted(PACKING)}")
    if type(group) is not int or group < 1:
        raise FormatError(f"{label}.group_size is {group!r}, expected a positive integer")
    if config.get("tiling_mode", "1D") not in ("1D", "2D"):
        raise FormatError(f"{label}.tiling_mode is {config['tiling_mode']!r}, expected '1D' or '2D'")
    method = str(config.get("method", "sinq")).lower()
    table = next((t for t in TABLES if t in method), None)
    if table and bits < TABLES[table][0]:
        raise FormatError(f"{label}.nbits is {bits}, which does not hold the codes of method {method!r}")
    return Options(bits, group, TABLES[table][1] if table else "")


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Scaled:
    """One module's tensors as an `Affine` with nested scales and zeros, times the scale of each input.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
    """
    own = {k: context.objects[f"{prefix}.meta.{k}"] for k in PLAIN if f"{prefix}.meta.{k}" in context.objects}
    o = parse(own, context) if len(own) == len(PLAIN) else options  # SINQ itself may mix widths and methods
    per, dtype = PACKING[o.bits]
    words, second = take(parts, "W_q", prefix), take(parts, "meta.scale2", prefix)
    expect_dtype(words, (dtype,), f"{prefix}.W_q")
    expect_dtype(second, (HALF,), f"{prefix}.meta.scale2")
    group = words.shape[1] if words.ndim == 2 else 0
    tiled = second.ndim == 3
    row = (second.shape[0] if tiled else 1, 1, group if tiled else second.shape[-1])
    narrow = not tiled and _narrowed(o.group_size, second.shape[-1]) == group
    if not group or not (group == o.group_size or narrow) or second.shape not in (row, row[1:]):
        raise FormatError(
            f"{prefix}.W_q: found shape {tuple(words.shape)} with meta.scale2 of {tuple(second.shape)}, expected "
            f"(rows, {o.group_size}) and (1, in_features) or (tiles, 1, {o.group_size}); check "
            "quantization_config.group_size"
        )
    groups = parts["meta.scale.x" if "meta.scale.x" in parts else "meta.scale"].size if _has_scale(parts) else 0
    k = _tiled_inputs(prefix, groups * group, group, context) if tiled else second.shape[1]
    whole = k % group == 0 and groups > 0 and groups * group % k == 0
    if not whole or -(-groups // per) != words.shape[0] or (tiled and second.shape[0] * group != groups):
        raise FormatError(
            f"{prefix}.W_q: {words.shape[0]} rows of {per} slabs, {groups} scales and {k} inputs in groups of "
            f"{group} do not fit together; check nbits and group_size of quantization_config"
        )
    n = groups * group // k
    unsigned = np.ascontiguousarray(words).view(np.uint32 if dtype is np.int32 else np.uint8)
    codes = unpack_slabs(unsigned, o.bits, per, high_first=True)[:groups].reshape(n, k)
    tile = group if tiled else 0
    half = context.model_dtype == "float16" or bool(o.formula)
    base = Affine.make(
        codes,
        _parameter(prefix, parts, "scale", n, k // group, TILE, tile),
        code_bits=o.bits,
        name=prefix,
        zeros=_parameter(prefix, parts, "zero", n, k // group, groups, tile),
        grouping=Grouping("block", 1, group),
        formula=o.formula or ("sub_mul" if half else "f32"),
        dtype="float16" if half else "float32",
    )
    quantized = tuple(name for name in ("scale", "zero") if f"meta.{name}.x" in parts)
    extras = {"meta.awq_scale": parts["meta.awq_scale"]} if "meta.awq_scale" in parts else {}
    made = Scaled(
        base,
        second.reshape(-1, k) if tiled else second.reshape(-1),
        extras,
        dtype=context.model_dtype,
        source=Source(
            "sinq", (("quantized", quantized), ("zero_rank", parts["meta.zero"].ndim if "meta.zero" in parts else 0))
        ),
    )
    made.check(prefix)
    again = dump(made)["W_q"]
    if again.tobytes() != np.ascontiguousarray(words).tobytes():
        raise FormatError(f"{prefix}.W_q: bits behind the last code are set; the file is damaged")
    return made


def _narrowed(group: int, inputs: int) -> int:
    """The group size that SINQ takes where `group` does not divide the inputs."""
    while group >= 16 and inputs % group:
        group //= 2
    return group


def _tiled_inputs(prefix: str, size: int, tile: int, context: Context) -> int:
    """in_features of a matrix of square tiles, which its tensors do not tell.

    Raises:
      FormatError: neither the file of plain values nor the model's config tells it.
    """
    shape = context.objects.get(f"{prefix}.meta.shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(v) is int and v > 0 for v in shape):
        return shape[1]
    found = in_features_of(prefix, size, context.config, lambda k: k % tile == 0 and size // k % tile == 0)
    if found is None:
        raise FormatError(
            f"{prefix}.W_q: {size} weights in tiles of {tile}x{tile}, but neither {SIDE_FILE} nor config.json tells "
            "in_features"
        )
    return found


def _has_scale(parts: Parts) -> bool:
    return "meta.scale.x" in parts or "meta.scale" in parts


def _parameter(prefix: str, parts: Parts, name: str, n: int, columns: int, rows: int, tile: int) -> Any:
    """Scales or zeros [N, K/G], or [1, 1]: float16, or a nested `Affine` of bytes stored as [rows, C]."""
    plain = f"meta.{name}.x" not in parts
    stored = take(parts, f"meta.{name}" if plain else f"meta.{name}.x", prefix)
    label = f"{prefix}.meta.{name}" + ("" if plain else ".x")
    expect_dtype(stored, (HALF if plain else np.uint8,), label)
    count = n * columns
    if name == "zero" and stored.size == 1:  # "noz": one number for the whole matrix
        n, columns, count, rows, tile = 1, 1, 1, 1, 0
    if plain:
        shapes = ((count // tile, tile, 1),) if tile else ((count, 1), *(((),) if count == 1 else ()))
        if stored.shape not in shapes:
            expect_shape(stored, shapes[0], label, "one for each group")
        value: Any = stored.reshape(1, -1) if tile else stored.reshape(n, columns)
        return Tiles(value, tile, columns) if tile else value
    if count % rows:
        raise FormatError(f"{label}: {count} groups do not make {rows} rows")
    expect_shape(stored, (rows, count // rows), label, f"{count} groups in {rows} rows")
    steps = []
    for part in "sm":
        step = take(parts, f"meta.{name}.{part}", prefix)
        expect_dtype(step, (HALF,), f"{prefix}.meta.{name}.{part}")
        expect_shape(step, (1, count // rows), f"{prefix}.meta.{name}.{part}", "one for each column of x")
        steps.append(step.reshape(-1) if count > rows else step.reshape(1, 1))
    grouping = Grouping("strided", 0, rows) if count > rows else Grouping("block", 0, 0)
    made = Affine.make(
        stored.reshape((1, count) if tile else (n, columns)),
        steps[0],
        code_bits=8,
        name=f"{prefix}.meta.{name}",
        zeros=steps[1],
        grouping=grouping,
        formula="mul_add",
        dtype="float16",
    )
    return Tiles(made, tile, columns) if tile else made


def dump(q: Scaled) -> Parts:
    """Stored tensors of a module."""
    base = q.base
    assert q.source is not None
    per, dtype = PACKING[base.code_bits]
    group = base.grouping.cols
    codes = np.asarray(base.unpack()).reshape(-1, group)
    unsigned = np.uint32 if dtype is np.int32 else np.uint8
    second = np.asarray(q.column_scale)
    found: Parts = {
        "W_q": pack_slabs(codes, base.code_bits, per, high_first=True, dtype=unsigned).view(dtype),
        "meta.scale2": second.reshape((1, -1) if second.ndim == 1 else (-1, 1, group)),
    }
    for name, value in (("scale", base.scales), ("zero", base.zeros)):
        tile = value.rows if isinstance(value, Tiles) else 0
        value = value.base if isinstance(value, Tiles) else value
        if not isinstance(value, Affine):
            stored = np.asarray(value)
            scalar = name == "zero" and q.source.get("zero_rank") == 0
            found[f"meta.{name}"] = stored.reshape((-1, tile, 1) if tile else () if scalar else (-1, 1))
            continue
        steps = np.asarray(value.scales).size
        raw = _bits.unpack(np.asarray(value.codes), 8, value.shape[-1]).astype(np.uint8)
        found[f"meta.{name}.x"] = raw.reshape(-1, steps)
        found[f"meta.{name}.s"] = np.asarray(value.scales).reshape(1, -1)
        found[f"meta.{name}.m"] = np.asarray(value.zeros).reshape(1, -1)
    return {**found, **{k: np.asarray(v) for k, v in q.extras.items()}}


def beside_weights(tensors: Mapping[str, Any]) -> dict[str, bytes]:
    """The file of plain values, without which SINQ's own loader does not find shapes and packing.

    That loader wants an entry for every module that holds parameters or buffers. Rotary embeddings have buffers and no
    stored tensor: an empty entry lets the module keep those that it computed.
    """
    made: dict[str, Any] = {}
    for key in tensors:
        value, name = tensors[key], key.removesuffix(".weight")
        if isinstance(value, Scaled) and value.source is not None and value.source.format == "sinq":
            made[name] = {"meta": _plain(value)}
    blocks = sorted({name[: name.index(".layers.")] for name in made if ".layers." in name})
    made |= {f"{parent}.rotary_emb": {} for parent in blocks}
    return {SIDE_FILE: json.dumps(made).encode()} if made else {}


def _plain(q: Scaled) -> dict[str, Any]:
    """What `Quantizer.quantize` of SINQ keeps of a layer beside its tensors, in its order."""
    parts, bits = dump(q), q.base.code_bits
    _, dtype = PACKING[bits]
    group = q.base.grouping.cols
    count = q.shape[0] * q.shape[1] // group
    tiled = parts["meta.scale2"].ndim == 3
    plain: dict[str, Any] = {"nbits": bits, "group_size": group, "shape": list(q.shape)}
    if "meta.scale.x" in parts:
        plain["scale.shape"] = [count // group, group, 1] if tiled else [count, 1]
    plain["awq_scale"] = None
    if "meta.zero.x" in parts:
        plain["zero.shape"] = [count // group, group, 1] if tiled else [count, 1]
    word = "32" if dtype is np.int32 else "u8"
    return plain | {
        "axis": 1,
        "packing": f"{bits}bit_{word}",
        "method": "sinq_quantAux" if "meta.scale.x" in parts else "sinq",
        "compute_dtype": f"torch.{q.dtype}",
        "unpack_view_dtype": f"torch.{np.dtype(dtype)}",
        "view_as_float": False,
    }


@dataclasses.dataclass(frozen=True)
class SINQ:
    """SINQ without activations (`method: "sinq"`): codes those of the library on a CPU.

    torch's exponentials and logarithms are not always correctly rounded, so a code may differ where a quotient is a tie:
    none of 1,441,792 over 16 random matrices, one of 8,192 of a matrix full of ties.

    Fields:
      bits: 8, 6, 5, 4, 3, 2 or 1.
      group_size: inputs that share a scale, a multiple of 8; halved, down to 16, where it does not divide in_features.
      tiling_mode: "1D" (tiles of all outputs) or "2D" (squares of group_size, which must divide both sizes).
    """

    bits: int = 4
    group_size: int = 64
    tiling_mode: str = "1D"
    format = "sinq"

    def quantize(self, w: Any, name: str = "weight") -> Scaled:
        """w: float[N, K] -> codes, 8-bit scales and zero points; `dequantize()` gives w's dtype.

        Raises:
          FormatError: an option or a size that SINQ does not have.
          ValueError: scales or zero points that float16 does not hold.
        """
        options = parse(self.config(), Context(label=name))
        w = blocks.weight(w, name)
        tiled = self.tiling_mode == "2D"
        group = self.group_size if tiled else _narrowed(self.group_size, w.shape[1])
        cut = not w.shape[1] % group and not (tiled and w.shape[0] % group)
        if not cut or self.group_size % 8 or (group < 16 and group != self.group_size) or w.size // group % TILE:
            squares = (
                f"squares of {group} that divide both sizes" if tiled else f"groups of {group} that divide in_features"
            )
            raise FormatError(
                f"{name}: found shape {w.shape}; SINQ needs {squares} (a multiple of 8), and a number of groups that "
                f"{TILE} divides"
            )
        half = w.astype(HALF)
        height = group if tiled else w.shape[0]
        wide = w.shape[1] // group
        squares = half.reshape(-1, height, wide, group).swapaxes(1, 2).reshape(-1, height, group)
        made = algorithm.quantize(np.ascontiguousarray(squares), self.bits, plain=algorithm.heavy_tailed(half))
        codes = made[0].reshape(-1, wide, height, group).swapaxes(1, 2).reshape(-1, group)
        scale, zero = (a if tiled else a.swapaxes(0, 1) for a in made[1:3])
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise ValueError(f"{name}: scales or zero points overflow float16, in which SINQ keeps them")
        per, dtype = PACKING[self.bits]
        unsigned = np.uint32 if dtype is np.int32 else np.uint8
        parts: Parts = {
            "W_q": pack_slabs(codes, self.bits, per, high_first=True, dtype=unsigned).view(dtype),
            "meta.scale2": made[3] if tiled else made[3].reshape(1, -1),
        }
        for key, value, rows in (("scale", scale, TILE), ("zero", zero, zero.size)):
            for part, array in zip("xsm", algorithm.bytes_of(value, rows), strict=True):
                parts[f"meta.{key}.{part}"] = array
        sizes = {f"{name}.meta.shape": list(w.shape)}
        return load(name, parts, options, Context({"dtype": str(w.dtype)}, objects=sizes, label=name))

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "sinq",
            "nbits": self.bits,
            "group_size": self.group_size,
            "tiling_mode": self.tiling_mode,
            "method": "sinq",
            "modules_to_not_convert": list(skip) if skip else None,
        }


FORMAT = Format(
    name="sinq",
    methods=("sinq",),
    title="SINQ: 8-bit scales and zeros, a second scale for inputs",
    parse=parse,
    markers=("W_q",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    detect=detect,
    beside_weights=beside_weights,
    methods_table={"SINQ": SINQ},
)
