"""`Rotated`: a weight quantized after an orthogonal rotation of its inputs (HIGGS, FP-Quant)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.errors import FormatError
from jq.qtensor.base import Array, OnBase, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rotated(OnBase):
    """`weight = base @ R.T`, R a block-diagonal rotation of the inputs: `x @ weight.T` is `(x @ R) @ base.T`.

    The product runs in float32 and is rounded to `dtype`; libraries rotate the inputs instead, so no bits are promised.

    Fields:
      base: the quantized, rotated weight, QTensor [*stack, N, K].
      rotation: float[*stack, block, block], the same for every block of inputs, or None for the normalised Sylvester
        Hadamard matrix of size `block`.
      extras: stored tensors carried for saving or for activation quantization.
      block: inputs that are rotated together.
    """

    kind_name: ClassVar[str] = "rotated"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "rotation", "extras")

    base: Any
    rotation: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    block: int = 16
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the block does not divide the inputs or the matrix has another size."""
        if self.block < 1 or self.shape[-1] % self.block:
            raise FormatError(
                f"{name}: {self.shape[-1]} inputs are no multiple of the rotation's {self.block}; check its size in the config"
            )
        if self.rotation is None:
            if self.block & (self.block - 1):
                raise FormatError(
                    f"{name}: a Hadamard rotation of {self.block} inputs is no power of two; check its size in the config"
                )
        elif tuple(self.rotation.shape[-2:]) != (self.block, self.block):
            raise FormatError(f"{name}: rotation of shape {tuple(self.rotation.shape)}, expected {self.block} square")

    def describe(self) -> str:
        return f"{self.base.describe()}, rotated in blocks of {self.block}"

    def rotate(self, x: Array) -> Array:
        """x [..., K] -> x @ R, float32."""
        blocks = exact.cast(jnp.asarray(x), jnp.float32).reshape(*x.shape[:-1], -1, self.block)
        return jnp.einsum("...j,ji->...i", blocks, self._matrix()).reshape(x.shape)

    def _matrix(self) -> Array:
        if self.rotation is None:
            return jnp.asarray(hadamard(self.block) * np.float32(self.block**-0.5))
        return jnp.asarray(self.rotation).astype(jnp.float32)

    def _dense(self) -> Array:
        n, k = self.shape
        blocks = jnp.asarray(self.base._dense()).astype(jnp.float32).reshape(n, k // self.block, self.block)
        dense = jnp.einsum("nbi,ji->nbj", blocks, self._matrix(), precision="highest")
        return dense.reshape(n, k).astype(np.dtype(self.dtype))

    def _rows(self, index: slice) -> Self:
        return self.replace(base=self.base._rows(index), extras={})


def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of 1 and -1, float32[size, size]; size a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
