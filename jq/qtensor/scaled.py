"""`Scaled`: a quantized weight times one more scale for each input (SINQ)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jq import exact
from jq.bits import namespace
from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, QTensor, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scaled(QTensor):
    """`weight[n, k] = dtype(base[n, k] * column_scale[k])`, the product rounded in the dtype of `base`.

    Fields:
      base: QTensor [*stack, N, K] in the dtype of the arithmetic.
      column_scale: float[*stack, K].
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
            raise FormatError(f"{name}: {self.column_scale.shape[-1]} scales for {self.shape[-1]} inputs")
        check_finite(self.column_scale, f"{name}: scales of inputs")

    @property
    def bits(self) -> int:
        return self.base.bits

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def describe(self) -> str:
        return f"{self.base.describe()}, scaled inputs"

    def unpack(self) -> Array:
        """Codes of `base`."""
        return self.base.unpack()

    def _dense(self) -> Array:
        dense = self.base._dense()
        xp = namespace(dense, self.column_scale)
        return exact.cast(dense * xp.asarray(self.column_scale).astype(dense.dtype)[None, :], np.dtype(self.dtype))

    def _rows(self, index: slice) -> Self:
        return self.replace(base=self.base._rows(index), extras={})
