"""`Scaled`: a quantized weight times one more scale for each input, and `Tiles`: parameters kept tile by tile (SINQ)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jq import exact
from jq.bits import namespace
from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, OnBase, QTensor, Rows, Source, dense_value, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scaled(OnBase):
    """`weight[n, k] = dtype(base[n, k] * column_scale[k])`, the product rounded in the dtype of `base`.

    Fields:
      base: QTensor [*stack, N, K] in the dtype of the arithmetic.
      column_scale: float[*stack, K], or float[*stack, N / R, K] where R rows share the scales of their inputs.
      extras: stored tensors carried for saving.
    """

    kind_name: ClassVar[str] = "scaled"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "column_scale", "extras")

    base: Any
    column_scale: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the scale has another length than the inputs, or is not finite."""
        if self.column_scale.shape[-1] != self.shape[-1]:
            raise FormatError(
                f"{name}: {self.column_scale.shape[-1]} scales for {self.shape[-1]} inputs; the file is damaged"
            )
        if self._tall and self.shape[-2] % self.column_scale.shape[-2]:
            raise FormatError(
                f"{name}: scales of {self.column_scale.shape[-2]} tiles for {self.shape[-2]} outputs; the file is damaged"
            )
        check_finite(self.column_scale, f"{name}: scales of inputs")

    @property
    def _tall(self) -> bool:
        """Whether the scales differ from tile to tile of rows."""
        return len(self.column_scale.shape) > len(self.shape) - 1

    def describe(self) -> str:
        return f"{self.base.describe()}, scaled inputs"

    def _dense(self) -> Array:
        dense = self.base._dense()
        xp = namespace(dense, self.column_scale)
        scale = xp.atleast_2d(xp.asarray(self.column_scale).astype(dense.dtype))
        tiled = dense.reshape(scale.shape[0], -1, dense.shape[1]) * scale[:, None, :]
        return exact.cast(tiled.reshape(dense.shape), np.dtype(self.dtype))

    def _rows(self, index: Rows) -> Self:
        if self._tall:
            return super()._rows(index)
        return self.replace(base=self.base[index])


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tiles(QTensor):
    """Parameters [N, C] whose values are kept tile by tile: tile (i, j) is rows i*R to (i+1)*R of column j.

    Fields:
      base: QTensor [*stack, 1, N*C] or float[*stack, 1, N*C], in the order (i, j, row in the tile).
      rows: R.
      columns: C.
    """

    kind_name: ClassVar[str] = "tiles"
    data_fields: ClassVar[tuple[str, ...]] = ("base",)

    base: Any
    rows: int = 64
    columns: int = 1
    dtype: str = "float16"
    layout: str = ""

    @property
    def bits(self) -> int:
        return self.base.bits if isinstance(self.base, QTensor) else 8 * np.dtype(self.dtype).itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.base.shape[:-2], self.base.shape[-1] // self.columns, self.columns)

    def describe(self) -> str:
        return f"{self.bits}-bit, tiles of {self.rows}"

    def _dense(self) -> Array:
        values = dense_value(self.base).reshape(-1, self.columns, self.rows)
        return values.swapaxes(1, 2).reshape(-1, self.columns)
