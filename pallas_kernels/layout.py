"""Repack of codes and parameters into the order of the kernels, and back.

Codes lie in the order of the A fragment of mma.sync m16n8k16 (and of each warp of wgmma m64nNk16): a thread's share of
a tile of 16 rows x 64 inputs is contiguous, four 4-bit words of 16 bytes, and the tile is one contiguous 512 bytes. So
a kernel reads it with one conflict-free load per thread and no shuffle. The repack is a bijection: `unpack_codes`
gives the codes back, and no bit is added except the padding to full tiles (zeros).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.form import CHUNK, ROWS


def _shifts(order: str) -> jax.Array:
    """Bit of a 4-bit code in its word: uint32[2 (half of k16), 2 (rows g, g + 8), 2 (element)]; see `decode`."""
    k_half, row_half, element = jnp.arange(2)[:, None, None], jnp.arange(2)[None, :, None], jnp.arange(2)
    register = 2 * k_half + row_half
    bits = 4 * register + 16 * element if order == "split" else 8 * register + 4 * element
    return bits.astype(jnp.uint32)


def pack_codes(codes: jax.Array, order: str) -> jax.Array:
    """uint8[N, K] codes of 0..15 -> int32[ceil(N / 16), ceil(K / 64), 128].

    Args:
      order: "split" or "natural", see `pallas_kernels.decode`.
    """
    n, k = codes.shape
    codes = jnp.pad(codes, ((0, -n % ROWS), (0, -k % CHUNK)))
    tiles, chunks = codes.shape[0] // ROWS, codes.shape[1] // CHUNK
    c = codes.reshape(tiles, 2, 8, chunks, 4, 2, 4, 2)  # tile, row half, g | chunk, step, k half, t, element
    c = c.transpose(0, 3, 2, 6, 4, 5, 1, 7).astype(jnp.uint32)  # tile, chunk, g, t, step | k half, row half, element
    words = (c << _shifts(order)).sum((-3, -2, -1), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(tiles, chunks, 128)


def unpack_codes(words: jax.Array, order: str, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `pack_codes`: uint8[N, K]."""
    tiles, chunks, _ = words.shape
    w = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(tiles, chunks, 8, 4, 4)
    c = (w[..., None, None, None] >> _shifts(order)) & 15
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
