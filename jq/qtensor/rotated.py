"""`Rotated`: a weight quantized after orthogonal rotations of its inputs, and of its outputs (HIGGS, FP-Quant, EXL3)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from jq import exact
from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import Array, OnBase, Rows, Source, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rotated(OnBase):
    """`weight = base @ R.T`, R a block-diagonal rotation of the inputs: `x @ weight.T` is `(x @ R) @ base.T`.

    Where they are there, in this order: inputs times `column_scale`, outputs rotated by Hadamard matrices of `out_block`,
    times `row_scale`, and `padding` cut off. The products run in float32 and are rounded to `dtype` once; libraries rotate
    the inputs (and outputs) instead, so no bits are promised.

    Fields:
      base: the quantized, rotated weight, QTensor [*stack, N, K].
      rotation: float[*stack, block, block], the same for every block of inputs, or None for the normalised Sylvester
        Hadamard matrix of size `block`.
      extras: stored tensors carried for saving or for activation quantization.
      column_scale, row_scale: float[*stack, K] and float[*stack, N] of `base`, or None.
      block: inputs that are rotated together.
      out_block: outputs that are rotated together, 0: none.
      padding: outputs and inputs of `base` beyond the weight's own.
    """

    kind_name: ClassVar[str] = "rotated"
    data_fields: ClassVar[tuple[str, ...]] = ("base", "rotation", "extras", "column_scale", "row_scale")

    base: Any
    rotation: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    column_scale: Array | None = None
    row_scale: Array | None = None
    block: int = 16
    out_block: int = 0
    padding: tuple[int, int] = (0, 0)
    dtype: str = "bfloat16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the block does not divide the inputs or the matrix has another size."""
        n, k = self.base.shape[-2:]
        if self.block < 1 or k % self.block:
            raise FormatError(
                f"{name}: {k} inputs are no multiple of the rotation's {self.block}; check its size in the config"
            )
        if self.rotation is None:
            if self.block & (self.block - 1):
                raise FormatError(
                    f"{name}: a Hadamard rotation of {self.block} inputs is no power of two; check its size in the config"
                )
        elif tuple(self.rotation.shape[-2:]) != (self.block, self.block):
            raise FormatError(f"{name}: rotation of shape {tuple(self.rotation.shape)}, expected {self.block} square")
        if self.out_block and n % self.out_block:
            raise FormatError(f"{name}: {n} outputs are no multiple of the rotation's {self.out_block}")
        for scale, count, what in ((self.column_scale, k, "inputs"), (self.row_scale, n, "outputs")):
            if scale is not None:
                if scale.shape[-1] != count:
                    raise FormatError(f"{name}: {scale.shape[-1]} scales for {count} {what}; the file is damaged")
                check_finite(scale, f"{name}: scales of {what}")

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, n, k = self.base.shape
        return (*stack, n - self.padding[0], k - self.padding[1])

    def describe(self) -> str:
        both = f" and {self.out_block}" if self.out_block else ""
        return f"{self.base.describe()}, rotated in blocks of {self.block}{both}"

    def rotate(self, x: Array) -> Array:
        """x [..., K] -> x @ R, float32."""
        blocks = exact.cast(jnp.asarray(x), jnp.float32).reshape(*x.shape[:-1], -1, self.block)
        return jnp.einsum("...j,ji->...i", blocks, self._matrix()).reshape(x.shape)

    def _matrix(self) -> Array:
        if self.rotation is None:
            return _normalised(self.block)
        return jnp.asarray(self.rotation).astype(jnp.float32)

    def _dense(self) -> Array:
        n, k = self.base.shape
        blocks = jnp.asarray(self.base._dense()).astype(jnp.float32).reshape(n, k // self.block, self.block)
        dense = jnp.einsum("nbi,ji->nbj", blocks, self._matrix(), precision="highest").reshape(n, k)
        if self.column_scale is not None:
            dense = dense * self.column_scale.astype(jnp.float32)
        if self.out_block:
            blocks = dense.reshape(n // self.out_block, self.out_block, k)
            dense = jnp.einsum("ij,bjk->bik", _normalised(self.out_block), blocks, precision="highest").reshape(n, k)
        if self.row_scale is not None:
            dense = dense * self.row_scale.astype(jnp.float32)[:, None]
        rows, columns = self.shape
        return dense[:rows, :columns].astype(np.dtype(self.dtype))

    def _rows(self, index: Rows) -> Self:
        if self.out_block or self.padding[0]:
            return super()._rows(index)
        rows = None if self.row_scale is None else self.row_scale[index]
        return self.replace(base=self.base[index], row_scale=rows)


def _normalised(size: int) -> Array:
    return jnp.asarray(hadamard(size) * np.float32(size**-0.5))


def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of 1 and -1, float32[size, size]; size a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
