"""Configuration of the direct kernel, and everything static about one launch."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.form import CHUNK
from pallas_kernels.skeletons.plan import SMEM_BYTES, FewRows, offsets

MAX_ROWS = 16
MOST_CHUNKS = 16  # on their way to a warp: four registers each


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the kernel.

    Fields:
      warps: of a block, a multiple of 4; each has an equal part of the block's K.
      cluster: blocks that share the K of a tile, 1 or 2.
      blocks: blocks to launch.
      depth: passes whose codes are on their way.
    """

    warps: int = 16
    cluster: int = 1
    blocks: int = 132
    depth: int = 1


@dataclasses.dataclass(frozen=True)
class Plan(FewRows):
    """Everything static about one launch. In each pass a cluster multiplies one tile of 16 rows of the weight."""

    config: Config

    @property
    def clusters(self) -> int:
        return min(self.config.blocks // self.config.cluster, self.tiles)

    @property
    def passes(self) -> int:
        """Most passes of a cluster, with those that do not exist."""
        return -(-self.tiles // (self.clusters * self.config.depth)) * self.config.depth

    @property
    def chunks(self) -> int:
        """Tiles of 64 along K that a warp multiplies."""
        return self.block_chunks // self.config.warps

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First k16 step of each group in a warp's part, and the one behind its last."""
        steps = 4 * self.chunks
        size = min(self.form.group // 16, steps) if self.form.group else steps
        return [(s, s + size) for s in range(0, steps, size)]

    @property
    def columns(self) -> int:
        """Groups of 8 rows of x."""
        return -(-self.m // 8)

    @property
    def chunk_bytes(self) -> int:
        """A chunk of x in shared memory: whole squares, as the copy engine swizzles them, or one row."""
        return (1 if self.m == 1 else self.columns * 8) * CHUNK * 2

    @property
    def squares(self) -> int:
        """Squares of 8 x 8 outputs of a pass."""
        return 2 * self.columns

    @property
    def part_bytes(self) -> int:
        """A warp's sums of a pass."""
        return self.squares * 256

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        sizes = {
            "x": self.block_chunks * self.chunk_bytes,
            "sums": 2 * self.config.warps * self.part_bytes,
            "mail": self.passes * self.part_bytes if self.config.cluster > 1 else 0,
            "tables": self.table_bytes,
            "table2": self.table2_bytes,
            "barriers": 8 * (self.config.warps + self.passes),
        }
        return offsets(sizes, 1024)

    def reason(self) -> str | None:
        """Why this launch is not possible, or None."""
        c, group, span = self.config, self.form.group, self.chunks * CHUNK
        if self.m > MAX_ROWS:
            return f"{self.m} rows of x, at most {MAX_ROWS}"
        if self.k % 8 or self.n % 8:
            return f"{self.n}x{self.k} are no multiples of 8"
        if self.form.bits != 4:
            return f"codes of {self.form.bits} bits"
        if self.k_chunks % (c.warps * c.cluster):
            return f"{self.k_chunks} chunks of {CHUNK} inputs for {c.cluster} blocks of {c.warps} warps"
        if self.chunks * c.depth > MOST_CHUNKS:
            return f"{self.chunks * c.depth} chunks on their way to a warp"
        if group and span % group and group % span:
            return f"groups of {group} with {span} inputs of a warp"
        if self.layout["bytes"] > SMEM_BYTES:
            return f"{self.layout['bytes']} bytes of shared memory"
        return None
