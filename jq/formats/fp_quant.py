"""FP-Quant: NVFP4 or MXFP4 weights of rotated inputs.

    qweight              uint8 [N, K/2], two e2m1 codes a byte, low nibble first
    scales               uint8 [N, K/16] bytes of e4m3 (nvfp4) or [N, K/32] of e8m0 (mxfp4); rows padded to a multiple
                         of 128 and columns of 4 where the quantizing kernel padded them
    weight_global_scale, act_global_scale    dt [1]
    forward_hadamard_matrix, backward_hadamard_matrix    dt [g, g]
    dqweight             dt [N, K] in place of qweight and scales with pseudoquantization (for GPUs without FP4): the
                         rotated weight, rounded
    weight               dt [N, K] in place of both with store_master_weights: not rotated, quantized at every call; here
                         once, when it is loaded

The stored weight is that of inputs x @ H, H = forward_hadamard_matrix in each block of g inputs; its values are
code * scale / weight_global_scale. `dequantize()` takes the rotation back. The library always quantizes activations
too (`jq.activation_schemes.fp_quant`). Quantize: `jq.algorithms.fp_quant`. With pseudoquantization fp_quant 0.3.2 adds a
layer's bias twice; here it is added once.

Source: fp_quant 0.3.2 (module/linear.py, linear_fns.py, triton/nvfp4.py); the library needs a GPU and qutlass, no file
of it was at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq import bits as _bits
from jq.activations import Activation
from jq.algorithms import blocks
from jq.algorithms import fp_quant as algorithm
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, true_or_false, warn_unknown
from jq.qtensor import Grouping, NarrowFloat, Plain, QTensor, Source
from jq.qtensor.affine import check_divisor, check_finite
from jq.qtensor.narrow_float import check_bits
from jq.qtensor.rotated import Rotated

# Values that the library has, the default first.
CLOSED: dict[str, tuple[Any, ...]] = {
    "backward_dtype": ("bf16", "mxfp8", "mxfp4"),
    "transform_init": ("hadamard", "identity", "gsr"),
    "hadamard_group_size": (None, 16, 32, 64, 128),
}
FLOATS = (np.float16, "bfloat16", np.float32)
MATRICES = ("forward_hadamard_matrix", "backward_hadamard_matrix")
GLOBALS = ("weight_global_scale", "act_global_scale")
SUFFIXES = ("qweight", "scales", "dqweight", "weight", *GLOBALS, *MATRICES)
KNOWN = [
    "quant_method",
    "forward_dtype",
    "forward_method",
    "backward_dtype",
    "store_master_weights",
    "hadamard_group_size",
    "pseudoquantization",
    "transform_init",
    "modules_to_not_convert",
]
BLOCKS = {"nvfp4": 16, "mxfp4": 32}


@dataclasses.dataclass(frozen=True)
class Options:
    """Names as in the config."""

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"
    pseudo: bool = False
    master: bool = False
    size: int | None = None


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: an unknown dtype or method.
    """
    warn_unknown(config, KNOWN, context.label)
    where = f"{context.label}: quantization_config"
    dtype, method = config.get("forward_dtype", "nvfp4"), config.get("forward_method", "abs_max")
    if dtype not in BLOCKS or method not in ("abs_max", *(("quest",) if dtype == "mxfp4" else ())):
        raise FormatError(f"{context.label}: forward_dtype {dtype!r} with forward_method {method!r} is not FP-Quant's")
    for key, allowed in CLOSED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise FormatError(
                f"{context.label}: quantization_config.{key} is {config[key]!r}, expected one of {allowed}"
            )
    return Options(
        dtype,
        method,
        pseudo=true_or_false(config, "pseudoquantization", where, default=False),
        master=true_or_false(config, "store_master_weights", where, default=False),
        size=config.get("hadamard_group_size"),
    )


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Rotated:
    """One module's tensors as a rotated `NarrowFloat`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config.
    """
    matrix = take(parts, MATRICES[0], prefix)
    for name, what in zip(GLOBALS, ("the weight", "the inputs"), strict=True):
        scale = take(parts, name, prefix)
        expect_dtype(scale, FLOATS, f"{prefix}.{name}")
        expect_shape(scale, (1,), f"{prefix}.{name}", f"one scale for {what}")
        check_finite(scale, f"{prefix}.{name}")
        check_divisor(scale, f"{prefix}.{name}")
    whole = parts[GLOBALS[0]]
    expect_dtype(matrix, FLOATS, f"{prefix}.{MATRICES[0]}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise FormatError(f"{prefix}.{MATRICES[0]}: found shape {tuple(matrix.shape)}, expected a square")
    if options.size not in (None, len(matrix)):
        raise FormatError(
            f"{prefix}.{MATRICES[0]}: found shape {tuple(matrix.shape)}, but quantization_config.hadamard_group_size is {options.size}"
        )
    check_finite(matrix, f"{prefix}.{MATRICES[0]}")
    extras = {s: parts[s] for s in (GLOBALS[1], MATRICES[1]) if s in parts}
    # what transformers saves again has empty tensors in place of the other forms
    extras |= {s: parts[s] for s in ("weight", "dqweight", "qweight", "scales") if s in parts and not parts[s].size}
    base: QTensor
    block = BLOCKS[options.forward_dtype]
    if options.master:
        weight = take(parts, "weight", prefix, why="store_master_weights is set.")
        expect_dtype(weight, FLOATS, f"{prefix}.weight")
        if weight.ndim != 2 or not weight.size or weight.shape[1] % len(matrix) or len(matrix) % block:
            raise FormatError(
                f"{prefix}.weight: found shape {tuple(weight.shape)}, expected blocks of {len(matrix)} inputs"
            )
        base = _rounded(weight, matrix, float(whole[0]), options)
        extras |= {"weight": weight, GLOBALS[0]: whole}
    elif options.pseudo:
        weight = take(parts, "dqweight", prefix, why="pseudoquantization is set.")
        expect_dtype(weight, FLOATS, f"{prefix}.dqweight")
        if weight.ndim != 2 or 0 in weight.shape:
            raise FormatError(f"{prefix}.dqweight: found shape {tuple(weight.shape)}, expected a matrix")
        base = Plain(weight, dtype=str(weight.dtype))
        extras[GLOBALS[0]] = whole
    else:
        base, padding = _packed(prefix, parts, whole, block)
        extras |= padding
    base.check(prefix)
    made = Rotated(
        base,
        matrix,
        extras,
        block=matrix.shape[0],
        dtype=context.model_dtype,
        activation=Activation(
            "fp_quant",
            GLOBALS[1:],
            (
                ("dtype", options.forward_dtype),
                ("method", options.forward_method),
                *((("pseudo", True),) * options.pseudo),
            ),
        ),
        source=Source("fp_quant"),
    )
    made.check(prefix)
    return made


def _rounded(weight: np.ndarray, matrix: np.ndarray, whole: float, options: Options) -> Plain | NarrowFloat:
    """A master weight as the library rounds it at every call."""
    block, quest = BLOCKS[options.forward_dtype], options.forward_method == "quest"
    if options.pseudo:
        return Plain(algorithm.fake(weight, matrix, block, whole, quest=quest), dtype=str(weight.dtype))
    codes, scales = algorithm.quantize(weight, matrix, block, whole, quest=quest)
    parts = {"qweight": _bits.pack(codes, 4).view(np.uint8), "scales": scales}
    return _packed("", parts, np.full(1, whole, weight.dtype), block)[0]


def _packed(prefix: str, parts: Parts, whole: np.ndarray, block: int) -> tuple[NarrowFloat, Parts]:
    """The codes and scales of a module, and the stored scales where the kernel padded them."""
    weight, stored = take(parts, "qweight", prefix), take(parts, "scales", prefix)
    expect_dtype(weight, (np.uint8,), f"{prefix}.qweight")
    expect_dtype(stored, (np.uint8,), f"{prefix}.scales")
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(
            f"{prefix}.qweight: found shape {tuple(weight.shape)}, expected (out_features, in_features / 2)"
        )
    n, k = weight.shape[0], weight.shape[1] * 2
    if k % block:
        raise FormatError(f"{prefix}.qweight: {k} inputs are no multiple of {block}")
    exact, padded = (n, k // block), (-(-n // 128) * 128, -(-(k // block) // 4) * 4)
    if tuple(stored.shape) not in (exact, padded):
        expect_shape(stored, exact, f"{prefix}.scales", f"blocks of {block}, or {padded} with the kernel's padding")
    if block == 32:
        check_bits(stored[:n, : k // block], (255,), f"{prefix}.scales")
    base = NarrowFloat(
        _bits.as_words(weight),
        np.ascontiguousarray(stored[:n, : k // block]),
        whole,
        kind="e2m1",
        scale_kind="e4m3" if block == 16 else "e8m0",
        grouping=Grouping("block", 1, block),
        formula="global_divide",
        dtype="float32",
    )
    # the padding is carried with the rest: the kernel leaves arbitrary bytes there
    return base, {"scales": stored} if tuple(stored.shape) != exact else {}


def dump(q: Rotated) -> Parts:
    """Stored tensors of a module."""
    base = q.base
    extras = {k: np.asarray(v) for k, v in q.extras.items()}
    if "weight" in extras and extras["weight"].size:
        return {MATRICES[0]: np.asarray(q.rotation), **extras}
    if isinstance(base, Plain):
        return {"dqweight": np.asarray(base.values), MATRICES[0]: np.asarray(q.rotation), **extras}
    return {
        "qweight": np.ascontiguousarray(np.asarray(base.codes)).view(np.uint8),
        "scales": np.asarray(base.scales),
        GLOBALS[0]: np.asarray(base.global_scale),
        MATRICES[0]: np.asarray(q.rotation),
        **extras,
    }


@dataclasses.dataclass(frozen=True)
class FPQuant:
    """FP-Quant without calibration: the rotated weight rounded to NVFP4 or MXFP4.

    Follows the reference of QuTLASS's own tests (float64), which its kernel meets but for 1e-4 of the codes.

    Fields:
      forward_dtype: "nvfp4" or "mxfp4".
      forward_method: "abs_max", or "quest" (mxfp4): scales from the standard deviation.
      hadamard_group_size: inputs that are rotated together; None: 16 for nvfp4, 32 for mxfp4.
      transform_init: "hadamard", "identity" or "gsr" (Hadamard columns in the order of their sign changes).
      pseudoquantization: keep the rounded weight itself, which GPUs without FP4 can run.
    """

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"
    hadamard_group_size: int | None = None
    transform_init: str = "hadamard"
    pseudoquantization: bool = False
    format = "fp_quant"

    def quantize(self, w: Any, name: str = "weight") -> Rotated:
        """w: float[N, K] -> codes and scales; `dequantize()` gives w's dtype.

        Raises:
          FormatError: an option or a size that the library does not have.
          ValueError: weights that are not finite.
        """
        options = parse(self.config(), Context(label=name))
        w = blocks.weight(w, name)
        size, block = self._size(), BLOCKS[self.forward_dtype]
        if w.shape[1] % size or size % block:
            raise FormatError(f"{name}: found shape {w.shape}; FP-Quant rotates blocks of {size} inputs")
        matrix = algorithm.rotation(self.transform_init, size).astype(w.dtype)
        whole, quest = (3.0, False) if self.forward_method == "abs_max" else (1.0, True)
        one = np.full(1, whole, w.dtype)
        parts: Parts = dict.fromkeys(GLOBALS, one) | dict.fromkeys(MATRICES, matrix)
        if self.pseudoquantization:
            parts["dqweight"] = algorithm.fake(w, matrix, block, whole, quest=quest)
            return load(name, parts, options, Context({"dtype": str(w.dtype)}, label=name))
        codes, scales = algorithm.quantize(w, matrix, block, whole, quest=quest)
        n, columns = scales.shape
        parts["qweight"] = _bits.pack(codes, 4).view(np.uint8)
        parts["scales"] = np.pad(scales, [(0, -n % 128), (0, -columns % 4)])
        return load(name, parts, options, Context({"dtype": str(w.dtype)}, label=name))

    def _size(self) -> int:
        return self.hadamard_group_size or {"nvfp4": 16, "mxfp4": 32}.get(self.forward_dtype, 16)

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config of a checkpoint made with these options."""
        return {
            "quant_method": "fp_quant",
            "forward_dtype": self.forward_dtype,
            "forward_method": self.forward_method,
            "backward_dtype": "bf16",
            "store_master_weights": False,
            "hadamard_group_size": self._size(),
            "pseudoquantization": self.pseudoquantization,
            "transform_init": self.transform_init,
            "modules_to_not_convert": list(skip) if skip else None,
        }


FORMAT = Format(
    name="fp_quant",
    methods=("fp_quant",),
    title="FP-Quant: NVFP4 and MXFP4 weights of rotated inputs",
    parse=parse,
    markers=("qweight", "dqweight", MATRICES[0]),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    methods_table={"FPQuant": FPQuant},
    evidence="source",
)
