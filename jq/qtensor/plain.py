"""`Plain`: an array where a QTensor is expected, for weights that a library stores rounded but not packed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jq import exact
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, QTensor, Rows, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plain(QTensor):
    """`weight = dtype(values)`.

    Fields:
      values: float[*stack, N, K].
      extras: tensors that the layer needs beside it.
    """

    kind_name: ClassVar[str] = "plain"
    data_fields: ClassVar[tuple[str, ...]] = ("values", "extras")

    values: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where a value is not finite."""
        check_finite(self.values, name)

    @property
    def bits(self) -> int:
        return 8 * np.dtype(self.values.dtype).itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def describe(self) -> str:
        return str(self.values.dtype)

    def unpack(self) -> Array:
        """The values themselves: there are no codes."""
        return self.values

    def _dense(self) -> Array:
        return exact.cast(self.values, np.dtype(self.dtype))

    def _rows(self, index: Rows) -> Self:
        return self.replace(values=self.values[index])
