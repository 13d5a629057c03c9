"""Configuration of the wgmma kernel, and everything static about one launch: tiles, sizes and offsets."""

from __future__ import annotations

import dataclasses
import functools
import math

from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS
from pallas_kernels.skeletons.plan import SMEM_BYTES, Launch, groups_of, offsets

PRODUCER_REGISTERS = 32
MOST_STAGES = 12
ENOUGH_STAGES = 6  # with so many left, a wide table of a codebook is worth its memory
# registers that setmaxnreg can give to each of `wn` warpgroups: the sum may not exceed what the launch had
CONSUMER_REGISTERS = {1: 216, 2: 232, 3: 160, 4: 112, 7: 64}
UNIT = 64  # rows of the weight that a warpgroup multiplies: the M of wgmma


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the kernel.

    Fields:
      tile_m: rows of x in a tile, up to 256, a multiple of 8 * split and of 8 * share.
      wn: warpgroups of a block, up to 4.
      chunks: tiles of 64 along K in one step of the ring.
      stages: length of the ring; 0: as many as fit.
      share: blocks of a cluster that use the same x.
      split: blocks of a cluster that share the K of a tile.
      tail: with two such blocks, steps along K that each of them does last, for the columns that it will write alone: the
        sums of the others are on their way meanwhile. At least so many.
      blocks: blocks to launch.
      m_group: tiles of x that neighbouring blocks take before they go on to the next rows of the weight; 0: all.
      even: pairs of blocks get even numbers of units of 64 rows of the weight, the odd one shared along K.
      units: units of 64 rows of the weight that a block takes at once; 0: one for each warpgroup. With fewer, warpgroups
        share a unit and take turns with the steps along K: where a block has a unit or two, decode and tensor core
        would wait for one another. With more, a warpgroup has several, and a block needs x less often.
      ahead: decode runs ahead of the tensor core from step to step of the ring; without it each step ends with a wait,
        and the assembler is free to decode more than one k16 at once (better up to 64 rows of x, and often to 128).
    """

    tile_m: int = 256
    wn: int = 2
    chunks: int = 2
    stages: int = 0
    share: int = 1
    split: int = 1
    blocks: int = 132
    m_group: int = 0
    even: bool = False
    ahead: bool = True
    units: int = 0
    tail: int = 0


@dataclasses.dataclass(frozen=True)
class Plan(Launch):
    """Everything static about one launch."""

    config: Config

    @property
    def span(self) -> int:
        """Weights along K of one step."""
        return self.config.chunks * CHUNK

    @property
    def steps(self) -> int:
        return -(-self.k // self.span)

    @property
    def common(self) -> int:
        """Steps of each of two blocks for all columns, where there is a tail for half of them."""
        return (self.steps - self.config.tail) // 2

    @property
    def cluster(self) -> int:
        return 2 if self.config.even else self.config.share * self.config.split

    @property
    def m_tiles(self) -> int:
        return -(-self.m // self.config.tile_m)

    @property
    def block_units(self) -> int:
        """Units of 64 rows of the weight that a block takes at once."""
        return self.config.units or self.config.wn

    @property
    def depth(self) -> int:
        """Warpgroups that share a unit."""
        return max(1, self.config.wn // self.block_units)

    @property
    def heights(self) -> list[int]:
        """Units of each of the first warpgroups, and of the last ones if these have one less."""
        most = -(-self.block_units // self.config.wn)
        return [most, most - 1] if most > 1 and self.block_units % self.config.wn else [most]

    @property
    def units(self) -> int:
        """Units of 64 rows of the weight."""
        return -(-self.n // UNIT)

    @property
    def n_tiles(self) -> int:
        """Tiles of `block_units` units, rounded up to what a cluster takes."""
        return -(-self.units // (self.block_units * self.config.share))

    @property
    def tiles(self) -> int:
        """Work of all clusters: tiles, or with `even` the pairs' lists of units."""
        if self.config.even:
            return self.m_tiles * max(1, min(self.config.blocks // 2 // self.m_tiles, self.units))
        return self.m_tiles * self.n_tiles

    @property
    def clusters(self) -> int:
        return self.tiles if self.config.even else min(self.config.blocks // self.cluster, self.tiles)

    @property
    def step_groups(self) -> int:
        return groups_of(self.form, self.span)

    @property
    def x_bytes(self) -> int:
        return self.config.tile_m * self.span * 2

    @property
    def x_copies(self) -> int:
        """Copies of neighbouring rows that bring a tile of x."""
        return 2 if self.config.tail else self.config.share

    @property
    def x_rows(self) -> int:
        """Rows of x of one of them: of a whole tile only those that exist. Products of others are not stored."""
        return min(self.config.tile_m, self.m) if self.x_copies == 1 else self.config.tile_m // self.x_copies

    @property
    def x_fetched(self) -> int:
        """Bytes of x that come in one step."""
        return self.x_rows * self.x_copies * self.span * 2

    @property
    def unit_bytes(self) -> int:
        """Codes of a unit in one step."""
        return UNIT // ROWS * self.config.chunks * self.form.chunk_bytes

    @property
    def unit_params(self) -> list[int]:
        """Bytes of scales and zeros of a unit in one step."""
        return [UNIT * self.step_groups * ITEM_BYTES[p] for p in self.form.params]

    @property
    def boxes(self) -> int:
        """Copies that bring the weight of a step; each brings the rows of `block_units / boxes` units."""
        return self.config.wn if self.config.even else 1

    @property
    def param_pitch(self) -> list[int]:
        """Bytes from one unit's parameters to the next one's: a copy starts at a multiple of 128."""
        return [-(-b // 128) * 128 if self.config.even else b for b in self.unit_params]

    @property
    def param_bytes(self) -> list[int]:
        return [-(-self.block_units * b // 128) * 128 for b in self.param_pitch]

    @property
    def code_bytes(self) -> int:
        return self.block_units * self.unit_bytes

    @property
    def stage_bytes(self) -> int:
        return self.x_bytes + self.code_bytes + sum(self.param_bytes)

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.config.tile_m // 2

    @property
    def fetch_early(self) -> bool:
        """Whether the next step's codes are read before the last wgmma of a step, not behind it. Measured on an H100:
        1 to 8 % faster where this holds, 1 % slower elsewhere.
        """
        c = self.config
        return c.ahead and (c.wn == 1 or (c.chunks == 1 and c.wn < 4)) and not (c.tile_m == 256 and c.share > 1)

    @property
    def in_turn(self) -> bool:
        """Whether chunks are read and decoded one after the other, to hold fewer registers."""
        return not self.config.ahead and (self.config.chunks > 2 or self.heights != [1] or self.config.wn > 4)

    @property
    def looked_up(self) -> int:
        """k16 steps whose values are looked up at once; 0: as the assembler likes. A step of the ring where there are
        registers for it, else a chunk.
        """
        if self.form.kind != "codebook" or self.config.ahead or self.config.wn > 4:
            return 0
        return 4 * (1 if self.in_turn or self.config.wn > 3 else self.config.chunks)

    @property
    def between_waits(self) -> int:
        """k16 steps between two waits, where a step of the ring is decoded as a whole. Without `ahead` its end is one, but
        four warpgroups with so many accumulators have no registers for the weights of four k16 beside them: the assembler
        would wait for each wgmma (measured on an H100 from 97 to 128 rows of x: 3 to 5 %).
        """
        c, count = self.config, 4 * self.config.chunks
        if c.ahead:
            return min(count // 2, 4)
        return 2 if c.wn == 4 and c.tile_m > 96 else count

    @property
    def burst(self) -> int:
        """k16 steps between two waits, where chunks are decoded in turn."""
        return 4 if self.heights == [1] else 1

    @property
    def epilogue_rows(self) -> int:
        return 64 if self.config.tile_m >= 192 and self.config.wn <= 2 else 32

    def piece(self, rows: int) -> int:
        """Rows of y that one store writes, of `rows` that a warpgroup owns."""
        return math.gcd(rows, self.epilogue_rows)

    @property
    def own_rows(self) -> int:
        """Rows of y of a tile that one block of a split writes."""
        return self.config.tile_m // self.config.split

    @property
    def inbox_bytes(self) -> int:
        """Partial sums that the other blocks of a split send."""
        s = self.config.split
        return (s - 1) * self.block_units * 128 * self.sums // s * 4

    @property
    def local_bytes(self) -> int:
        """Sums of the warpgroups that share their rows, but for the first one's."""
        return (self.depth - 1) * self.block_units * 128 * self.sums * 4

    @property
    def place_bytes(self) -> int:
        """For each slot, its place along K, where second-level scales change on the way."""
        return 4 if self.form.scale == "u8" and not self.nested_by_row else 0

    @property
    def y_bytes(self) -> int:
        """Buffers of the epilogues; with `even` they are the inbox of the shared unit's sums before."""
        buffers = self.config.wn // self.depth * 2 * self.epilogue_rows * 128
        return max(buffers, self.config.even * self.config.tile_m // 2 * UNIT * 4)

    @property
    def wide_table(self) -> bool:
        return self.stages_with(self.tables_of(True)) >= ENOUGH_STAGES

    @property
    def stages(self) -> int:
        return self.stages_with(self.table_bytes)

    def stages_with(self, table_bytes: int) -> int:
        """Slots of the ring beside a table of this size."""
        fixed = self.y_bytes + self.inbox_bytes + self.local_bytes + table_bytes + self.table2_bytes + 1024
        fit = (SMEM_BYTES - fixed - 1024) // (-(-self.stage_bytes // 1024) * 1024)
        fit = min(self.config.stages or MOST_STAGES, fit, MOST_STAGES)
        return fit // self.depth * self.depth  # each slot belongs to one of the warpgroups that share a unit

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        s = self.stages
        sizes = {"x": s * self.x_bytes, "codes": s * self.code_bytes}
        sizes |= {name: s * nbytes for name, nbytes in zip(("scales", "zeros"), self.param_bytes)}
        sizes |= {"y": self.y_bytes, "inbox": self.inbox_bytes, "local": self.local_bytes}
        sizes |= {"tables": self.table_bytes, "table2": self.table2_bytes}
        sizes |= {"barriers": 8 * (2 * s + 4) + s * self.place_bytes}
        out = offsets(sizes, 1024)
        out["magic"] = out["barriers"] + 8 * (2 * s + 3)
        out["places"] = out["magic"] + 8
        if self.config.even:
            out["inbox"] = out["y"]
        return out

    def reason(self) -> str | None:
        c = self.config
        if self.k % 8 or self.n % 8:
            return f"a weight of {self.n}x{self.k}: both must be multiples of 8 for the tensor copies"
        group = self.form.group
        if group and group % self.span and self.span % group:
            return f"groups of {group} with steps of {self.span}"
        if c.tile_m % (8 * c.share) or c.tile_m % (8 * c.split):
            return f"tile of {c.tile_m} rows of x with share {c.share} and split {c.split}"
        if c.tail and (c.split != 2 or c.share > 1 or self.depth > 1 or self.heights != [1] or c.tile_m % 16):
            return f"a tail with split {c.split}, share {c.share} and {c.units} units for {c.wn} warpgroups"
        if c.tail and min(c.tail, self.common) < 1 + c.ahead:
            return f"{self.steps} steps along K with a tail of {c.tail}"
        if c.even and (c.share > 1 or c.split > 1 or c.units or c.tile_m % 32 or self.m_tiles > c.blocks // 2):
            return f"even pairs with tiles of {c.tile_m} rows of x, share {c.share} and split {c.split}"
        if self.block_units < c.wn and c.wn % c.units:
            return f"{c.wn} warpgroups for {c.units} units"
        if self.block_units > c.wn and (c.ahead or c.split > 1):
            return f"{c.units} units for {c.wn} warpgroups, ahead or with a split along K"
        if self.steps < (2 * self.cluster * self.depth if c.ahead else 2 * c.even):
            return f"{self.steps} steps along K for {self.cluster} blocks"
        if self.stages < max(2, self.depth * (1 + c.ahead)) or self.layout["bytes"] > SMEM_BYTES:
            return f"{self.layout['bytes']} bytes of shared memory"
        return None
