"""`VectorCodebook`: each code names a small block of weights in a codebook (AQLM, VPTQ, any vector quantization)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jq import bits as _bits
from jq import exact
from jq.bits import namespace
from jq.errors import FormatError
from jq.qtensor.affine import check_finite, check_indices
from jq.qtensor.base import Array, QTensor, Rows, Source, look_up, padding, register


@register
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VectorCodebook(QTensor):
    """Weights in vectors of `out_group` rows by `in_group` columns, each the sum of one entry of each codebook.

    `weight[r*og + a, c*ig + b] = formula(codebooks[group(c), m, code[r, c, m], a, b] for m, scales[r, c // (C / S)])`,
    group(c) = c // (C / G); then, where they are there: plus `residual` (rounded), the rows of padding cut off, `outliers` put in
    front as the first columns, columns taken in the order `order`, and `weight * column_scale + column_bias` or
    `weight * row_scale + row_bias` (two roundings).

    Fields:
      codes: packed codes of `code_bits` bits, [*stack, R, W]: for each row of vectors C columns of M codes, m fastest.
      codebooks: float[*stack, G, M, entries, og, ig], G groups along K that have codebooks of their own.
      scales: float[*stack, R, S], S groups of columns for each row of vectors, or None.
      residual: VectorCodebook of the same vectors, or None.
      outliers: VectorCodebook of the first columns, or None.
      order: uint16 or int32[*stack, K], the column of the codes that holds input k, or None.
      column_scale, column_bias: float[*stack, K], or None.
      row_scale, row_bias: float[*stack, N], or None.
      extras: stored tensors carried for saving.
      code_bits: width of a code, 1..16.
      pad: padding codes at the end of each packed row.
      row_pad: rows of padding at the end (R * og - N).
      formula: key of `FORMULAS`.
    """

    kind_name: ClassVar[str] = "vector codebook"
    data_fields: ClassVar[tuple[str, ...]] = (
        "codes",
        "codebooks",
        "scales",
        "residual",
        "outliers",
        "order",
        "column_scale",
        "column_bias",
        "row_scale",
        "row_bias",
        "extras",
    )

    codes: Array
    codebooks: Array
    scales: Array | None = None
    residual: VectorCodebook | None = None
    outliers: VectorCodebook | None = None
    order: Array | None = None
    column_scale: Array | None = None
    column_bias: Array | None = None
    row_scale: Array | None = None
    row_bias: Array | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    code_bits: int = 8
    pad: int = 0
    row_pad: int = 0
    formula: str = "gather"
    dtype: str = "float16"
    activation: Any = None
    source: Source | None = None
    layout: str = ""

    @classmethod
    def make(cls, codes: Array, codebooks: Array, *, code_bits: int, name: str = "weight", **fields: Any) -> Self:
        """Builds from unpacked codes and checks that the parts fit together.

        Args:
          codes: integer[*stack, R, C, M], each in [0, entries).
          codebooks: float[*stack, G, M, entries, og, ig].
          code_bits: width of a packed code; 2**code_bits >= entries.
          name: tensor name for error messages.

        Raises:
          FormatError: codes outside the codebook, parts that do not fit, values that are not finite.
        """
        check_indices(codes, codebooks.shape[-3], f"{name}: codes")
        count = codes.shape[-2] * codes.shape[-1]
        packed = _bits.pack(codes.reshape(*codes.shape[:-2], count), code_bits)
        fields.setdefault("dtype", str(np.dtype(codebooks.dtype)))
        made = cls(packed, codebooks, code_bits=code_bits, pad=padding(packed, code_bits, count), **fields)
        made.check(name)
        return made

    def check(self, name: str = "weight") -> None:
        """Raises `FormatError` where the arrays disagree; see `make`."""
        groups, _, entries, og, _ = self.codebooks.shape[-5:]
        n, k = self.shape[-2:]
        if self.formula not in FORMULAS:
            raise FormatError(f"{name}: unknown dequantization formula {self.formula!r}; known: {', '.join(FORMULAS)}")
        if entries > 2**self.code_bits or self.columns % groups or not 0 <= self.row_pad < og:
            raise FormatError(
                f"{name}: codebooks of shape {tuple(self.codebooks.shape)} do not fit {self.columns} columns of "
                f"{self.code_bits}-bit codes with {self.row_pad} rows of padding"
            )
        rows = self.codes.shape[-2]
        if self.scales is not None and (self.scales.shape[-2] != rows or self.columns % self.scales.shape[-1]):
            raise FormatError(
                f"{name}: scales of shape {tuple(self.scales.shape)} for {rows} rows of {self.columns} vectors"
            )
        lengths = {"order": k, "column_scale": k, "column_bias": k, "row_scale": n, "row_bias": n}
        for part, length in lengths.items():
            found = getattr(self, part)
            if found is not None and found.shape[-1] != length:
                raise FormatError(f"{name}: {part} has {found.shape[-1]} entries, expected {length}")
        for part, shape in (
            ("residual", (n, self.columns * self.in_group)),
            ("outliers", (n, k - self.columns * self.in_group)),
        ):
            nested = getattr(self, part)
            if nested is not None and tuple(nested.shape[-2:]) != shape:
                raise FormatError(f"{name}: {part} of shape {tuple(nested.shape)}, expected {shape}")
        if self.order is not None and not np.array_equal(np.sort(np.asarray(self.order), axis=-1), np.arange(k)):
            raise FormatError(f"{name}: order of columns is no permutation of 0..{k - 1}; the file is damaged")
        for part in ("codebooks", "scales", "column_scale", "column_bias", "row_scale", "row_bias"):
            if getattr(self, part) is not None:
                check_finite(getattr(self, part), f"{name}: {part}")

    @property
    def bits(self) -> int:
        return self.code_bits

    @property
    def out_group(self) -> int:
        return self.codebooks.shape[-2]

    @property
    def in_group(self) -> int:
        return self.codebooks.shape[-1]

    @property
    def books(self) -> int:
        """Codebooks that are summed (M)."""
        return self.codebooks.shape[-4]

    @property
    def columns(self) -> int:
        """Columns of vectors (C), outliers not counted."""
        return (_bits.capacity(self.codes, self.code_bits) - self.pad) // self.books

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.codes.shape[-2] * self.out_group - self.row_pad
        columns = self.columns * self.in_group
        if self.outliers is not None:
            columns += self.outliers.shape[-1]
        return (*self.codes.shape[:-2], rows, columns)

    def describe(self) -> str:
        books = f"{self.books}x{self.code_bits} bit"
        if self.residual is not None:
            books += f" + {self.residual.code_bits} bit"
        parts = [name for name in ("outliers", "order", "column_scale", "row_scale") if getattr(self, name) is not None]
        return ", ".join([books, f"vectors {self.out_group}x{self.in_group}", *parts])

    def unpack(self) -> Array:
        """Codebook indices, int32[*stack, R, C, M]: one per vector, not one per weight."""
        codes = _bits.unpack(self.codes, self.code_bits, self.columns * self.books)
        return codes.reshape(*codes.shape[:-1], self.columns, self.books)

    def _dense(self) -> Array:
        dtype = np.dtype(self.dtype)
        weight = self._vectors()
        if self.residual is not None:
            weight = weight + self.residual._vectors()
        weight = weight[: self.shape[-2]]
        xp = namespace(weight)
        if self.outliers is not None:
            weight = xp.concatenate([self.outliers._dense().astype(weight.dtype), weight], axis=1)
        if self.order is not None:
            weight = xp.take(weight, self.order.astype(np.int32), axis=1)
        norms = []
        if self.column_scale is not None and self.column_bias is not None:
            norms.append((self.column_scale[None, :], self.column_bias[None, :]))
        if self.row_scale is not None and self.row_bias is not None:
            norms.append((self.row_scale[:, None], self.row_bias[:, None]))
        for scale, bias in norms:
            weight = exact.mul_add(weight, scale.astype(weight.dtype), bias.astype(weight.dtype))
        return exact.cast(weight, dtype)

    def _vectors(self) -> Array:
        """Rows of vectors laid out as a matrix, [R * og, C * ig], padding rows included."""
        groups, books, entries, og, ig = self.codebooks.shape
        rows, columns = self.codes.shape[0], self.columns
        xp = namespace(self.codes, self.codebooks)
        first = (np.arange(columns) // (columns // groups))[:, None] * books + np.arange(books)  # [C, M]
        index = self.unpack() + (first * entries).astype(np.int32)
        vectors = look_up(self.codebooks.reshape(-1, og * ig), index)  # [R, C, M, og * ig]
        scales = None
        if self.scales is not None:
            scales = xp.repeat(self.scales, columns // self.scales.shape[1], axis=1)[:, :, None]
        vectors = FORMULAS[self.formula](vectors, scales)
        return vectors.reshape(rows, columns, og, ig).swapaxes(1, 2).reshape(rows * og, columns * ig)

    def _rows(self, index: Rows) -> Self:
        og, cut, pad = self.out_group, index, 0
        if self.outliers is not None or (og > 1 and not isinstance(index, slice)):
            return super()._rows(index)
        if og > 1:
            start, stop, step = index.indices(self.shape[-2])
            if step != 1 or start % og or (stop % og and stop != self.shape[-2]):
                return super()._rows(index)
            cut = slice(start // og, -(-stop // og))
            pad = (cut.stop - cut.start) * og - (stop - start)
        return self.replace(
            codes=self.codes[cut],
            scales=None if self.scales is None else self.scales[cut],
            residual=None if self.residual is None else self.residual[index],
            row_scale=None if self.row_scale is None else self.row_scale[index],
            row_bias=None if self.row_bias is None else self.row_bias[index],
            row_pad=pad,
        )


# formula name -> (vectors [R, C, M, og * ig] of the codebooks' dtype, scales [R, C, 1] or None) -> [R, C, og * ig]
Formula = Callable[[Array, Any], Array]


def _gather(vectors: Array, scales: Any) -> Array:
    """The one codebook's entry as it is, times the scale where there is one (rounded)."""
    return vectors[:, :, 0] if scales is None else vectors[:, :, 0] * scales


def _sum_scale(vectors: Array, scales: Any) -> Array:
    """dt(dt(sum in float32) * scale): AQLM's dequantization on a CPU, torch's embedding_bag and a product.

    embedding_bag starts from +0, so that a sum of -0 is +0, and rounds a bfloat16 sum half away from zero, not to
    even (torch 2.13.0 on a CPU; in aqlm-4x6 with 3 to 4 codebooks 6 % of the elements differ from half-to-even).
    """
    xp = namespace(vectors)
    total = vectors[:, :, 0].astype(np.float32)
    for m in range(1, vectors.shape[2]):
        total = total + vectors[:, :, m].astype(np.float32)
    total = xp.where(total == 0, xp.zeros_like(total), total)
    rounded = round_half_away(total) if vectors.dtype.name == "bfloat16" else total.astype(vectors.dtype)
    return rounded if scales is None else rounded * scales


def round_half_away(x: Array) -> Array:
    """float32 -> bfloat16, halves away from zero: add half a unit to the bits and truncate."""
    if isinstance(x, np.ndarray):
        return ((x.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(((raw + 0x8000) >> 16).astype(jnp.uint16), jnp.bfloat16)


FORMULAS: dict[str, Formula] = {"gather": _gather, "sum_scale": _sum_scale}

__all__ = ["FORMULAS", "VectorCodebook", "round_half_away"]
