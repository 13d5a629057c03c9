"""What the plans of all kernels have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES, codebook
from pallas_kernels.form import CHUNK, NESTED_BLOCK, ROWS, Form
from pallas_kernels.ptx import Int

SMEM_BYTES = 226 * 1024  # of 227 KiB: the launch adds a static byte
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: y [m, n] = x [m, k] times the transposed weight [n, k].

    Fields:
      form: what the arrays of the weight mean.
      config: knobs of the kernel.
      dtype: type of x and y, "bf16" or "f16".
    """

    m: int
    n: int
    k: int
    form: Form
    config: Any
    dtype: str

    @property
    def gain(self) -> int:
        """What sums of products with decoded weights are to be multiplied with."""
        return DECODES[self.form.decode].unit(self.form, self.dtype)

    @property
    def wide_table(self) -> bool:
        """Whether the decode function's table is the one that takes more memory and fewer instructions."""
        return False

    @property
    def table_bytes(self) -> int:
        """Tables of the decode function in shared memory."""
        return self.tables_of(self.wide_table)

    def tables_of(self, wide: bool) -> int:
        return DECODES[self.form.decode].shared_bytes(self.form, wide)

    def pairs(self, base: Int, lane: Int) -> codebook.Pairs | None:
        """A codebook's table at a shared-memory address."""
        return codebook.Pairs(base, lane, self.wide_table) if self.form.kind == "codebook" else None

    @property
    def table2_bytes(self) -> int:
        """The table of nested scales in shared memory."""
        return 1024 if self.form.scale == "u8" else 0

    @property
    def nested_by_row(self) -> bool:
        """Whether all groups of a row share a second-level scale."""
        return self.form.scale == "u8" and NESTED_BLOCK % self.form.groups(self.k) == 0


@dataclasses.dataclass(frozen=True)
class FewRows(Launch):
    """A launch for few rows of x: clusters take tiles of 16 rows of the weight, whose K the blocks of a cluster share."""

    @property
    def tiles(self) -> int:
        return -(-self.n // ROWS)

    @property
    def k_chunks(self) -> int:
        return -(-self.k // CHUNK)

    @property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        raise NotImplementedError

    @property
    def block_chunks(self) -> int:
        """Tiles of 64 along K that one block multiplies."""
        return self.k_chunks // self.config.cluster


def tile_words(form: Form, at: Int) -> list[ir.Value]:
    """A lane's words of the codes of one tile, see `layout.pack_codes`.

    Args:
      at: the tile's address in shared memory plus 16 times the lane.
    """
    return ptx.chain(*(ptx.load_shared(at + p if p else at, "u32", 4) for p in range(0, form.chunk_bytes, 512)))


def groups_of(form: Form, span: int) -> int:
    """Groups that `span` weights along K touch, where spans and groups divide one another."""
    return max(1, span // form.group) if form.group else 1


def offsets(sizes: Mapping[str, int], align: int) -> dict[str, int]:
    """Offsets of areas that follow each other in shared memory, each on a multiple of `align`; "bytes" is the whole."""
    at, out = 0, {}
    for name, nbytes in sizes.items():
        out[name] = at
        at += -(-nbytes // align) * align
    return out | {"bytes": at}
