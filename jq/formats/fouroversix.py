"""Four Over Six: NVFP4 whose blocks of 16 reach to 6 or to 4, whichever is closer, or MXFP4.

    quantized_weight_values         uint8 [N', K'/2], two e2m1 codes a byte, low nibble first
    quantized_weight_scale_factors  float8_e4m3fn [N' * K'/16], in the order of Blackwell's tensor cores, or [N', K'/16];
                                    MXFP4: float8_e8m0fnu for blocks of 32
    quantized_weight_amax           float32, one value (MXFP4: 1, not used)
    quantized_weight_metadata       int32 or int64 [6]: N, K, N', K', 1, whether scales are in Blackwell's order

With `keep_master_weights` a module has only its float weight [N, K], which the library quantizes at every call.

N' and K' are N and K padded with zeros to multiples of 128 and of four blocks. Dequantize: NVFP4
dt(float32(code * scale) * amax / top), top = 6 * 256 for the adaptive rules, 6 * 448 for "static_6", 4 * 448 for
"static_4"; MXFP4 dt(float16(code * scale)), static rules alone. The library quantizes activations
the same way (`jq.activation_schemes.fouroversix`). Quantize: `jq.algorithms.fouroversix`.

Source: github.com/mit-han-lab/fouroversix of 2026-04 (model/modules/linear.py, quantize/backend.py); no file of it was at
hand, its PyTorch code runs on a CPU. Its other dtypes (if4, nvint4, ...), which transformers does not name, are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import blocks
from jq.algorithms import fouroversix as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import (
    Context,
    Format,
    Parts,
    expect_dtype,
    expect_one,
    expect_shape,
    group_by_prefix,
    take,
    true_or_false,
    warn_unknown,
)
from jq.qtensor import Grouping, NarrowFloat, Source
from jq.qtensor.affine import check_finite
from jq.qtensor.narrow_float import check_bits

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
VALUES, SCALES, AMAX, METADATA = (
    f"quantized_weight_{name}" for name in ("values", "scale_factors", "amax", "metadata")
)
# dtype -> (block, dtype of the stored scales, scale_kind)
DTYPES: dict[str, tuple[int, np.dtype, str]] = {
    "nvfp4": (algorithm.BLOCK, E4M3, "e4m3"),
    "mxfp4": (algorithm.MX_BLOCK, np.dtype(ml_dtypes.float8_e8m0fnu), "e8m0"),
}
FLOATS = ("float16", "bfloat16", "float32")
SCALE_DTYPES = {kind: dtype for _, dtype, kind in DTYPES.values()}
TOPS = {rule: top * scale for rule, (top, scale) in algorithm.LIMITS.items()}
KNOWN = {
    *("quant_method", "activation_dtype", "activation_scale_rule", "dtype", "gradient_dtype", "gradient_scale_rule"),
    *("keep_master_weights", "matmul_backend", "output_dtype", "quantize_backend", "scale_rule", "weight_dtype"),
    *("weight_scale_2d", "weight_scale_rule", "module_config_overrides", "modules_to_not_convert"),
}


@dataclasses.dataclass(frozen=True)
class Module:
    """Settings of one module: (dtype, scale rule) of its weight and of its inputs, dtype of results.

    `master`: the file has the float weight, which is quantized at every call, with scales of squares if `square`.
    """

    weight: tuple[str, str]
    inputs: tuple[str, str]
    dtype: str
    master: bool = False
    square: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """Dtypes and scale rules of weights and of activations and the dtype of results; by module where overridden."""

    default: Module
    overrides: Mapping[str, Module]
    skip: tuple[str, ...] = ("lm_head",)

    def of(self, prefix: str) -> Module:
        return self.overrides.get(prefix, self.default)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: an unknown rule.
      UnsupportedError: another dtype than nvfp4 and mxfp4.
    """
    label = f"{context.label}: quantization_config"
    warn_unknown(config, KNOWN, context.label)
    overrides = config.get("module_config_overrides") or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(v, Mapping) for v in overrides.values()):
        raise FormatError(f"{label}.module_config_overrides must map modules to settings")
    # A module with settings of its own has the defaults for the others, not the model's.
    own = {name: _module(f"{label}.module_config_overrides[{name!r}]", v) for name, v in overrides.items()}
    skip = config.get("modules_to_not_convert", ["lm_head"]) or ()
    return Options(_module(label, config), own, tuple(map(str, skip)))


def _module(label: str, config: Mapping[str, Any]) -> Module:
    sides = []
    for side in ("weight", "activation"):
        dtype = config.get(f"{side}_dtype") or config.get("dtype") or "nvfp4"
        rule = config.get(f"{side}_scale_rule") or config.get("scale_rule") or "mse"
        if dtype not in DTYPES:
            raise UnsupportedError(f"{label}: {side} dtype {dtype!r} is not read, nvfp4 and mxfp4 are")
        if rule not in TOPS:
            raise FormatError(f"{label}: scale_rule {rule!r}, expected one of {', '.join(TOPS)}")
        if dtype == "mxfp4" and not str(rule).startswith("static"):
            raise FormatError(f"{label}: {side} scale_rule {rule!r}; mxfp4 has static_6 and static_4 alone")
        sides.append((str(dtype), str(rule)))
    flags = (true_or_false(config, key, label, default=False) for key in ("keep_master_weights", "weight_scale_2d"))
    output = config.get("output_dtype") or "bfloat16"
    if output not in FLOATS:
        raise FormatError(f"{label}: output_dtype {output!r}, expected one of {', '.join(FLOATS)}")
    return Module(sides[0], sides[1], str(output), *flags)


def to_blocked(scales: np.ndarray) -> np.ndarray:
    """[N', K'/block] -> one axis, 128 x 4 blocks as Blackwell's tensor cores read them: row r of a block at (r % 32, r // 32)."""
    rows, columns = scales.shape
    blocks = scales.reshape(rows // 128, 4, 32, columns // 4, 4)
    return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1, 4)).reshape(-1)


def from_blocked(stored: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of `to_blocked`."""
    blocks = stored.reshape(rows // 128, columns // 4, 32, 4, 4)
    return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1, 4)).reshape(rows, columns)


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules with quantized tensors, and every matrix that is quantized at run time: all but embeddings and skipped ones."""
    found = group_by_prefix(names, (VALUES,), (VALUES, SCALES, AMAX, METADATA))
    for name in names:
        prefix = name.removesuffix(".weight")
        last = prefix.rpartition(".")[2]
        if prefix == name or prefix in options.skip or "emb" in last or last in ("wte", "wpe", "shared"):
            continue
        if options.of(prefix).master and len(context.shapes[name]) == 2 and str(context.dtypes[name]) in FLOATS:
            found[prefix] = {"weight": name}
    return found


def load(prefix: str, parts: Parts, options: Options, context: Context) -> NarrowFloat:
    """One module's tensors as a `NarrowFloat`; master weights are quantized here, once.

    Raises:
      FormatError: missing tensors, shapes that disagree with the stored metadata.
    """
    if "weight" in parts:
        own = options.of(prefix)
        maker = FourOverSix(own.weight[1], own.square, own.weight[0])
        quiet = dataclasses.replace(own, master=False)
        made = load(prefix, maker.stored(parts["weight"], prefix), Options(quiet, {}), context)
        return made.replace(extras={"weight": parts["weight"]})
    values, stored = take(parts, VALUES, prefix), take(parts, SCALES, prefix)
    amax, metadata = take(parts, AMAX, prefix), take(parts, METADATA, prefix)
    expect_dtype(values, (np.uint8,), f"{prefix}.{VALUES}")
    module = options.of(prefix)
    block, scale_dtype, scale_kind = DTYPES[module.weight[0]]
    expect_dtype(stored, (scale_dtype,), f"{prefix}.{SCALES}")
    expect_dtype(amax, (np.float32,), f"{prefix}.{AMAX}")
    expect_dtype(metadata, (np.int32, np.int64), f"{prefix}.{METADATA}")
    expect_shape(metadata, (6,), f"{prefix}.{METADATA}", "sizes, padded sizes and flags")
    expect_one(amax, f"{prefix}.{AMAX}")
    check_finite(amax, f"{prefix}.{AMAX}")
    n, k, rows, columns, _, blocked = (int(v) for v in metadata)
    if not (0 < n <= rows < 1 << 31 and 0 < k <= columns < 1 << 31) or rows % 128 or columns % (4 * block) or k % block:
        raise FormatError(
            f"{prefix}.{METADATA}: sizes ({n}, {k}) padded to ({rows}, {columns}) make no {module.weight[0].upper()} weight"
        )
    expect_shape(values, (rows, columns // 2), f"{prefix}.{VALUES}", "padded sizes of the metadata")
    flat = (rows * columns // block,)
    if tuple(stored.shape) != flat:
        expect_shape(stored, (rows, columns // block), f"{prefix}.{SCALES}", f"padded sizes of the metadata, or {flat}")
    whole = np.ascontiguousarray(stored).view(np.uint8)
    grid = whole.reshape(rows, -1) if blocked != 1 else from_blocked(whole.reshape(-1), rows, columns // block)
    nv = scale_kind == "e4m3"
    if not nv:
        check_bits(grid[:n, : k // block], (255,), f"{prefix}.{SCALES}")
    made = NarrowFloat(
        _bits.as_words(values[:n, : k // 2]),
        np.ascontiguousarray(grid[:n, : k // block]),
        amax if nv else None,
        {METADATA: metadata} if nv else {METADATA: metadata, AMAX: amax},
        kind="e2m1",
        scale_kind=scale_kind,
        grouping=Grouping("block", 1, block),
        formula=f"amax_{TOPS[module.weight[1]]}" if nv else "half",
        dtype=module.dtype,
        activation=Activation("fouroversix", (), (("dtype", module.inputs[0]), ("rule", module.inputs[1]))),
        source=Source("fouroversix", (("flat", stored.ndim == 1),)),
    )
    made.check(prefix)
    again = dump(made)
    kept = {name: parts[name] for name in (VALUES, SCALES) if again[name].tobytes() != parts[name].tobytes()}
    return made.replace(extras={**made.extras, **kept}) if kept else made  # a kernel that left bytes in the padding


def dump(q: NarrowFloat) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    if "weight" in q.extras:
        return {"weight": np.asarray(q.extras["weight"])}
    metadata = np.asarray(q.extras[METADATA])
    n, k, rows, columns, _, blocked = (int(v) for v in metadata)
    codes = np.ascontiguousarray(np.asarray(q.codes)).view(np.uint8)
    block = q.grouping.cols
    grid = np.pad(np.asarray(q.scales), [(0, rows - n), (0, (columns - k) // block)])
    scales = to_blocked(grid) if blocked == 1 else grid
    found = {
        VALUES: np.pad(codes, [(0, rows - n), (0, (columns - k) // 2)]),
        SCALES: scales.reshape(-1 if q.source.get("flat") else grid.shape).view(SCALE_DTYPES[q.scale_kind]),
    }
    if q.global_scale is not None:
        found[AMAX] = np.asarray(q.global_scale)
    return {**found, **{name: np.asarray(array) for name, array in q.extras.items()}}


@dataclasses.dataclass(frozen=True)
class FourOverSix:
    """NVFP4 with adaptive block scales; codes those of the library's PyTorch code (see `jq.algorithms.fouroversix`).

    Fields:
      scale_rule: "mse", "mae" or "abs_max" choose 6 or 4 for each block by that error; "static_6", "static_4" do not.
      weight_scale_2d: scales of 16 x 16 blocks.
      dtype: "nvfp4", or "mxfp4" (static rules alone, blocks of 32).
    """

    scale_rule: str = "mse"
    weight_scale_2d: bool = False
    dtype: str = "nvfp4"
    format = "fouroversix"

    def quantize(self, w: Any, name: str = "weight") -> NarrowFloat:
        """w: float[N, K], K a multiple of the block (with `weight_scale_2d` N too) -> codes and scales, dequantized to
        bfloat16.

        Raises:
          FormatError: a size or rule that the library does not have.
        """
        options = parse(self.config(), Context(label=name))
        return load(name, self.stored(w, name), options, Context(label=name))

    def stored(self, w: Any, name: str) -> Parts:
        """The tensors that a file has for the weight w."""
        w = blocks.weight(w, name)
        block, scale_dtype, _ = DTYPES[self.dtype]
        if w.shape[1] % block or (self.weight_scale_2d and w.shape[0] % block):
            raise FormatError(f"{name}: found shape {w.shape}, expected blocks of {block} to divide it")
        (n, k), rows = w.shape, -(-w.shape[0] // 128) * 128
        columns = -(-w.shape[1] // (4 * block)) * 4 * block
        padded = np.pad(w.astype(np.float32), [(0, rows - n), (0, columns - k)])
        if self.dtype == "nvfp4":
            codes, scales, amax = algorithm.quantize(padded, self.scale_rule, square=self.weight_scale_2d)
        else:
            codes, scales = algorithm.quantize_mx(padded, self.scale_rule, square=self.weight_scale_2d)
            amax = np.ones(1, np.float32)
        return {
            VALUES: _bits.pack(codes, 4).view(np.uint8),
            SCALES: to_blocked(scales).view(scale_dtype),
            AMAX: amax,
            METADATA: np.array([n, k, rows, columns, 1, 1], np.int64),
        }

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "fouroversix",
            "dtype": self.dtype,
            "scale_rule": self.scale_rule,
            "weight_scale_2d": self.weight_scale_2d,
            "output_dtype": "bfloat16",
            "modules_to_not_convert": list(skip) if skip else None,
        }


FORMAT = Format(
    name="fouroversix",
    methods=("fouroversix",),
    title="Four Over Six: NVFP4 with adaptive block scales",
    parse=parse,
    markers=(VALUES,),
    suffixes=(VALUES, SCALES, AMAX, METADATA),
    load=load,
    dump=dump,
    group=group,
    methods_table={"FourOverSix": FourOverSix},
    evidence="library",
)
