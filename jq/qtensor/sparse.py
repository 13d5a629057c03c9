"""`Sparse`: values at the places that a bit mask names, zero elsewhere; a dense weight's, or a quantized one's codes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jq import bits as _bits
from jq.bits import namespace
from jq.errors import FormatError, UnsupportedError
from jq.qtensor.base import Array, QTensor, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sparse(QTensor):
    """`weight[n, k]` = the next value in row-major order where bit k of mask row n is set, else 0.

    A weight of its own where values are floats; or, with integer values, the `codes` of an `Affine` or `NarrowFloat`
    (which then reads one integer per weight from it).

    Fields:
      values: [*stack, ...] in row-major order, their number the number of set bits; or packed codes [*stack, N, W]
        (`jq.bits.pack`) where `value_bits` > 0, two's complement.
      mask: uint8[*stack, N, ceil(K / 8)], bit k % 8 (lowest first) of byte k // 8.
      extras: stored tensors carried for saving.
      pad: bits of the mask behind column K.
      dtype: of the dense result.
    """

    kind_name: ClassVar[str] = "sparse"
    data_fields: ClassVar[tuple[str, ...]] = ("values", "mask", "extras")

    values: Array
    mask: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    value_bits: int = 0
    dtype: str = "bfloat16"
    pad: int = 0
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the number of values is not that of the mask's set bits."""
        mask = np.asarray(self.mask)
        if self.pad and (mask[..., -1] >> (8 - self.pad)).any():
            raise FormatError(f"{name}: bitmask has bits set behind column {self.shape[-1]}; the file is damaged")
        there = int(np.bitwise_count(mask).sum(dtype=np.int64))
        values = np.asarray(self.values)
        count = values.size if not self.value_bits else values.size * 8 * values.itemsize // self.value_bits
        if there != count:
            raise FormatError(f"{name}: bitmask keeps {there} values, but {count} are stored; the file is damaged")

    @property
    def bits(self) -> int:
        return self.value_bits or 8 * self.values.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.mask.shape[:-1], 8 * self.mask.shape[-1] - self.pad)

    def describe(self) -> str:
        stored = (
            self.values.size if not self.value_bits else self.values.size * 8 * self.values.dtype.itemsize // self.bits
        )
        return f"{stored / max(self.size, 1):.0%} kept by bitmask, {self.bits}-bit values"

    def unpack(self) -> Array:
        if np.dtype(self.dtype).kind not in "iu":
            raise UnsupportedError("a sparse weight of floats has no integer codes; dequantize() gives its values")
        return self._dense().astype(np.int32)

    def _dense(self) -> Array:
        n, k = self.shape
        values = self.values if not self.value_bits else _bits.unpack(self.values, self.value_bits, signed=True)
        values = values.reshape(-1).astype(np.dtype(self.dtype))
        if namespace(values, self.mask) is np:
            dense = np.zeros((n, k), values.dtype)
            dense[np.unpackbits(self.mask, axis=1, count=k, bitorder="little").astype(bool)] = values
            return dense
        if values.size == 0:
            return jnp.zeros((n, k), values.dtype)
        mask = jnp.asarray(self.mask)
        counts = jax.lax.population_count(mask).astype(jnp.int32).reshape(-1)
        before = (jnp.cumsum(counts) - counts).reshape(mask.shape)  # values stored before each byte
        lower = np.array([(1 << i) - 1 for i in range(8)], np.uint8)
        place = before[..., None] + jax.lax.population_count(mask[..., None] & lower).astype(jnp.int32)
        kept = ((mask[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)).astype(bool)
        found = jnp.take(values, place, mode="clip")
        return jnp.where(kept, found, jnp.zeros((), values.dtype)).reshape(n, -1)[:, :k]


def pack_mask(kept: np.ndarray) -> np.ndarray:
    """bool[N, K] -> uint8[N, ceil(K / 8)], lowest bit first, unused bits zero."""
    return np.packbits(kept, axis=-1, bitorder="little")
