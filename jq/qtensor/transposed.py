"""`Transposed`: a weight whose quantized matrix has its rows and columns exchanged (embeddings with codes along the vocabulary)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jq import exact
from jq.qtensor.base import Array, OnBase, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Transposed(OnBase):
    """`weight = base.T`.

    Fields:
      base: QTensor [*stack, K, N].
      extras: stored tensors carried for saving.
    """

    kind_name: ClassVar[str] = "transposed"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "extras")

    base: Any
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Nothing to check beside `base`."""

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, k, n = self.base.shape
        return (*stack, n, k)

    def describe(self) -> str:
        return f"{self.base.describe()}, transposed"

    def unpack(self) -> Array:
        """Codes of `base`, transposed."""
        return self.base.unpack().swapaxes(-1, -2)

    def _dense(self) -> Array:
        return exact.cast(self.base._dense().T, np.dtype(self.dtype))
