"""`Form`: the static description of a packed weight, and `Packed`: its arrays. Kernels know nothing else of a format."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

ROWS = 16  # rows of one tile: the M of one mma instruction
CHUNK = 64  # weights along K of one tile: four mma steps, 16 bytes of 4-bit codes per thread
NESTED_BLOCK = 256  # codes of a nested scale that share a second-level scale
SMALL = 8.0  # see `Form.small`

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "u8": 1, "e8m0": 1}


@dataclasses.dataclass(frozen=True)
class Form:
    """What the arrays of a packed weight mean. Hashable: equal forms share one compiled kernel.

    Fields:
      kind, bits: what a code means and its width; they name the decode function, see `pallas_kernels.decode.DECODES`.
      group: weights along K that share a scale, a multiple of 32; 0 for one scale per row.
      scale: type of the stored scales: "bf16", "f16", "f32", or "u8" for scales that are themselves codes of a
        256-entry table (nested absmax): scale = table2[code] * absmax2[block // 256] + offset; or "e8m0" for
        2**(byte - 127), where a byte of 0 counts as 0.
      zero: type of the stored zeros, "" if there are none.
      zero_form: how a zero enters: "code" (code - zero) * scale, "minus" code * scale - zero, "plus" code * scale + zero.
      zero_point: the zero where none is stored.
      table: name of the codebook's 16 values (`decode.codebook.KNOWN`) where kernels hold them: they need not wait for
        the memory before they fill their table. "": they are an array.
      small: all scales are known to be below `SMALL` in absolute value, so that kernels need not look for the largest.
    """

    kind: Literal["affine", "codebook", "e4m3", "e5m2"] = "affine"
    bits: int = 4
    group: int = 128
    scale: Literal["bf16", "f16", "f32", "u8", "e8m0"] = "bf16"
    zero: Literal["", "u8", "bf16", "f16", "f32"] = ""
    zero_form: Literal["code", "minus", "plus"] = "code"
    zero_point: int = 8
    table: str = ""
    small: bool = False

    @property
    def decode(self) -> tuple[str, int]:
        """Key of the decode function."""
        return self.kind, self.bits

    @property
    def params(self) -> tuple[str, ...]:
        """Types of the arrays with one value per group, in order."""
        return (self.scale, self.zero) if self.zero else (self.scale,)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the codes of one tile of ROWS x CHUNK weights."""
        return ROWS * CHUNK * self.bits // 8

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group) if self.group else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Arrays of a packed weight; every array may have one leading stack axis.

    Fields:
      codes: int32[T, C, bits * 32], T = ceil(N / 16) tiles of rows, C = ceil(K / 64); see `layout.pack_codes`.
      scales: [T, G, 16], `Form.scale` type; see `layout.pack_rows`.
      zeros: [T, G, 16], `Form.zero` type, or None.
      tables: dict of float32 arrays: "table" [16] of a codebook whose values `form` does not name; "table2" [256], "absmax2" [blocks], "offset" [] of
        nested scales.
      perm: int32[K], the input that position k of the codes multiplies, or None.
      form, shape: static; shape is (N, K).
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    tables: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    perm: jax.Array | None = None
    form: Form = dataclasses.field(default=Form(), metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(default=(0, 0), metadata={"static": True})

    @property
    def stacked(self) -> bool:
        return self.codes.ndim == 4

    def replace(self, **fields: Any) -> Packed:
        return dataclasses.replace(self, **fields)
