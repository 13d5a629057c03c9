"""Four Over Six: NVFP4 whose blocks of 16 reach to 6 or to 4, whichever is closer.

    quantized_weight_values         uint8 [N', K'/2], two e2m1 codes a byte, low nibble first
    quantized_weight_scale_factors  float8_e4m3fn [N' * K'/16], in the order of Blackwell's tensor cores, or [N', K'/16]
    quantized_weight_amax           float32, one value
    quantized_weight_metadata       int32 or int64 [6]: N, K, N', K', 1, whether scales are in Blackwell's order

N' and K' are N and K padded with zeros to multiples of 128 and 64. Dequantize: dt(float32(code * scale) * amax / top),
top = 6 * 256 for the adaptive rules, 6 * 448 for "static_6", 4 * 448 for "static_4". The library quantizes activations
the same way (`jq.activation_schemes.fouroversix`). Quantize: `jq.algorithms.fouroversix`.

Source: github.com/mit-han-lab/fouroversix of 2026-04 (model/modules/linear.py, quantize/backend.py); no file of it was at
hand, its PyTorch code runs on a CPU. Only dtype "nvfp4" is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import fouroversix as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_once
from jq.qtensor import Grouping, NarrowFloat, Source

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
VALUES, SCALES, AMAX, METADATA = (
    f"quantized_weight_{name}" for name in ("values", "scale_factors", "amax", "metadata")
)
TOPS = {rule: top * scale for rule, (top, scale) in algorithm.LIMITS.items()}
KNOWN = {
    *("quant_method", "activation_dtype", "activation_scale_rule", "dtype", "gradient_dtype", "gradient_scale_rule"),
    *("keep_master_weights", "matmul_backend", "output_dtype", "quantize_backend", "scale_rule", "weight_dtype"),
    *("weight_scale_2d", "weight_scale_rule", "module_config_overrides", "modules_to_not_convert"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Scale rules of weights and of activations, by module where they are overridden, and the dtype of results."""

    rule: tuple[str, str]
    overrides: Mapping[str, tuple[str, str]]
    dtype: str


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: an unknown rule.
      UnsupportedError: another dtype than nvfp4, or master weights.
    """
    label = f"{context.label}: quantization_config"
    for key in config.keys() - KNOWN:
        warn_once(context.label, f"quantization_config.{key} is not known to fouroversix; ignored")
    if config.get("keep_master_weights"):
        raise UnsupportedError(
            f"{label}.keep_master_weights keeps plain weights that are quantized at run time; remove "
            "quantization_config from config.json to load them as they are"
        )
    overrides = config.get("module_config_overrides") or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(v, Mapping) for v in overrides.values()):
        raise FormatError(f"{label}.module_config_overrides must map modules to settings")
    rules = {"": _rules(label, config)}
    rules |= {
        name: _rules(f"{label}.module_config_overrides[{name!r}]", {**config, **v}) for name, v in overrides.items()
    }
    return Options(rules.pop(""), rules, str(config.get("output_dtype") or "bfloat16"))


def _rules(label: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Scale rules of the weight and of the activations."""
    found = []
    for side in ("weight", "activation"):
        dtype = config.get(f"{side}_dtype") or config.get("dtype") or "nvfp4"
        rule = config.get(f"{side}_scale_rule") or config.get("scale_rule") or "mse"
        if dtype != "nvfp4":
            raise UnsupportedError(f"{label}: {side} dtype {dtype!r} is not read, nvfp4 is")
        if rule not in TOPS:
            raise FormatError(f"{label}: scale_rule {rule!r}, expected one of {', '.join(TOPS)}")
        found.append(str(rule))
    return found[0], found[1]


def to_blocked(scales: np.ndarray) -> np.ndarray:
    """[N', K'/16] -> one axis, 128 x 4 blocks as Blackwell's tensor cores read them: row r of a block at (r % 32, r // 32)."""
    rows, columns = scales.shape
    blocks = scales.reshape(rows // 128, 4, 32, columns // 4, 4)
    return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1, 4)).reshape(-1)


def from_blocked(stored: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Inverse of `to_blocked`."""
    blocks = stored.reshape(rows // 128, columns // 4, 32, 4, 4)
    return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1, 4)).reshape(rows, columns)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> NarrowFloat:
    """One module's tensors as a `NarrowFloat`.

    Raises:
      FormatError: missing tensors, shapes that disagree with the stored metadata.
    """
    values, stored = take(parts, VALUES, prefix), take(parts, SCALES, prefix)
    amax, metadata = take(parts, AMAX, prefix), take(parts, METADATA, prefix)
    expect_dtype(values, (np.uint8,), f"{prefix}.{VALUES}")
    expect_dtype(stored, (E4M3,), f"{prefix}.{SCALES}")
    expect_dtype(amax, (np.float32,), f"{prefix}.{AMAX}")
    expect_dtype(metadata, (np.int32, np.int64), f"{prefix}.{METADATA}")
    expect_shape(metadata, (6,), f"{prefix}.{METADATA}", "sizes, padded sizes and flags")
    if amax.size != 1:
        raise FormatError(f"{prefix}.{AMAX}: found shape {tuple(amax.shape)}, expected one value")
    n, k, rows, columns, _, blocked = (int(v) for v in metadata)
    if not (0 < n <= rows < 1 << 31 and 0 < k <= columns < 1 << 31) or rows % 128 or columns % 64 or k % 16:
        raise FormatError(f"{prefix}.{METADATA}: sizes ({n}, {k}) padded to ({rows}, {columns}) make no NVFP4 weight")
    expect_shape(values, (rows, columns // 2), f"{prefix}.{VALUES}", "padded sizes of the metadata")
    flat = (rows * columns // 16,)
    if tuple(stored.shape) != flat:
        expect_shape(stored, (rows, columns // 16), f"{prefix}.{SCALES}", f"padded sizes of the metadata, or {flat}")
    whole = np.ascontiguousarray(stored).view(np.uint8)
    grid = from_blocked(whole.reshape(-1), rows, columns // 16) if blocked == 1 else whole.reshape(rows, columns // 16)
    codes = np.ascontiguousarray(values[:n, : k // 2])
    rule, inputs = options.overrides.get(prefix, options.rule)
    made = NarrowFloat(
        codes.view(np.uint32) if k % 8 == 0 else codes,
        np.ascontiguousarray(grid[:n, : k // 16]),
        amax,
        {METADATA: metadata},
        kind="e2m1",
        scale_kind="e4m3",
        grouping=Grouping("block", 1, 16),
        formula=f"amax_{TOPS[rule]}",
        dtype=options.dtype,
        activation=Activation("fouroversix", (), (("rule", inputs),)),
        source=Source("fouroversix", (("flat", stored.ndim == 1),)),
    )
    made.check(prefix)
    again = dump(made)
    kept = {name: parts[name] for name in (VALUES, SCALES) if again[name].tobytes() != parts[name].tobytes()}
    return made.replace(extras={**made.extras, **kept}) if kept else made  # a kernel that left bytes in the padding


def dump(q: NarrowFloat) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    metadata = np.asarray(q.extras[METADATA])
    n, k, rows, columns, _, blocked = (int(v) for v in metadata)
    codes = np.ascontiguousarray(np.asarray(q.codes)).view(np.uint8)
    grid = np.pad(np.asarray(q.scales), [(0, rows - n), (0, (columns - k) // 16)])
    scales = to_blocked(grid) if blocked == 1 else grid
    found = {
        VALUES: np.pad(codes, [(0, rows - n), (0, (columns - k) // 2)]),
        SCALES: scales.reshape(-1 if q.source.get("flat") else grid.shape).view(E4M3),
        AMAX: np.asarray(q.global_scale),
    }
    return {**found, **{name: np.asarray(array) for name, array in q.extras.items()}}


@dataclasses.dataclass(frozen=True)
class FourOverSix:
    """NVFP4 with adaptive block scales; codes those of the library's PyTorch code (see `jq.algorithms.fouroversix`).

    Fields:
      scale_rule: "mse", "mae" or "abs_max" choose 6 or 4 for each block by that error; "static_6", "static_4" do not.
      weight_scale_2d: scales of 16 x 16 blocks.
    """

    scale_rule: str = "mse"
    weight_scale_2d: bool = False
    format = "fouroversix"

    def quantize(self, w: Any, name: str = "weight") -> NarrowFloat:
        """w: float[N, K], K a multiple of 16 (with `weight_scale_2d` N too) -> codes and scales, dequantized to bfloat16.

        Raises:
          FormatError: a size or rule that the library does not have.
        """
        options = parse(self.config(), Context(label=name))
        w = np.asarray(w)
        if w.ndim != 2 or w.shape[1] % 16 or (self.weight_scale_2d and w.shape[0] % 16):
            raise FormatError(f"{name}: found shape {w.shape}, expected blocks of 16 to divide it")
        (n, k), rows, columns = w.shape, -(-w.shape[0] // 128) * 128, -(-w.shape[1] // 64) * 64
        padded = np.pad(w.astype(np.float32), [(0, rows - n), (0, columns - k)])
        codes, scales, amax = algorithm.quantize(padded, self.scale_rule, square=self.weight_scale_2d)
        parts: Parts = {
            VALUES: _bits.pack(codes, 4).view(np.uint8),
            SCALES: to_blocked(scales).view(E4M3),
            AMAX: amax,
            METADATA: np.array([n, k, rows, columns, 1, 1], np.int64),
        }
        return load(name, parts, options, Context(label=name))

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "fouroversix",
            "dtype": "nvfp4",
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
    methods_table={"FourOverSix": FourOverSix},
    evidence="library",
)
