"""ParoQuant: AWQ's 4-bit integers (gemm order) of weights whose inputs are scaled and turned in pairs of channels.

    qweight, qzeros, scales   as `jq.formats.awq`, version "gemm"
    theta           float16 [R, K/2]   angle of each pair, R sets of pairs (`krot`)
    pairs           int16 [R, K]       the two channels of each pair, counted within their group
    channel_scales  float16 [1, K]     inputs are multiplied by them first

A set turns x_i, x_j into x_i cos + x_j sin, x_j cos - x_i sin; every channel of a group of `group_size` is in one
pair of it. The rotation runs on the inputs (`jq.activation_schemes.paroquant`); `dequantize()` gives the stored weight, that of
rotated inputs. Experts share theirs: `experts.gate_up_weight_theta` and so on belongs to every `experts.*.gate_proj` and
`up_proj`, `experts.down_weight_theta` to `down_proj`.

Source: paroquant 0.1.16 (z-lab; cli/convert.py, inference/backends/transformers), which needs CUDA; held against gptqmodel
7.7.0's layer (nn_modules/qlinear/paroquant.py) on a CPU, whose 16-bit inputs are rounded more often.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.activation_schemes.paroquant import ROTATION
from jq.activations import FLOAT, Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats import awq
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
from jq.formats.gptq_config import checked_group, first, rules_of, whole_number
from jq.qtensor import Affine, Source
from jq.qtensor.affine import check_finite

WEIGHT = ("qweight", "qzeros", "scales")
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj")
KNOWN = (
    "quant_method method format checkpoint_format bits group_size krot modules_to_not_convert zero_point sym desc_act lm_head "
    "dynamic pack_dtype meta version"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Those of the integers, and the number of sets of pairs that the config says (0: it does not)."""

    weight: awq.Options
    krot: int = 0


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config.

    Raises:
      FormatError: impossible numbers.
      UnsupportedError: other than 4 bits, another storage.
    """
    label = context.label
    for key in ("format", "checkpoint_format"):
        if config.get(key) not in (None, "paroquant"):
            raise UnsupportedError(f"{label}: quantization_config.{key} is {config[key]!r:.60}, expected 'paroquant'")
    warn_unknown(config, KNOWN.split(), label)

    def checked_bits(value: Any, where: str) -> int:
        if whole_number(value, "bits", where) != 4:
            raise UnsupportedError(f"{where}: ParoQuant with {value!r:.60} bits; its layers have 4")
        return 4

    where = f"{label}: quantization_config"
    krot = whole_number(first(config, "krot", default=0), "krot", label)
    if krot < 0:
        raise FormatError(f"{label}: quantization_config.krot is {krot}, expected a positive number")
    weight = awq.Options(
        bits=checked_bits(first(config, "bits", default=4), label),
        group_size=checked_group(first(config, "group_size", default=128), label),
        sym=true_or_false(config, "sym", where, default=False) or not true_or_false(config, "zero_point", where),
        rules=rules_of(config.get("dynamic"), checked_bits, label),
    )
    return Options(weight, krot)


def group(names: list[str], options: Options, context: Context) -> dict[str, dict[str, str]]:
    """Quantized modules by name; experts borrow the rotation that they share."""
    found = group_by_prefix(names, ("qweight",), (*WEIGHT, *ROTATION))
    present = set(names)
    for prefix, parts in found.items():
        match = EXPERT.fullmatch(prefix)
        if match and "theta" not in parts:
            part = "down_weight" if match[2] == "down" else "gate_up_weight"
            shared = {f"~{name}": f"{match[1]}.{part}_{name}" for name in ROTATION}
            parts |= {suffix: name for suffix, name in shared.items() if name in present}
    return found


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    """One module's tensors as an `Affine` whose inputs are rotated.

    Raises:
      FormatError: missing tensors, shapes or dtypes that disagree with the config, channels that are not in one pair.
    """
    made = awq.load(prefix, {s: parts[s] for s in WEIGHT if s in parts}, options.weight, context)
    key = "" if "theta" in parts or "~theta" not in parts else "~"
    theta, pairs, scales = (take(parts, f"{key}{name}", prefix) for name in ROTATION)
    k = made.in_features
    rounds = options.krot or (theta.shape[0] if theta.ndim else 0)
    expect_dtype(pairs, (np.int16,), f"{prefix}.pairs")
    for name, array, shape in (
        ("theta", theta, (rounds, k // 2)),
        ("pairs", pairs, (rounds, k)),
        ("channel_scales", scales, (1, k)),
    ):
        expect_shape(array, shape, f"{prefix}.{name}", f"{rounds} sets of pairs of {k} inputs; check krot")
        if array is not pairs:
            expect_dtype(array, awq.FLOATS, f"{prefix}.{name}")
            check_finite(array, f"{prefix}.{name}")
    size = made.grouping.cols or k
    _check_pairs(pairs, size, f"{prefix}.pairs")
    names = tuple(f"{key}{name}" for name in ROTATION)
    given = dict(zip(names, (theta, pairs, scales), strict=True))
    assert made.source is not None
    return made.replace(
        extras={**made.extras, **given},
        activation=Activation(FLOAT, names, (("prepare", "givens"), ("key", key), ("group", size))),
        source=Source("paroquant", made.source.options),
    )


def _check_pairs(pairs: np.ndarray, size: int, name: str) -> None:
    """Raises `FormatError` where a set does not pair every channel of a group once."""
    if size % 2 or not (np.sort(pairs.reshape(-1, size), axis=-1) == np.arange(size)).all():
        raise FormatError(
            f"{name}: a set must pair every channel of its group of {size} once, and one does not; check group_size, or the "
            "file is damaged"
        )


def dump(q: Affine) -> Parts:
    """Stored tensors of a module; what experts share is an entry of its own."""
    assert q.source is not None
    found = awq.dump(q.replace(activation=None, source=Source("awq", q.source.options)))
    return {name: np.asarray(array) for name, array in found.items() if not name.startswith("~")}


FORMAT = Format(
    name="paroquant",
    methods=("paroquant",),
    title="ParoQuant: 4-bit integers of inputs turned in pairs",
    parse=parse,
    markers=("qweight",),
    suffixes=(*WEIGHT, *ROTATION),
    load=load,
    dump=dump,
    group=group,
    evidence="library",
)
