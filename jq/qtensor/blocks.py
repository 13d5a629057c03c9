"""`Blocks`: self-contained blocks of bytes whose codes fit none of the other tensors (GGUF's IQ1-3, TQ1_0; EXL3's trellis).

A block of one of these types mixes indices into a grid of 4 or 8 signed weights, packed signs, and scales of 3 or 4
bits. Taking them apart would need more bytes than the file has (TQ1_0 stores 1.6 bits a weight), so the bytes stay as
they are and a function per type decodes them. Layouts and grids: gguf 0.19.0, gguf/quants.py (MIT), which also holds
the grids at run time. EXL3's tiles: `jq.qtensor.trellis`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import numpy as np

from jq.bits import namespace
from jq.errors import FormatError, UnsupportedError
from jq.qtensor import trellis
from jq.qtensor.base import Array, QTensor, Rows, Source, look_up, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Blocks(QTensor):
    """A weight stored as blocks of bytes: in each `KINDS[kind].elements` consecutive weights of `rows` (mostly 1) rows.

    Fields:
      codes: uint8[*stack, N / rows, K / elements * bytes], the blocks of each row one after the other.
      kind: key of `KINDS`.
      extras: stored tensors carried for saving.
    """

    kind_name: ClassVar[str] = "blocks"
    data_fields: ClassVar[tuple[str, ...]] = ("codes", "extras")

    codes: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    kind: str = "IQ2_XXS"
    dtype: str = "float32"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    @classmethod
    def make(cls, codes: Array, *, kind: str, name: str = "weight", **fields: Any) -> Self:
        """Builds from raw bytes and checks that rows hold whole blocks and scales are finite.

        Raises:
          FormatError: unknown kind, broken rows, a float16 scale that is NaN or infinite.
        """
        if kind not in KINDS:
            raise FormatError(f"{name}: unknown block type {kind!r}; known: {', '.join(KINDS)}")
        size = KINDS[kind].bytes
        if codes.dtype != np.uint8 or codes.ndim < 2 or codes.shape[-1] % size:
            raise FormatError(
                f"{name}: {codes.dtype}{tuple(codes.shape)}, expected uint8 rows of {kind} blocks of {size} bytes"
            )
        made = cls(codes, kind=kind, **fields)
        scale = KINDS[kind].scale
        if scale is None:
            return made
        scales = np.asarray(scale(np.asarray(codes).reshape(-1, size)))
        bad = int((~np.isfinite(scales)).sum())
        if bad:
            raise FormatError(f"{name}: {bad} of {scales.size} block scales are not finite; the file is damaged")
        return made

    @property
    def bits(self) -> int:
        kind = KINDS[self.kind]
        return math.ceil(8 * kind.bytes / (kind.rows * kind.elements))

    @property
    def shape(self) -> tuple[int, ...]:
        kind = KINDS[self.kind]
        *stack, rows, width = self.codes.shape
        return (*stack, rows * kind.rows, width // kind.bytes * kind.elements)

    def describe(self) -> str:
        kind = KINDS[self.kind]
        return f"{self.kind}, blocks of {kind.elements}" if kind.rows == 1 else f"{self.kind}, {self.bits} bits"

    def unpack(self) -> Array:
        raise UnsupportedError(f"{self.kind} holds no integer code per weight; use dequantize()")

    def _dense(self) -> Array:
        kind = KINDS[self.kind]
        blocks = kind.decode(self.codes.reshape(-1, kind.bytes))
        tiles = blocks.reshape(self.codes.shape[0], -1, kind.rows, kind.elements).swapaxes(1, 2)
        return tiles.reshape(self.shape).astype(np.dtype(self.dtype))

    def _rows(self, index: Rows) -> Self:
        rows = KINDS[self.kind].rows
        if rows == 1:
            return self.replace(codes=self.codes[index])
        if not isinstance(index, slice):
            return super()._rows(index)
        start, stop, step = index.indices(self.shape[-2])
        if step != 1 or start % rows or stop % rows:
            return super()._rows(index)
        return self.replace(codes=self.codes[start // rows : stop // rows])


@dataclasses.dataclass(frozen=True)
class Kind:
    """A block type: its sizes, `decode` (uint8[B, bytes] -> float32[B, rows * elements]) and its float scale, if it has one."""

    elements: int
    bytes: int
    decode: Callable[[Array], Array]
    scale: Callable[[Array], Array] | None = None
    rows: int = 1


def _words(blocks: Array, dtype: Any) -> Array:
    """Bytes [B, n] as little-endian words [B, n / itemsize]."""
    dtype = np.dtype(dtype)
    if isinstance(blocks, np.ndarray):
        return np.ascontiguousarray(blocks).view(dtype)
    return jax.lax.bitcast_convert_type(blocks.reshape(blocks.shape[0], -1, dtype.itemsize), dtype)


def _half_at(offset: int) -> Callable[[Array], Array]:
    return lambda blocks: _words(blocks[:, offset : offset + 2], np.float16).astype(np.float32)


def _fields(words: Array, shifts: tuple[int, ...], bits: int) -> Array:
    """int32[B, n * len(shifts)]: for each word of [B, n] its fields at `shifts`, side by side."""
    fields = (words.astype(np.uint32)[..., None] >> np.array(shifts, np.uint32)) & np.uint32((1 << bits) - 1)
    return fields.reshape(words.shape[0], -1).astype(np.int32)


@functools.cache
def _table(name: str, attribute: str = "grid") -> np.ndarray:
    """A grid float32[entries, width] or the sign table of the gguf package.

    Raises:
      UnsupportedError: the gguf package is not installed.
    """
    try:
        from gguf import quants
    except ImportError as e:
        raise UnsupportedError(
            f"GGUF type {name}: its grid comes from the gguf package, which is not installed: pip install gguf"
        ) from e
    owner = getattr(quants, name)
    if attribute != "grid":
        return np.frombuffer(getattr(owner, attribute), np.uint8).astype(np.int32)
    owner.init_grid()
    return np.asarray(owner.grid, np.float32).reshape(owner.grid_shape)


def _points(name: str, index: Array) -> Array:
    """Grid points float32[B, n, width] of indices [B, n]."""
    return look_up(_table(name), index)


def _signs(bits: Array) -> Array:
    """+1 or -1, float32[B, n, 8], from sign bytes int32[B, n]; bit i belongs to weight i."""
    bit = (bits[..., None] >> np.arange(8, dtype=np.int32)) & 1
    return 1 - 2 * bit.astype(np.float32)


def _sign_table(index: Array) -> Array:
    """Sign bytes of 7-bit indices: the eighth sign makes the number of minus signs even."""
    return look_up(_table("IQ2_XXS", "ksigns"), index)


def _scaled(points: Array, signs: Array, scales: Array) -> Array:
    """scale * point * sign; every product is exact in float32 (11 + 5 + 6 bits), so the order is free.

    points [B, n, width] and signs [B, n', 8] cover 256 weights; scales [B, s], one for 256 / s of them.
    """
    count = points.shape[0]
    weights = points.reshape(count, 256) * signs.reshape(count, 256)
    return (weights.reshape(count, scales.shape[1], -1) * scales[..., None]).reshape(count, 256)


def _iq2_xxs(b: Array) -> Array:
    """d f16, then for each 32 weights 4 grid bytes and a word: 4 sign indices of 7 bits, 4 bits of scale."""
    words = _words(b[:, 2:], np.uint32).reshape(b.shape[0], 8, 2)
    index = b[:, 2:].reshape(b.shape[0], 8, 8)[..., :4].reshape(b.shape[0], 32).astype(np.int32)
    signs = _sign_table(_fields(words[..., 1], (0, 7, 14, 21), 7))
    scales = (_half_at(0)(b) * (0.5 + (words[..., 1] >> 28).astype(np.float32))) * np.float32(0.25)
    return _scaled(_points("IQ2_XXS", index), _signs(signs), scales)


def _iq2_xs(b: Array) -> Array:
    """d f16, 32 words of 9 index and 7 sign bits, 8 bytes of two 4-bit scales (16 weights each)."""
    words = _words(b[:, 2:66], np.uint16).astype(np.int32)
    scales = (_half_at(0)(b) * (0.5 + _fields(b[:, 66:74], (0, 4), 4).astype(np.float32))) * np.float32(0.25)
    return _scaled(_points("IQ2_XS", words & 511), _signs(_sign_table(words >> 9)), scales)


def _iq2_s(b: Array) -> Array:
    """d f16, 32 low index bytes, 32 sign bytes, 8 bytes of 2 high index bits, 8 bytes of two 4-bit scales."""
    index = b[:, 2:34].astype(np.int32) | (_fields(b[:, 66:74], (0, 2, 4, 6), 2) << 8)
    scales = (_half_at(0)(b) * (0.5 + _fields(b[:, 74:82], (0, 4), 4).astype(np.float32))) * np.float32(0.25)
    return _scaled(_points("IQ2_S", index), _signs(b[:, 34:66].astype(np.int32)), scales)


def _iq3_xxs(b: Array) -> Array:
    """d f16, 64 grid bytes (4 weights each), 8 words of four 7-bit sign indices and a 4-bit scale."""
    words = _words(b[:, 66:98], np.uint32)
    scales = (_half_at(0)(b) * (0.5 + (words >> 28).astype(np.float32))) * np.float32(0.5)
    signs = _sign_table(_fields(words, (0, 7, 14, 21), 7))
    return _scaled(_points("IQ3_XXS", b[:, 2:66].astype(np.int32)), _signs(signs), scales)


def _iq3_s(b: Array) -> Array:
    """d f16, 64 low index bytes, 8 bytes of high bits, 32 sign bytes, 4 bytes of two 4-bit scales (32 weights each)."""
    index = b[:, 2:66].astype(np.int32) | (_fields(b[:, 66:74], tuple(range(8)), 1) << 8)
    scales = _half_at(0)(b) * (1 + 2 * _fields(b[:, 106:110], (0, 4), 4)).astype(np.float32)
    return _scaled(_points("IQ3_S", index), _signs(b[:, 74:106].astype(np.int32)), scales)


def _shifted(points: Array, minus: Array, scales: Array) -> Array:
    """scale * (point +- 1/8): points [B, n, 8], `minus` [B, m] where the shift is negative, scales [B, s]."""
    count = points.shape[0]
    shift = (0.125 - 0.25 * minus.astype(np.float32))[..., None]
    weights = points.reshape(count, minus.shape[1], -1) + shift
    return (weights.reshape(count, scales.shape[1], -1) * scales[..., None]).reshape(count, 256)


def _iq1_s(b: Array) -> Array:
    """d f16, 32 low index bytes, 8 words: four 3-bit high parts, a 3-bit scale, the sign of the shift."""
    words = _words(b[:, 34:50], np.uint16).astype(np.int32)
    index = b[:, 2:34].astype(np.int32) | (_fields(words, (0, 3, 6, 9), 3) << 8)
    scales = _half_at(0)(b) * (2 * ((words >> 12) & 7) + 1).astype(np.float32)
    return _shifted(_points("IQ1_S", index), words >> 15, scales)


def _iq1_m_scale(b: Array) -> Array:
    """The float16 d of IQ1_M, a nibble in the top of each of the last four words, float32[B, 1]."""
    top = _words(b[:, 48:56], np.uint16).astype(np.int32) >> 12
    bits = top[:, 0] | (top[:, 1] << 4) | (top[:, 2] << 8) | (top[:, 3] << 12)
    bits = bits.astype(np.uint16)[:, None]
    half = bits.view(np.float16) if isinstance(bits, np.ndarray) else jax.lax.bitcast_convert_type(bits, np.float16)
    return half.astype(np.float32)


def _iq1_m(b: Array) -> Array:
    """32 low index bytes, 16 bytes of two (3 high bits, sign of the shift), 4 words of 3-bit scales and d."""
    high = _fields(b[:, 32:48], (0, 4), 4)
    index = b[:, :32].astype(np.int32) | ((high & 7) << 8)
    small = _fields(_words(b[:, 48:56], np.uint16), (0, 3, 6, 9), 3)
    scales = _iq1_m_scale(b) * (2 * small + 1).astype(np.float32)
    return _shifted(_points("IQ1_M", index), high >> 3, scales)


def _tq1_0(b: Array) -> Array:
    """52 bytes of base-3 digits (five a byte, four in the last 4 bytes), d f16. A byte is ceil(value * 256 / 243)."""
    parts = []
    for low, high, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        # The digit is the integer part of 3 * fraction; multiplying by 3**i modulo 256 drops the digits before it.
        power = np.array([3**i for i in range(digits)], np.int32)[:, None]
        rest = (b[:, None, low:high].astype(np.int32) * power) & 255
        parts.append(((rest * 3) >> 8).reshape(b.shape[0], -1))
    codes = namespace(b).concatenate(parts, axis=1) - 1
    return _half_at(52)(b) * codes.astype(np.float32)


def _trellis(bits: int, codebook: str) -> Callable[[Array], Array]:
    return lambda blocks: trellis.decode(_words(blocks, np.uint32), bits, codebook)


KINDS: dict[str, Kind] = {
    "IQ2_XXS": Kind(256, 66, _iq2_xxs, _half_at(0)),
    "IQ2_XS": Kind(256, 74, _iq2_xs, _half_at(0)),
    "IQ2_S": Kind(256, 82, _iq2_s, _half_at(0)),
    "IQ3_XXS": Kind(256, 98, _iq3_xxs, _half_at(0)),
    "IQ3_S": Kind(256, 110, _iq3_s, _half_at(0)),
    "IQ1_S": Kind(256, 50, _iq1_s, _half_at(0)),
    "IQ1_M": Kind(256, 56, _iq1_m, _iq1_m_scale),
    "TQ1_0": Kind(256, 54, _tq1_0, _half_at(52)),
}
KINDS |= {
    f"EXL3 {book} {bits}": Kind(16, 32 * bits, _trellis(bits, book), rows=16)
    for book in trellis.CODEBOOKS
    for bits in trellis.BITS
}

__all__ = ["KINDS", "Blocks", "Kind"]
