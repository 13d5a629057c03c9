"""EETQ: int8 weights per output channel, in the interleaved byte order of its CUDA kernels.

Source: EETQ 1.0.0 (commit 465e972, csrc/cutlass_kernels/cutlass_preprocessors.cc) and transformers 5.23
(integrations/eetq.py). Read from the source: no library code runs without a GPU.

| tensor of module m | |
|---|---|
| `m.weight` | int8[K, N]: the shape of the transposed weight around interleaved bytes |
| `m.weight_scales` | float16[N] |

Interleaving (of compute capability 7.5 to 8.9, which all known files have; K and N multiples of 64) of codes [K, N]:
rows are permuted in every 16, the matrix is transposed, the columns of a pair alternate in runs of 64 rows, every byte
gets + 128, and bytes 1 and 2 of every 4 swap. weight[n, k] = float16(code) * scale[n], one rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jq.algorithms import blocks
from jq.errors import FormatError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Affine, Grouping, QTensor, Source

ROWS = np.array([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])  # source row of each row of 16
TILE = 64
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)
SOURCE = Source("eetq")


def parse(config: Mapping[str, Any], context: Context) -> None:
    """Checks quantization_config; nothing in it changes how a module is read."""
    warn_unknown(config, ("quant_method", "weights", "modules_to_not_convert"), context.label)
    if config.get("weights", "int8") != "int8":
        raise FormatError(f"quantization_config.weights: found {config['weights']!r}, eetq has only 'int8'")


def detect(checkpoint: Any) -> dict[str, Any] | None:
    """EETQ's own save: `weight_scales` beside an int8 `weight` or `qweight`, and no quantization_config."""
    for name in checkpoint.entries:
        if name.endswith(".weight_scales"):
            prefix = name.removesuffix(".weight_scales")
            for weight in ("weight", "qweight"):
                stored = f"{prefix}.{weight}"
                if stored in checkpoint.entries and checkpoint.entry(stored).dtype == np.int8:
                    return {"quant_method": "eetq"}
    return None


def load(prefix: str, parts: Parts, options: None, context: Context) -> QTensor:
    """One module -> `Affine` of signed 8-bit codes."""
    name = "qweight" if "qweight" in parts else "weight"
    stored = take(parts, name, prefix, why="weight_scales belong to an int8 weight.")
    scales = take(parts, "weight_scales", prefix)
    expect_dtype(stored, (np.int8, np.uint8), f"{prefix}.{name}")
    expect_dtype(scales, FLOATS, f"{prefix}.weight_scales")
    if stored.ndim != 2 or stored.shape[0] % TILE or stored.shape[1] % TILE:
        raise FormatError(
            f"{prefix}.{name}: found shape {stored.shape}, expected (in_features, out_features), both multiples of {TILE}"
        )
    n = stored.shape[1]
    expect_shape(scales.reshape(-1), (n,), f"{prefix}.weight_scales", f"one for each of the {n} columns of {name}")
    return Affine.make(
        deinterleave(stored),
        scales.reshape(n, 1),
        code_bits=8,
        signed=True,
        grouping=Grouping("block", 1, 0),
        source=SOURCE if (name, stored.dtype, scales.ndim) == ("weight", np.int8, 1) else Source(
            "eetq", (("name", name), ("dtype", str(stored.dtype)), ("rank", scales.ndim))
        ),
        name=prefix,
    )  # fmt: skip


def dump(q: Affine) -> Parts:
    """The stored tensors of a module."""
    assert q.source is not None
    scales = np.asarray(q.scales).reshape((-1,) if q.source.get("rank", 1) == 1 else (1, -1))
    stored = interleave(np.asarray(q.unpack()).astype(np.int8)).view(q.source.get("dtype", "int8"))
    return {q.source.get("name", "weight"): stored, "weight_scales": scales}


def interleave(codes: np.ndarray) -> np.ndarray:
    """int8 codes [N, K] -> the stored bytes, int8[K, N]."""
    n, k = codes.shape
    rows = codes.reshape(n, k // 16, 16)[..., ROWS]
    pairs = rows.reshape(n // 2, 2, k // TILE, TILE).transpose(0, 2, 1, 3)
    words = (np.ascontiguousarray(pairs).view(np.uint8) ^ np.uint8(128)).reshape(-1, 4)  # code + 128
    return np.ascontiguousarray(words[:, [0, 2, 1, 3]]).view(np.int8).reshape(k, n)


def deinterleave(stored: np.ndarray) -> np.ndarray:
    """Inverse of `interleave`: int8[K, N] -> int8 codes [N, K]."""
    k, n = stored.shape
    words = np.ascontiguousarray(stored).view(np.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]] ^ np.uint8(128)
    pairs = np.ascontiguousarray(words).view(np.int8).reshape(n // 2, k // TILE, 2, TILE).transpose(0, 2, 1, 3)
    codes = np.empty((n, k // 16, 16), np.int8)
    codes[..., ROWS] = pairs.reshape(n, k // 16, 16)
    return codes.reshape(n, k)


@dataclasses.dataclass(frozen=True)
class EETQ:
    """EETQ's int8 quantization: scale = max|w| / 128 by output channel, rounding half away from zero."""

    format = "eetq"

    def quantize(self, w: Any, name: str = "weight") -> Affine:
        """w: float16 or float32 [N, K], both multiples of 64. Codes come from the float32 scale, not the stored one.

        Raises:
          FormatError: bfloat16 (EETQ refuses it) or sizes that its kernels do not take.
        """
        if np.asarray(w).dtype == ml_dtypes.bfloat16:
            raise FormatError(f"{name}: EETQ does not quantize bfloat16 weights; cast them to float16 first")
        w = blocks.weight(w, name, dtypes=(np.float16, np.float32))
        if w.shape[0] % TILE or w.shape[1] % TILE:
            raise FormatError(f"{name}: found shape {w.shape}; EETQ needs multiples of {TILE} in both dimensions")
        wide = w.astype(np.float32)
        scale = np.abs(wide).max(1, keepdims=True) * np.float32(1 / 128)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(
                wide / scale
            )  # an all-zero channel gives 0 / 0; the original's code there is undefined
        whole = np.trunc(ratio)
        away = whole + np.where(np.abs(ratio - whole) >= 0.5, np.sign(ratio), 0)
        codes = np.clip(away, -128, 127).astype(np.int8)
        return Affine.make(
            codes,
            scale.astype(w.dtype),
            code_bits=8,
            signed=True,
            grouping=Grouping("block", 1, 0),
            source=SOURCE,
            name=name,
        )

    def config(self, skip: Any = ()) -> dict[str, Any]:
        """quantization_config of transformers."""
        return {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": list(skip) or None}


FORMAT = Format(
    name="eetq",
    methods=("eetq",),
    title="EETQ: int8 by output channel, interleaved",
    parse=parse,
    markers=("weight_scales",),
    suffixes=("weight_scales", "weight", "qweight"),
    load=load,
    dump=dump,
    detect=detect,
    methods_table={"EETQ": EETQ},
    evidence="source",
)
