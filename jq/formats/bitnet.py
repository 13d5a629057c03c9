"""BitNet b1.58 (`quant_method: bitnet`): ternary weights with one scale a tensor.

Source: transformers 5.23 (integrations/bitnet.py, quantizers/quantizer_bitnet.py).

| tensor of module m | bitlinear | autobitlinear, offline |
|---|---|---|
| `m.weight` | uint8[N / 4, K], packed | uint8[N / 4, K], packed, or float[N, K] of -1, 0, 1 |
| `m.weight_scale` | float[1]; divides | float[1]; multiplies |
| `m.rms_norm.weight` (use_rms_norm) | float[K] | float[K] |

Packed codes -1, 0, 1 are stored as 0, 1, 2 in slabs of rows (`jq.formats.slabs`), the first slab in the lowest two bits.
A float 0 may be -0: such weights are a `Codebook` with the table (-1, 0, 1, -0). Online autobitlinear files hold float
master weights `m.weight` and no scale; they are held as they are and ternarized at every call by the scale
1 / mean|w|. Which modules are meant follows from the names: every matrix but embeddings, the output and what
modules_to_not_convert names.

Inputs are quantized to int8 by token (`jq.activation_schemes.bitnet`), after an RMS norm where use_rms_norm.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jq.activations import Activation
from jq.algorithms import blocks
from jq.algorithms.bitnet import absmean_codes, absmean_scale
from jq.errors import FormatError
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
from jq.formats.slabs import pack_slabs, unpack_slabs
from jq.qtensor import Affine, Codebook, Grouping, QTensor, Source

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
PER_BYTE = 4
TABLE = np.array([-1.0, 0.0, 1.0, -0.0], np.float32)
TABLE.setflags(write=False)  # all tensors hold the same one
_NORM = "rms_norm.weight"
_SUFFIXES = ("weight_scale", "weight", _NORM)
_FLOAT_DTYPES = tuple(np.dtype(d) for d in FLOATS)
_KEYS = ("linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps", "modules_to_not_convert", "quant_method")


@dataclasses.dataclass(frozen=True)
class Options:
    """quantization_config with transformers' defaults."""

    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool = False
    rms_norm_eps: float = 1e-6
    modules_to_not_convert: tuple[str, ...] | None = None

    @property
    def online(self) -> bool:
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"

    @property
    def activation(self) -> Activation:
        kept: tuple[tuple[str, Any], ...] = (("prepare", "rms_norm"), ("eps", self.rms_norm_eps))
        return Activation(self.linear_class, (_NORM,), kept) if self.use_rms_norm else Activation(self.linear_class)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config; old files have only quant_method."""
    warn_unknown(config, _KEYS, context.label)
    closed = {"linear_class": ("bitlinear", "autobitlinear"), "quantization_mode": ("offline", "online")}
    for key, allowed in closed.items():
        if config.get(key, allowed[0]) not in allowed:
            raise FormatError(f"quantization_config.{key}: found {config[key]!r}, expected {' or '.join(allowed)}")
    skip = config.get("modules_to_not_convert")
    return Options(
        config.get("linear_class", "bitlinear"),
        config.get("quantization_mode", "offline"),
        true_or_false(config, "use_rms_norm", f"{context.label}: quantization_config", default=False),
        float(config.get("rms_norm_eps", 1e-6)),
        None if skip is None else tuple(str(s) for s in skip),
    )


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Modules with a `weight_scale`; of online files, every matrix that transformers would replace."""
    if not options.online:
        return group_by_prefix(names, ("weight_scale",), _SUFFIXES)
    tied = ("lm_head", "output", "embed_out") if options.modules_to_not_convert is None else ()
    have, found = set(names), {}
    for name in names:
        prefix = name.removesuffix(".weight")
        if prefix == name or len(context.shapes[name]) != 2 or context.dtypes[name] not in _FLOAT_DTYPES:
            continue
        last = prefix.rsplit(".", 1)[-1]
        if "emb" in last or last in ("wte", "wpe", "shared", *tied) or _skipped(prefix, options.modules_to_not_convert):
            continue
        found[prefix] = {s: f"{prefix}.{s}" for s in ("weight", _NORM) if f"{prefix}.{s}" in have}
    return found


def _skipped(module: str, patterns: tuple[str, ...] | None) -> bool:
    """transformers' rule: a pattern matches from the start to a border between names, or is a suffix."""
    for pattern in patterns or ():
        try:
            matched = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
        except re.error as e:
            raise FormatError(f"quantization_config.modules_to_not_convert: {pattern!r} is no pattern: {e}") from e
        if matched or module.endswith(pattern):
            return True
    return False


def _load_online(prefix: str, parts: Parts, options: Options) -> Affine:
    weight = parts["weight"]
    scale = absmean_scale(weight.astype(np.float32))
    return Affine(
        np.ascontiguousarray(weight),
        np.full((1, 1), scale, np.float32),
        extras=_norm(prefix, parts, options),
        code_bits=8 * weight.dtype.itemsize,
        signed=True,
        grouping=Grouping("block", 0, 0),
        formula="div",
        dtype=str(weight.dtype),
        activation=dataclasses.replace(options.activation, scheme="autobitlinear_online"),
        source=Source("bitnet"),
    )


def _norm(prefix: str, parts: Parts, options: Options) -> Parts:
    """The weight of the layer's own RMS norm, where there is one."""
    if not options.use_rms_norm:
        if _NORM in parts:
            raise FormatError(f"{prefix}.{_NORM}: stored, but quantization_config.use_rms_norm is not set")
        return {}
    found = take(parts, _NORM, prefix, why="use_rms_norm is set.")
    expect_shape(found, (parts["weight"].shape[1],), f"{prefix}.{_NORM}", "one value for each input")
    return {_NORM: found}


def load(prefix: str, parts: Parts, options: Options, context: Context) -> QTensor:
    """One module -> `Affine` (packed codes, or online masters) or `Codebook` (ternary floats)."""
    if options.online:
        return _load_online(prefix, parts, options)
    weight, scale = take(parts, "weight", prefix), take(parts, "weight_scale", prefix)
    expect_dtype(scale, FLOATS, f"{prefix}.weight_scale")
    expect_one(scale, f"{prefix}.weight_scale", "one for the whole weight")
    if weight.ndim != 2:
        raise FormatError(f"{prefix}.weight: found shape {weight.shape}, expected a matrix")
    extras = _norm(prefix, parts, options)
    common: dict[str, Any] = {
        "grouping": Grouping("block", 0, 0),
        "extras": extras,
        "activation": options.activation,
        "source": Source("bitnet", (("rank", scale.ndim), ("dtype", str(weight.dtype)))),
        "name": prefix,
    }
    if weight.dtype != np.uint8:
        expect_dtype(weight, (np.uint8, *FLOATS), f"{prefix}.weight")
        return _load_floats(prefix, weight, scale, options, common)
    codes = unpack_slabs(weight, 2, PER_BYTE, high_first=False)
    if (codes == 3).any():
        raise FormatError(f"{prefix}.weight: holds the field 3, which means no ternary value; the file is damaged")
    bias = context.shapes.get(f"{prefix}.bias")
    if bias is not None and len(bias) == 1 and len(codes) - PER_BYTE < bias[0] < len(codes):
        extras["weight"] = weight  # padding rows: the writer's out_features is no multiple of 4
        codes = codes[: bias[0]]
    divides = options.linear_class == "bitlinear"
    return Affine.make(
        codes.astype(np.int8) - 1,
        scale.reshape(1, 1),
        code_bits=2,
        signed=True,
        formula="div" if divides else "sub_mul",
        dtype=str(scale.dtype),
        **common,
    )


def _load_floats(prefix: str, weight: np.ndarray, scale: np.ndarray, options: Options, common: dict) -> Codebook:
    if options.linear_class == "bitlinear":
        raise FormatError(f"{prefix}.weight: found dtype {weight.dtype}, bitlinear stores packed uint8")
    values = weight.astype(np.float32)
    codes = np.where(values == 0, np.where(np.signbit(values), 3, 1), values + 1)
    if not np.isin(values, (-1.0, 0.0, 1.0)).all():
        raise FormatError(f"{prefix}.weight: holds values beside -1, 0 and 1; an offline weight is ternary")
    table, absmax = TABLE, scale.astype(np.float32).reshape(1, 1)
    common["extras"]["weight_scale"] = scale
    dtype = str(np.result_type(weight.dtype, scale.dtype)) if weight.dtype != scale.dtype else str(scale.dtype)
    return Codebook.make(codes.astype(np.uint8), table, absmax, code_bits=2, dtype=dtype, **common)


def dump(q: Any) -> Parts:
    """The stored tensors of a module."""
    parts: Parts = {k: np.asarray(v) for k, v in q.extras.items()}
    codes, source = np.asarray(q.unpack()), q.source
    assert source is not None
    if codes_are_masters(q):
        return {"weight": np.asarray(q.codes), **parts}
    if isinstance(q, Codebook):
        return {"weight": TABLE[codes].astype(_dtype(source.get("dtype"))), **parts}
    shape = (1,) * source.get("rank")
    packed = pack_slabs(codes + 1, 2, PER_BYTE, high_first=False)
    return {"weight": packed, "weight_scale": np.asarray(q.scales).reshape(shape), **parts}


def codes_are_masters(q: Any) -> bool:
    """Whether a tensor holds online master weights."""
    return np.dtype(q.codes.dtype).kind not in "iu"


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclasses.dataclass(frozen=True)
class BitNet:
    """Ternary weights by the absmean rule: scale = 1 / mean|w|, code = clip(round(w * scale), -1, 1).

    Fields:
      linear_class: "bitlinear" stores the scale, which divides; "autobitlinear" its reciprocal, which multiplies.
    """

    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    format = "bitnet"

    def quantize(self, w: Any, name: str = "weight") -> QTensor:
        """w: float[N, K], N a multiple of 4. The scale is stored in w's dtype.

        Raises:
          FormatError: N is no multiple of 4 (the format's packing would add rows).
          ValueError: weights that are not finite.
        """
        w = blocks.weight(w, name)
        if w.shape[0] % PER_BYTE:
            raise FormatError(f"{name}: {w.shape[0]} output features; BitNet packs rows by {PER_BYTE}")
        codes, scale = absmean_codes(w.astype(np.float32))
        stored = scale if self.linear_class == "bitlinear" else np.float32(1) / scale
        packed = pack_slabs(codes + 1, 2, PER_BYTE, high_first=False)
        parts: Parts = {"weight": packed, "weight_scale": np.asarray([stored]).astype(w.dtype)}
        return load(name, parts, Options(self.linear_class), Context())

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of transformers."""
        return {
            "quant_method": "bitnet",
            "modules_to_not_convert": list(skip) or None,
            "linear_class": self.linear_class,
            "quantization_mode": "offline",
            "use_rms_norm": False,
            "rms_norm_eps": 1e-6,
        }


FORMAT = Format(
    name="bitnet",
    methods=("bitnet",),
    title="BitNet: ternary, 2 bits",
    parse=parse,
    markers=("weight_scale",),
    suffixes=_SUFFIXES,
    group=group,
    load=load,
    dump=dump,
    methods_table={"BitNet": BitNet},
)
