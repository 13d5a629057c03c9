"""Packing of b-bit codes into machine words.

Canonical order of jaxq: the codes of a row (last axis) form one little-endian bit stream, element k at stream bits
[k*b, (k+1)*b). A row is stored as uint32 words where its bits fill whole words, else as bytes; the unused bits of
the last byte are zero. Everything else (`unpack_words`) describes the orders that other libraries store.

All functions take numpy or JAX arrays and return the same kind; the JAX forms work under jit.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # numpy.ndarray | jax.Array

if sys.byteorder != "little":  # every layout below views words as bytes
    raise ImportError("jaxq needs a little-endian machine")


def namespace(*arrays: Array) -> Any:
    """`numpy` if every array is a numpy array (or scalar), else `jax.numpy`."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _at_once(array: Array) -> bool:
    """Whether to run one program, where JAX would else compile, and hold the result of, each operation."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def word_dtype(bits: int, count: int) -> np.dtype:
    """Word type of a packed row: uint32 where `count` codes of `bits` bits fill whole words, else uint8."""
    return np.dtype(np.uint32 if bits * count % 32 == 0 else np.uint8)


def capacity(words: Array, bits: int) -> int:
    """Number of whole codes that a packed row has room for (padding included)."""
    return words.shape[-1] * 8 * words.dtype.itemsize // bits


def pack(codes: Array, bits: int, *, axis: int = -1) -> Array:
    """Packs codes along one axis, in the canonical order.

    Args:
      codes: integer[..., K]; only the low `bits` bits of each are used, so signed codes pack as two's complement.
      bits: 1..16.
      axis: the one of K codes.

    Returns:
      uint32[..., K*bits/32] if that is whole, else uint8[..., ceil(K*bits/8)], the words along the same axis.

    Example:
      >>> pack(np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), 4)
      array([[2271560481]], dtype=uint32)
    """
    _check_bits(bits)
    return (_pack_jit if _at_once(codes) else _pack)(codes, bits, axis)


def _pack(codes: Array, bits: int, axis: int) -> Array:
    xp = namespace(codes)
    if axis != -1:
        return xp.moveaxis(_pack(xp.moveaxis(codes, axis, -1), bits, -1), -1, axis)
    dtype = word_dtype(bits, codes.shape[-1])
    width = 8 * dtype.itemsize
    mask = (1 << bits) - 1
    if 32 % bits == 0:  # a code lies inside one word (or byte)
        work = np.uint32 if width == 32 or bits > 8 else np.uint8
        codes = (codes.astype(np.int32) & mask).astype(work)
        if bits > 8 and width == 8:
            return _split_bytes(codes, bits, xp)
        per = width // bits
        codes = _pad_last(codes, per, xp)
        codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per, per)
        shifts = (bits * np.arange(per)).astype(work)
        return _or_last(codes << shifts, xp).astype(dtype)
    codes = (codes.astype(np.int32) & mask).astype(np.uint32)
    stream = ((codes[..., None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)).astype(np.uint8)
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    stream = _pad_last(stream, width, xp)
    stream = stream.reshape(*stream.shape[:-1], stream.shape[-1] // width, width).astype(dtype)
    return _or_last(stream << np.arange(width).astype(dtype), xp).astype(dtype)


_pack_jit = jax.jit(_pack, static_argnums=(1, 2))


def unpack(words: Array, bits: int, count: int | None = None, *, signed: bool = False, axis: int = -1) -> Array:
    """Inverse of `pack`.

    Args:
      words: integer[..., W] of any width, signed or not: the stream that `pack` makes, as it lies in memory.
      bits: 1..16.
      count: number of codes to return (K); default all that fit.
      signed: read each code as a two's complement number of `bits` bits.
      axis: the one of W words.

    Returns:
      int32[..., count], the codes along the same axis.

    Raises:
      ValueError: more codes than the words have, or words that are no integers.
    """
    _check_bits(bits)
    return (_unpack_jit if _at_once(words) else _unpack)(words, bits, count, signed, axis)


def _unpack(words: Array, bits: int, count: int | None, signed: bool, axis: int) -> Array:
    if axis != -1:
        xp = namespace(words)
        return xp.moveaxis(_unpack(xp.moveaxis(words, axis, -1), bits, count, signed, -1), -1, axis)
    words = _unsigned(words)
    width = 8 * words.dtype.itemsize
    room = words.shape[-1] * width // bits
    count = room if count is None else count
    if count > room:
        raise ValueError(f"unpack: {count} codes of {bits} bits asked of {words.shape[-1]} words of {width} bits")
    if bits == width:
        codes = words.astype(np.int32)
    elif width % bits == 0:
        shifts = (bits * np.arange(width // bits)).astype(words.dtype)
        codes = ((words[..., None] >> shifts) & words.dtype.type((1 << bits) - 1)).astype(np.int32)
        codes = codes.reshape(*words.shape[:-1], room)
    else:
        codes = _stream(words, bits, count)
    codes = codes[..., :count]
    if signed:
        codes = (codes ^ np.int32(1 << (bits - 1))) - np.int32(1 << (bits - 1))
    return codes


_unpack_jit = jax.jit(_unpack, static_argnums=(1, 2, 3, 4))


def _unsigned(words: Array) -> Array:
    """Words of any integer dtype as uint32 or uint8, the two that streams are read from."""
    if words.dtype in (np.uint32, np.uint8):
        return words
    if words.dtype.kind not in "iu":
        raise ValueError(f"unpack: words are {words.dtype}, expected integers")
    if words.dtype.itemsize == 4:
        return words.view(np.uint32)
    if words.dtype.itemsize > 1 and isinstance(words, np.ndarray):
        words = np.ascontiguousarray(words)
    return words.view(np.uint8)


def _stream(words: Array, bits: int, count: int) -> Array:
    """int32[..., count]: codes that may straddle words; the form that is the fastest where it runs."""
    gather = functools.partial(_gather_stream, bits=bits, count=count)
    if isinstance(words, np.ndarray):
        return gather(words)
    select = functools.partial(_select_stream, bits=bits, count=count)
    return jax.lax.platform_dependent(words, cpu=gather, default=select)


def _gather_stream(words: Array, bits: int, count: int) -> Array:
    """Low part of one word, high part of the next, each looked up."""
    xp = namespace(words)
    if words.dtype == np.uint8:  # a code touches at most 3 bytes (bits <= 16)
        first = bits * np.arange(count) // 8
        words = _pad_by(words, 2, xp).astype(np.uint32)
        word = words[..., first] | (words[..., first + 1] << np.uint32(8)) | (words[..., first + 2] << np.uint32(16))
        offset = (bits * np.arange(count) % 8).astype(np.uint32)
        return ((word >> offset) & np.uint32((1 << bits) - 1)).astype(np.int32)
    start = bits * np.arange(count)
    first, offset = start // 32, (start % 32).astype(np.uint32)
    words = _pad_by(words, 1, xp)
    low = words[..., first] >> offset
    straddles = offset.astype(np.int64) + bits > 32
    high = words[..., first + 1] << np.where(straddles, 32 - offset, 0).astype(np.uint32)
    word = low | xp.where(straddles, high, np.uint32(0))
    return (word & np.uint32((1 << bits) - 1)).astype(np.int32)


def _select_stream(words: Array, bits: int, count: int) -> Array:
    """`_gather_stream` of JAX arrays without a gather or a concatenation, neither of which XLA fuses on a GPU.

    `period` words hold `per` codes, and then the pattern repeats. A code lies in the word that it starts in and in
    those ahead of it that it reaches into; which words these are, a chain of selections by the code's place tells.
    """
    width = 8 * words.dtype.itemsize
    common = math.gcd(bits, width)
    period, per = bits // common, width // common
    words = _pad_last(words, period, jnp)
    blocks = words.reshape(*words.shape[:-1], words.shape[-1] // period, period)
    start = bits * np.arange(per)
    first, offset, last = start // width, (start % width).astype(np.uint32), (start + bits - 1) // width

    def word(ahead: int) -> Array:
        """uint32[..., blocks, per or 1]: the word `ahead` of each code's first; any word where the code ends before it."""
        places = (first + ahead)[last >= first + ahead]
        found = blocks[..., places[0] : places[0] + 1]
        for i in range(places[0] + 1, places[-1] + 1):
            found = jnp.where(first + ahead >= i, blocks[..., i : i + 1], found)
        return found.astype(np.uint32)

    codes = word(0) >> offset
    for ahead in range(1, int((last - first).max()) + 1):  # two shifts, since one by 32 bits is undefined
        codes = codes | (word(ahead) << np.uint32(1)) << (np.uint32(width * ahead - 1) - offset)
    codes = (codes & np.uint32((1 << bits) - 1)).astype(np.int32)
    return codes.reshape(*words.shape[:-1], words.shape[-1] // period * per)[..., :count]


def unpack_words(words: Array, shifts: tuple[int, ...], bits: int) -> Array:
    """Unpacks words whose i-th code (in element order) lies at bit `shifts[i]`.

    Args:
      words: unsigned or signed integer[..., W] of 8, 16, 32 or 64 bits.
      shifts: bit position of each of the P codes of a word.
      bits: width of a code.

    Returns:
      int32[..., W * P], codes of one word side by side.
    """
    xp = namespace(words)
    unsigned = np.dtype(f"u{words.dtype.itemsize}")
    words = words.view(unsigned) if words.dtype != unsigned else words
    codes = (words[..., None] >> np.array(shifts, unsigned)) & unsigned.type((1 << bits) - 1)
    return xp.reshape(codes.astype(np.int32), (*words.shape[:-1], words.shape[-1] * len(shifts)))


def pack_words(codes: Array, shifts: tuple[int, ...], bits: int, dtype: Any) -> Array:
    """Inverse of `unpack_words`: integer[..., W * P] -> dtype[..., W]; bits of a word that no code uses are zero."""
    xp = namespace(codes)
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    per = len(shifts)
    if codes.shape[-1] % per:
        raise ValueError(f"pack_words: {codes.shape[-1]} codes do not fill words of {per}")
    codes = (codes.astype(np.int32) & ((1 << bits) - 1)).astype(unsigned)
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per, per) << np.array(shifts, unsigned)
    return _or_last(codes, xp).view(dtype)


def unpack_planar(words: Array, planes: tuple[tuple[int, int], ...], bits: int) -> Array:
    """Unpacks planar words: per 32 codes `bits` words, one plane after the other.

    A plane of width w at code bit o takes w words; word i of it holds bits [o, o+w) of codes i*(32/w) .. in order.

    Args:
      words: int32 or uint32[..., bits * n], n blocks of 32 codes.
      planes: (width, bit offset) of each plane in storage order, e.g. ((2, 0), (1, 2)) for 3 bits.
      bits: width of a code.

    Returns:
      int32[..., 32 * n].
    """
    xp = namespace(words)
    words = words.view(np.uint32)
    blocks = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits)
    codes, row = None, 0
    for width, offset in planes:
        part = unpack_words(blocks[..., row : row + width], tuple(range(0, 32, width)), width) << offset
        codes = part if codes is None else codes | part
        row += width
    return xp.reshape(codes, (*words.shape[:-1], words.shape[-1] // bits * 32))


def pack_planar(codes: Array, planes: tuple[tuple[int, int], ...], bits: int) -> Array:
    """Inverse of `unpack_planar`: integer[..., 32 * n] -> int32[..., bits * n]."""
    xp = namespace(codes)
    if codes.shape[-1] % 32:
        raise ValueError(f"pack_planar: {codes.shape[-1]} codes are not a multiple of 32")
    blocks = codes.astype(np.int32).reshape(*codes.shape[:-1], codes.shape[-1] // 32, 32)
    parts = [
        pack_words((blocks >> offset) & ((1 << width) - 1), tuple(range(0, 32, width)), width, np.int32)
        for width, offset in planes
    ]
    words = xp.concatenate(parts, axis=-1)
    return words.reshape(*codes.shape[:-1], codes.shape[-1] // 32 * bits)


def as_words(rows: np.ndarray) -> np.ndarray:
    """Rows of packed bits, stored under any dtype, in the words that `pack` makes of them: uint32, or uint8."""
    rows = np.ascontiguousarray(rows).view(np.uint8)
    return rows.view(np.uint32) if rows.shape[-1] % 4 == 0 else rows


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1..16, got {bits}")


def _pad_last(a: Array, multiple: int, xp: Any) -> Array:
    return _pad_by(a, -a.shape[-1] % multiple, xp)


def _pad_by(a: Array, extra: int, xp: Any) -> Array:
    return xp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, extra)]) if extra else a


def _split_bytes(codes: Array, bits: int, xp: Any) -> Array:
    """16-bit codes as bytes, low byte first."""
    parts = [(codes >> np.uint32(8 * i)).astype(np.uint8) for i in range(bits // 8)]
    return xp.stack(parts, axis=-1).reshape(*codes.shape[:-1], codes.shape[-1] * (bits // 8))


def _or_last(a: Array, xp: Any) -> Array:
    """Bitwise or over the last axis (the fields are disjoint)."""
    if xp is np:
        return np.bitwise_or.reduce(a, axis=-1)
    return jax.lax.reduce(a, np.zeros((), a.dtype), jax.lax.bitwise_or, (a.ndim - 1,))
