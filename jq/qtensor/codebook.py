"""`Codebook`: each code indexes one table of values (NF4, FP4, any table of up to 256 entries)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jq import bits as _bits
from jq import exact
from jq.errors import FormatError
from jq.qtensor.affine import check_finite
from jq.qtensor.base import (
    Array,
    Grouping,
    QTensor,
    Rows,
    Source,
    codes_shape,
    dense_value,
    expand,
    groups_of,
    look_up,
    padding,
    register,
    row_codes,
)


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codebook(QTensor):
    """`weight[n, k] = dtype(float32(table[code[n, k]] * absmax[block]) [+ offset])`.

    Fields:
      codes: packed codes, uint32 or uint8 [*stack, N, W].
      table: float32[*stack, 2**bits].
      absmax: [*stack, N, K / B] with Grouping("block", 1, B) where B divides K, else [*stack, ceil(N*K / B)] with
        Grouping("flat", 0, B); or a nested `Codebook` with one of these shapes (double quantization).
      offset: float32 scalar [*stack] added after the product (nested absmax), or None.
      extras: stored tensors carried for saving.
    """

    kind_name: ClassVar[str] = "codebook"
    data_fields: ClassVar[tuple[str, ...]] = ("codes", "table", "absmax", "offset", "extras")

    codes: Array
    table: Array
    absmax: Any
    offset: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    code_bits: int = 4
    grouping: Grouping = Grouping("block", 1, 64)
    dtype: str = "bfloat16"
    pad: int = 0
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    @classmethod
    def make(
        cls, codes: Array, table: Array, absmax: Any, *, code_bits: int, name: str = "weight", **fields: Any
    ) -> Self:
        """Builds from unpacked codes [*stack, N, K] and checks that the parts fit together.

        Raises:
          FormatError: a table or absmax of the wrong size, values that are not finite.
        """
        packed = _bits.pack(codes, code_bits)
        made = cls(
            packed, table, absmax, code_bits=code_bits, pad=padding(packed, code_bits, codes.shape[-1]), **fields
        )
        made.check(name)
        return made

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the arrays disagree; see `make`."""
        n, k = self.shape[-2:]
        if self.table.shape[-1] != 2**self.code_bits:
            raise FormatError(f"{name}: table of {self.table.shape[-1]} entries, expected {2**self.code_bits}")
        size = self.grouping.cols
        found = self.absmax.shape
        if self.grouping.kind == "flat":
            good = tuple(found[-1:]) == (-(-n * k // size),) or tuple(found[-2:]) == (1, -(-n * k // size))
        else:
            good = tuple(found[-2:]) == (groups_of(n, self.grouping.rows), groups_of(k, size))
        if not good:
            raise FormatError(
                f"{name}: absmax of shape {tuple(found)} does not fit a weight of ({n}, {k}) in blocks of {size}"
            )
        check_finite(self.table, f"{name}: table")
        if not isinstance(self.absmax, QTensor):
            check_finite(self.absmax, f"{name}: absmax")

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def block_size(self) -> int:
        """Weights that share an absmax."""
        return self.grouping.cols

    @property
    def shape(self) -> tuple[int, ...]:
        return codes_shape(self.codes, self.code_bits, self.pad, self.layout)

    def describe(self) -> str:
        nested = ", double quant" if isinstance(self.absmax, QTensor) else ""
        kind = self.source.get("quant_type", "") if self.source else ""
        return f"{kind or f'{self.code_bits}-bit table'}, block {self.grouping.cols}{nested}"

    def unpack(self) -> Array:
        return row_codes(self.codes, self.code_bits, self.pad)

    def block_absmax(self) -> Array:
        """absmax as a float32 array, dequantized where it is nested; shape as the `absmax` field says."""
        value = dense_value(self.absmax)
        if isinstance(self.absmax, QTensor) and self.grouping.kind == "flat":
            return value.reshape(-1)
        return value

    def _dense(self) -> Array:
        shape = self.shape
        values = look_up(self.table, self.unpack())
        absmax = expand(self.block_absmax().astype(np.float32), self.grouping, shape)
        if self.offset is None:
            return (values * absmax).astype(np.dtype(self.dtype))
        return exact.mul_add(values, absmax, self.offset).astype(np.dtype(self.dtype))

    def _rows(self, index: Rows) -> Self:
        if self.grouping.kind != "block" or isinstance(self.absmax, QTensor):
            return super()._rows(index)
        return self.replace(codes=self.codes[index], absmax=self.absmax[index])
