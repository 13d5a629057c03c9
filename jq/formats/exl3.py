"""EXL3 (exllamav3, GPT-QModel): trellis codes of weights whose inputs and outputs are rotated by Hadamard matrices of 128.

    trellis   int16 [K/16, N/16, 16*b]   tiles of 16 x 16 weights, b = 1..8 bits (`jq.qtensor.trellis`); each layer its own b
    suh, svh  float16 [K], [N]           signs and scales of inputs and outputs
    su, sv    int16 [K/16], [N/16]       the same in old files, signs alone: a set bit, lowest first, is -1
    mcg, mul1 int32 []                   the multiplier of a codebook; neither: codebook "3inst"

weight = diag(svh) H (inner) H diag(suh), H / sqrt(128) block by block, of the transposed inner weight that the tiles give,
computed in float32. The inner weight is exact; exllamav3 rotates inputs and outputs instead, in float16.

Sizes that are no multiple of 128 are stored with padding (zeros that were quantized along): where the model's config has
the size, the padding is cut off. exllamav3 fills `lm_head` for models that tie it to the embedding too, as it quantizes it.

Source: exllamav3 1.4.1 (modules/quant/exl3.py, conversion/), which needs CUDA; held against gptqmodel 7.7.0's torch layer
(nn_modules/exllamav3_torch.py) on a CPU. No file of exllamav3 itself was at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_one, expect_shape, take, warn_unknown
from jq.formats.layer_shapes import in_features_of, out_features_of
from jq.qtensor import Blocks, Rotated, Source
from jq.qtensor.trellis import BITS, MULTIPLIERS

SIDE = 128  # of a Hadamard matrix
TILE = 16
SUFFIXES = ("trellis", "suh", "svh", "su", "sv", *MULTIPLIERS)
KNOWN = (
    "quant_method method format checkpoint_format version bits head_bits calibration out_scales codebook tensor_storage "
    "original_quantization_config group_size desc_act sym lm_head pack_dtype meta dynamic"
)
_REFUSED = ("adapter", "rotation")  # of GPT-QModel's configs


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing that the stored tensors do not tell."""


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config; widths and codebooks are those of the tensors.

    Raises:
      UnsupportedError: another storage under this name, GPT-QModel's adapters or its own rotations.
    """
    for key in ("format", "checkpoint_format"):
        if config.get(key) not in (None, "exl3"):
            raise UnsupportedError(
                f"{context.label}: quantization_config.{key} is {config[key]!r:.60}, expected 'exl3'"
            )
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedError(
                f"{context.label}: quantization_config.{key} = {config[key]!r:.60} is not done for exl3"
            )
    warn_unknown(config, (*KNOWN.split(), *_REFUSED), context.label)
    return Options()


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Rotated:
    """One module's tensors as rotated `Blocks`.

    Raises:
      FormatError: missing tensors, shapes or dtypes that do not fit together, two codebooks.
      UnsupportedError: another multiplier than the library's.
    """
    tiles = take(parts, "trellis", prefix)
    expect_dtype(tiles, (np.int16,), f"{prefix}.trellis")
    bits = tiles.shape[-1] // 16 if tiles.ndim == 3 else 0
    if bits not in BITS or tiles.shape[-1] % 16 or 0 in tiles.shape:
        raise FormatError(f"{prefix}.trellis: found shape {tuple(tiles.shape)}, expected (K/16, N/16, 16 * 1..8 bits)")
    k, n = TILE * tiles.shape[0], TILE * tiles.shape[1]
    if k % SIDE or n % SIDE:
        raise FormatError(f"{prefix}.trellis: {k} inputs and {n} outputs, expected multiples of {SIDE}")
    (columns, signs_in), (rows, signs_out) = _scale(prefix, parts, "su", k), _scale(prefix, parts, "sv", n)
    book, extras = _codebook(prefix, parts)
    codes = np.ascontiguousarray(tiles.swapaxes(0, 1)).view(np.uint8).reshape(n // TILE, -1)
    base = Blocks.make(codes, kind=f"EXL3 {book} {bits}", name=f"{prefix}.trellis")
    own_k = in_features_of(prefix, 0, context.config, lambda size: -(-size // SIDE) * SIDE == k) or k
    own_n = out_features_of(prefix, context.config, lambda size: -(-size // SIDE) * SIDE == n) or n
    made = Rotated(
        base,
        column_scale=columns,
        row_scale=rows,
        extras=extras,
        block=SIDE,
        out_block=SIDE,
        padding=(n - own_n, k - own_k),
        dtype="float32",
        source=Source("exl3", (("signs", (signs_in, signs_out)),) if signs_in or signs_out else ()),
    )
    made.check(prefix)
    return made


def _scale(prefix: str, parts: Parts, name: str, count: int) -> tuple[np.ndarray, bool]:
    """(scales of one side, whether they are stored as signs)."""
    if f"{name}h" in parts:
        scale = parts[f"{name}h"]
        expect_dtype(scale, (np.float16,), f"{prefix}.{name}h")
        expect_shape(scale, (count,), f"{prefix}.{name}h", "one for each row or column of the tiles")
        return scale, False
    bits = take(parts, name, prefix, why=f"Neither {name}h nor {name} is there.")
    expect_dtype(bits, (np.int16,), f"{prefix}.{name}")
    expect_shape(bits, (count // 16,), f"{prefix}.{name}", "a bit for each row or column of the tiles")
    return 1 - 2 * np.unpackbits(bits.view(np.uint8), bitorder="little").astype(np.float16), True


def _codebook(prefix: str, parts: Parts) -> tuple[str, Parts]:
    """(name, stored multiplier): the library reads only whether the tensor is there, and writes one number into it."""
    found = {name: parts[name] for name in MULTIPLIERS if name in parts}
    if len(found) > 1:
        raise FormatError(f"{prefix}.mcg: is there beside mul1; a layer has one codebook")
    for name, value in found.items():
        expect_dtype(value, (np.int32,), f"{prefix}.{name}")
        expect_one(value, f"{prefix}.{name}")
        number = int(value.reshape(()).view(np.uint32))
        if number != MULTIPLIERS[name]:
            raise UnsupportedError(
                f"{prefix}.{name}: multiplier {number:#x}, the codebook is made with {MULTIPLIERS[name]:#x}"
            )
    return next(iter(found), "3inst"), found


def dump(q: Rotated) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    codes = np.asarray(q.base.codes)
    n, k = q.base.shape
    tiles = np.ascontiguousarray(codes.reshape(n // TILE, k // TILE, -1).swapaxes(0, 1)).view(np.int16)
    found: Parts = {"trellis": tiles, **{name: np.asarray(value) for name, value in q.extras.items()}}
    packed = q.source.get("signs", (False, False))
    for name, scale, signs in (("su", q.column_scale, packed[0]), ("sv", q.row_scale, packed[1])):
        scale = np.asarray(scale)
        if signs:
            found[name] = np.packbits(scale < 0, bitorder="little").view(np.int16)
        else:
            found[f"{name}h"] = scale
    return found


FORMAT = Format(
    name="exl3",
    methods=("exl3",),
    title="EXL3 (exllamav3): trellis codes of 1 to 8 bits, inputs and outputs rotated",
    parse=parse,
    markers=("trellis",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    evidence="library",
)
