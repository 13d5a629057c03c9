"""Repack of codes and parameters into the order of the kernels, and back.

Codes lie in the order of the A fragment of mma.sync m16n8k16 (and of each warp of wgmma m64nNk16): a thread's share of
a tile of 16 rows x 64 inputs is one 4-bit or two 8-bit words for each k16 step, in pieces of 16 bytes; the first pieces
of all 32 lanes are contiguous, then the second ones, and the tile is contiguous as a whole. So a kernel reads it with
conflict-free loads of 16 bytes per thread and no shuffle. The repack is a bijection: `unpack_codes` gives the codes
back, and no bit is added except the padding to full tiles (zeros).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.form import CHUNK, ROWS

BITS = {"split": 4, "natural": 4, "bytes": 8, "pairs": 8}  # of a code, by order


def _places(order: str) -> tuple[jax.Array, jax.Array]:
    """Word of a step and bit in it of each code of a thread: [2 (half of k16), 2 (rows g, g + 8), 2 (element)], as
    `decode` says."""
    k_half, row_half, element = jnp.arange(2)[:, None, None], jnp.arange(2)[None, :, None], jnp.arange(2)
    register = 2 * k_half + row_half
    if BITS[order] == 8:
        row, column = (8, 16) if order == "bytes" else (16, 8)
        return register // 2 + 0 * element, (row * (register % 2) + column * element).astype(jnp.uint32)
    bits = 4 * register + 16 * element if order == "split" else 8 * register + 4 * element
    return 0 * bits, bits.astype(jnp.uint32)


def pack_codes(codes: jax.Array, order: str) -> jax.Array:
    """uint8[N, K] codes -> int32[ceil(N / 16), ceil(K / 64), 32 * bits].

    Args:
      order: see `pallas_kernels.decode`: "split" or "natural" for 4-bit codes, "bytes" or "pairs" for 8-bit ones.
    """
    n, k = codes.shape
    codes = jnp.pad(codes, ((0, -n % ROWS), (0, -k % CHUNK)))
    tiles, chunks = codes.shape[0] // ROWS, codes.shape[1] // CHUNK
    c = codes.reshape(tiles, 2, 8, chunks, 4, 2, 4, 2)  # tile, row half, g | chunk, step, k half, t, element
    c = c.transpose(0, 3, 2, 6, 4, 5, 1, 7).astype(jnp.uint32)  # tile, chunk, g, t, step | k half, row half, element
    place, shift = _places(order)
    count = BITS[order] // 4  # words of a step
    shifted = c << shift
    words = [jnp.where(place == i, shifted, 0).sum((-3, -2, -1), dtype=jnp.uint32) for i in range(count)]
    # tile, chunk, lane, words in the order of the steps -> pieces of four words, lane, word
    w = jnp.stack(words, -1).reshape(tiles, chunks, 32, count, 4).swapaxes(2, 3)
    return jax.lax.bitcast_convert_type(w, jnp.int32).reshape(tiles, chunks, count * 128)


def unpack_codes(words: jax.Array, order: str, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `pack_codes`: uint8[N, K]."""
    tiles, chunks, _ = words.shape
    place, shift = _places(order)
    count = BITS[order] // 4
    w = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(tiles, chunks, count, 32, 4).swapaxes(2, 3)
    w = w.reshape(tiles, chunks, 8, 4, 4, count)
    c = (w[..., place] >> shift) & (2 ** (4 * count) - 1)
    c = c.astype(jnp.uint8).transpose(0, 6, 2, 1, 4, 5, 3, 7)  # tile, row half, g, chunk, step, k half, t, element
    return c.reshape(tiles * ROWS, chunks * CHUNK)[: shape[0], : shape[1]]


def pack_rows(params: jax.Array) -> jax.Array:
    """[N, G] scales or zeros -> [ceil(N / 16), G, 16]; the values of rows g and g + 8 are neighbours."""
    n, groups = params.shape
    p = jnp.pad(params, ((0, -n % ROWS), (0, 0)))
    return p.reshape(-1, 2, 8, groups).transpose(0, 3, 2, 1).reshape(-1, groups, ROWS)


def unpack_rows(params: jax.Array, rows: int) -> jax.Array:
    """The inverse of `pack_rows`: [N, G]."""
    tiles, groups, _ = params.shape
    return params.reshape(tiles, groups, 8, 2).transpose(0, 3, 2, 1).reshape(tiles * ROWS, groups)[:rows]
