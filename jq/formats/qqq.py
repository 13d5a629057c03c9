"""QQQ (`quant_method: qqq`): 4-bit weights and 8-bit inputs, in the order of its GPU kernel.

    B          int32 [K/16, 2N]    codes of 4 bits in tiles of 16x16, each run of four tiles permuted
    s_group    float16 [K/G, N]    scales of groups, each run of 64 columns permuted; empty where a row has one scale
    s_channel  float32 [1, N]      scales of outputs, each run of 32 permuted

Weights are int8: in groups int8(round((code - 8) * s_group)), else 16 * code with codes in two's complement; both times
s_channel, in float32. Inputs are quantized by token.

Source: gptqmodel 7.7.0 (nn_modules/qlinear/qqq.py), whose `QQQTorchLinear` packs and computes on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from jq.activations import Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, true_or_false
from jq.formats.gptq_config import first
from jq.formats.marlin import GROUPED, SINGLE, tile, untile
from jq.qtensor import Affine, Grouping, Source

SUFFIXES = ("B", "s_channel", "s_group")


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing that the stored tensors do not tell."""


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config.

    Raises:
      UnsupportedError: other than 4 bits, or inputs in another order.
    """
    bits = first(config, "bits", "wbits", "w_bit", default=4)
    ordered = true_or_false(config, "desc_act", f"{context.label}: quantization_config", default=False)
    if bits != 4 or ordered or config.get("dynamic"):
        raise UnsupportedError(
            f"{context.label}: QQQ with bits {bits!r}, desc_act {config.get('desc_act')!r}, dynamic {config.get('dynamic')!r}; "
            "its layers have 4 bits, inputs in order, and one setting for all"
        )
    return Options()


@cache
def order(grouped: bool) -> np.ndarray:
    """Permutation of the 1024 codes of four 16x16 tiles."""
    found = []
    for thread in range(32):
        rows = [4 * (thread % 4) + i for i in range(4)]
        base = [16 * row + thread // 4 + 8 * block for block in (0, 1) for row in rows]
        for j in range(4):
            found += [place + 256 * j for place in base]
    within = [0, 2, 4, 6, 1, 3, 5, 7] if grouped else [4, 0, 5, 1, 6, 2, 7, 3]
    return np.array(found).reshape(-1, 8)[:, within].reshape(-1)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Affine:
    """One module's tensors as an `Affine`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that do not fit together.
    """
    words, channel = take(parts, "B", prefix), take(parts, "s_channel", prefix)
    expect_dtype(words, (np.int32,), f"{prefix}.B")
    expect_dtype(channel, (np.float32,), f"{prefix}.s_channel")
    if words.ndim != 2 or not words.size or words.shape[1] % 128:
        raise FormatError(f"{prefix}.B: found shape {words.shape}, expected (K/16, 2N), N a multiple of 64")
    k, n = 16 * words.shape[0], words.shape[1] // 2
    expect_shape(channel, (1, n), f"{prefix}.s_channel", f"one for each of {n} outputs")
    group = parts.get("s_group")
    grouped = group is not None and group.size > 0
    codes = untile(words, k, n, 4, order=order(grouped)).T
    outputs = _plain(channel, SINGLE).T
    activation = Activation("qqq")
    common: dict[str, Any] = {
        "code_bits": 4,
        "signed": True,
        "name": prefix,
        "dtype": context.model_dtype,
        "activation": activation,
    }
    if not grouped:
        return Affine.make(
            np.ascontiguousarray((codes ^ 8) - 8),
            np.ascontiguousarray(outputs * np.float32(16)),
            grouping=Grouping("block", 1, 0),
            formula="f32",
            extras={} if group is None else {"s_group": group},
            source=Source("qqq", (("grouped", False),)),
            **common,
        )
    assert group is not None
    expect_dtype(group, (np.float16,), f"{prefix}.s_group")
    if group.ndim != 2 or k % group.shape[0]:
        raise FormatError(f"{prefix}.s_group: found shape {group.shape}, which does not divide {k} inputs into groups")
    expect_shape(group, (group.shape[0], n), f"{prefix}.s_group", f"one for each of {n} outputs")
    return Affine.make(
        np.ascontiguousarray(codes - 8),
        np.ascontiguousarray(_plain(group, GROUPED).T),
        zeros=np.ascontiguousarray(outputs),
        grouping=Grouping("block", 1, k // group.shape[0]),
        formula="int8_twice",
        source=Source("qqq", (("grouped", True),)),
        **common,
    )


def _plain(scales: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Scales in the order of the columns."""
    found = np.empty((scales.size // places.size, places.size), scales.dtype)
    found[:, places] = scales.reshape(-1, places.size)
    return found.reshape(scales.shape)


def dump(q: Any) -> Parts:
    """Stored tensors of a module."""
    grouped = q.source.get("grouped")
    codes, scales = np.ascontiguousarray(np.asarray(q.unpack()).T), np.asarray(q.scales)
    codes = codes + 8 if grouped else codes & 15
    channel = (np.asarray(q.zeros) if grouped else scales / np.float32(16)).T
    parts = {
        "B": tile(np.ascontiguousarray(codes), 4, order=order(grouped)),
        "s_channel": np.ascontiguousarray(channel).reshape(-1, SINGLE.size)[:, SINGLE].reshape(channel.shape),
    }
    if not grouped:
        return {**parts, **{name: np.asarray(array) for name, array in q.extras.items()}}
    group = np.ascontiguousarray(scales.T)
    return {**parts, "s_group": group.reshape(-1, GROUPED.size)[:, GROUPED].reshape(group.shape)}


FORMAT = Format(
    name="qqq",
    methods=("qqq",),
    title="QQQ: 4-bit weights, 8-bit inputs",
    parse=parse,
    markers=("B", "s_channel"),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    evidence="library",
)
