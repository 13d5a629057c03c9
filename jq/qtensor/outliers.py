"""`WithOutliers`: a quantized weight plus a few values of their own at single places (SpQR)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, OnBase, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WithOutliers(OnBase):
    """`weight = dtype(float32(base) + sum of the outliers at each place)`, then columns in the order `order`.

    Fields:
      base: the dense part, a QTensor [*stack, N, K].
      offsets: int32[*stack, N / rows + 1], first entry of each run of `rows` rows.
      entries: uint32[*stack, nnz], column in the low half, float16 value in the high half. In a run of more than one
        row, entry j belongs to row j % rows of the run.
      order: uint16 or int32[*stack, K], the column of `base` that holds input k, or None.
      extras: stored tensors carried for saving.
      rows: rows of a run: 1 (CSR) or 16 (SpQR's interleaved form).
    """

    kind_name: ClassVar[str] = "outliers"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "offsets", "entries", "order", "extras")

    base: Any
    offsets: Array
    entries: Array
    order: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    rows: int = 1
    dtype: str = "float16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where offsets, columns or order are out of range."""
        n, k = self.shape[-2:]
        offsets, entries = np.asarray(self.offsets), np.asarray(self.entries)
        if offsets.shape[-1] * self.rows != n + self.rows:
            raise FormatError(
                f"{name}: {offsets.shape[-1]} row offsets do not fit {n} rows in runs of {self.rows}; the file is damaged"
            )
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > entries.shape[-1]:
            raise FormatError(
                f"{name}: row offsets must rise from 0 to at most {entries.shape[-1]} outliers, found "
                f"{offsets.min()}..{offsets.max()}; the file is damaged"
            )
        columns = entries & 0xFFFF
        if columns.size and columns.max() >= k:
            raise FormatError(f"{name}: an outlier in column {columns.max()} of {k}; the file is damaged")
        check_finite((entries >> 16).astype(np.uint16).view(np.float16), f"{name}: outliers")
        if self.order is not None and not np.array_equal(np.sort(np.asarray(self.order)), np.arange(k)):
            raise FormatError(f"{name}: order of columns is no permutation of 0..{k - 1}; the file is damaged")

    def describe(self) -> str:
        return f"{self.base.describe()}, {self.entries.shape[-1]} outliers"

    def _dense(self) -> Array:
        dense = jnp.asarray(self.base._dense()).astype(jnp.float32)
        entries = jnp.asarray(self.entries)
        place = jnp.arange(entries.shape[0], dtype=jnp.int32)
        run = jnp.searchsorted(jnp.asarray(self.offsets), place, side="right").astype(jnp.int32) - 1
        row = run * self.rows + place % self.rows  # entries after the last offset fall beyond N and are dropped
        values = jax.lax.bitcast_convert_type((entries >> 16).astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        dense = dense.at[row, (entries & 0xFFFF).astype(jnp.int32)].add(values, mode="drop")
        dense = dense.astype(np.dtype(self.dtype))
        return dense if self.order is None else jnp.take(dense, jnp.asarray(self.order).astype(jnp.int32), axis=1)
