"""`LowRank`: a quantized weight plus the product of two thin matrices (SVDQuant)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jq import exact
from jq.bits import namespace
from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, OnBase, Rows, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank(OnBase):
    """`weight = dtype(base + dtype(up @ down))`, the small product summed in float32.

    Fields:
      base: QTensor [*stack, N, K], maybe with an activation of its own.
      down: float[*stack, R, K].
      up: float[*stack, N, R].
      extras: stored tensors carried for saving or for preparing inputs.
    """

    kind_name: ClassVar[str] = "low rank"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "down", "up", "extras")

    base: Any
    down: Array
    up: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the thin matrices do not fit the weight, or are not finite."""
        n, k = self.shape[-2:]
        if self.down.shape[-1] != k or self.up.shape != (*self.up.shape[:-2], n, self.down.shape[-2]):
            raise FormatError(
                f"{name}: a low-rank product of {tuple(self.up.shape)} and {tuple(self.down.shape)} for a weight of "
                f"({n}, {k}); the file is damaged"
            )
        check_finite(self.down, f"{name}: low-rank factor")
        check_finite(self.up, f"{name}: low-rank factor")

    def describe(self) -> str:
        return f"{self.base.describe()}, rank {self.down.shape[-2]}"

    def _dense(self) -> Array:
        dense, dtype = self.base._dense(), np.dtype(self.dtype)
        xp = namespace(dense, self.up)
        product = xp.matmul(xp.asarray(self.up).astype(np.float32), xp.asarray(self.down).astype(np.float32))
        low = exact.cast(product.astype(dtype), np.float32)
        return exact.cast(exact.cast(dense, np.float32) + low, dtype)

    def _rows(self, index: Rows) -> Self:
        return self.replace(base=self.base[index], up=self.up[index])
