"""Configuration of the direct kernel, and everything static about one launch."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.form import CHUNK
from pallas_kernels.skeletons.direct_params import loads
from pallas_kernels.skeletons.plan import MULTIPROCESSORS, SMEM_BYTES, FewRows, offsets

MAX_ROWS = 16
MOST_CHUNKS = 16  # on their way to the registers of a warp: four each
ROOMY_BYTES = 194 * 1024  # with more shared memory the first cache is too small for the codes on their way (measured)
# Registers of a thread, with 16 warps and up to four chunks on their way, for x and the parameters; and how many less for
# each chunk more. Beyond them the assembler spills, and where the codes on their way fill the first cache, what was
# spilled comes back from memory (measured: 4 us of 13).
MOST_HELD, LESS_HELD = 68, 12


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the kernel.

    Fields:
      warps: of a block, a multiple of 4; each has an equal part of the block's K.
      cluster: blocks that share the K of a tile, 1 or 2.
      blocks: blocks to launch.
      held: chunks of x that a warp keeps in registers; it reads the others from shared memory in every pass.
    """

    warps: int = 16
    cluster: int = 1
    blocks: int = 132
    held: int = 0


@dataclasses.dataclass(frozen=True)
class Plan(FewRows):
    """Everything static about one launch. In each pass a cluster multiplies one tile of 16 rows of the weight."""

    config: Config

    @property
    def clusters(self) -> int:
        return min(self.config.blocks // self.config.cluster, self.tiles)

    @property
    def chunks(self) -> int:
        """Tiles of 64 along K that a warp multiplies."""
        return self.block_chunks // self.config.warps

    @property
    def x_first(self) -> bool:
        """Whether x is asked for ahead of the weight: much of it, or the table of a codebook is waited for anyway."""
        return self.m > 1 or self.form.kind == "codebook"

    @property
    def x_in_registers(self) -> bool:
        """Whether a warp's part of x comes through its registers: up to 4 pieces of 16 bytes a lane (measured: 2 to 5 %
        less time for narrow weights; from 7 on the copy engine is faster).
        """
        return self.m * self.chunks * 8 <= 4 * 32

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
    def held_registers(self) -> int:
        """For x and the parameters of a pass."""
        return self.config.held * self.columns * 8 + self.stored_registers

    @property
    def stored_registers(self) -> int:
        """For the parameters of a pass."""
        stored = sum(loads(kind, len(self.segments)) for kind in self.form.params)
        return stored + (0 if self.form.scale != "u8" else 2 if self.nested_by_row else 6)

    def most_chunks_held(self, most: int) -> int:
        """Chunks of x for which there are registers, not more than `most`."""
        return max(0, min(most, (self.most_held - self.stored_registers) // (self.columns * 8)))

    @property
    def most_held(self) -> int:
        more = 127 if self.config.warps <= 8 else 0
        return MOST_HELD + more - LESS_HELD * max(0, self.chunks - 4)

    @property
    def squares(self) -> int:
        """Squares of 8 x 8 outputs of a pass."""
        return 2 * self.columns

    @property
    def part_bytes(self) -> int:
        """A warp's sums of a pass."""
        return self.squares * 256

    @property
    def x_read(self) -> bool:
        """Whether all of x is in registers before the first pass, so that a warp's sums may lie where its x was."""
        return self.config.held == self.chunks and 2 * self.part_bytes <= self.chunks * self.chunk_bytes

    @property
    def sums_pitch(self) -> int:
        """Bytes from a warp's sums to those of the next one."""
        return self.chunks * self.chunk_bytes if self.x_read else self.part_bytes

    @property
    def sums_turn(self) -> int:
        """Bytes from the sums of one pass to those of the next one, for which there is a second place."""
        return self.part_bytes if self.x_read else self.config.warps * self.part_bytes

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        return self.layout_with(self.wide_table)

    @functools.cached_property
    def wide_table(self) -> bool:
        return self.layout_with(True)["bytes"] <= ROOMY_BYTES // -(-self.config.blocks // MULTIPROCESSORS)

    def layout_with(self, wide: bool) -> dict[str, int]:
        c = self.config
        sizes = {
            "x": self.block_chunks * self.chunk_bytes,
            "sums": 0 if self.x_read else 2 * c.warps * self.part_bytes,
            "mail": 2 * self.part_bytes if c.cluster > 1 else 0,
            "tables": self.tables_of(wide),
            "barriers": 8 * (c.warps + 2),
        }
        out = offsets(sizes, 1024)
        return out | {"sums": out["x"]} if self.x_read else out

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
        if self.chunks > MOST_CHUNKS:
            return f"{self.chunks} chunks on their way to a warp"
        if c.held and (c.held > self.chunks or self.held_registers > self.most_held):
            return f"{c.held} of {self.chunks} chunks of {self.m} rows of x in registers"
        if group and span % group and group % span:
            return f"groups of {group} with {span} inputs of a warp"
        if self.layout["bytes"] > SMEM_BYTES:
            return f"{self.layout['bytes']} bytes of shared memory"
        return None
