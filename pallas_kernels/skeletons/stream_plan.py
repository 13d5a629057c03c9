"""Configuration of the streaming kernel, and everything static about one launch: sizes and offsets."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.form import CHUNK, ITEM_BYTES, NESTED_BLOCK, ROWS
from pallas_kernels.skeletons.plan import MULTIPROCESSORS, SMEM_BYTES, FewRows, groups_of, offsets

MAX_ROWS = 16
# Exchange buffers of a warp. It sends turn i when it has turn i - 1 of every block of the cluster, and each of them sent
# that behind reading turn i - 2: two buffers are enough.
BUFFERS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the kernel; see `pallas_kernels.select` for how they are chosen.

    Fields:
      warps: warps of a block, a multiple of 4.
      cluster: blocks that share the K of a tile, a power of two.
      chunks: tiles of 64 along K that one copy brings.
      ring_bytes: shared memory for the rings of all warps of a block.
      blocks: blocks to launch; a multiple of `cluster`.
      hint: ask L2 to evict the weight first.
      unroll: chunks in one turn of the arithmetic; fewer make a smaller program.
      height: tiles of 16 rows that a warp takes at once; two read x from shared memory half as often.
    """

    warps: int = 8
    cluster: int = 2
    chunks: int = 4
    ring_bytes: int = 96 * 1024
    blocks: int = 132
    hint: bool = True
    unroll: int = 8
    height: int = 1


@dataclasses.dataclass(frozen=True)
class Plan(FewRows):
    """Everything static about one launch: sizes, and offsets in shared memory.

    The work of a cluster is a sequence of strips (`height` tiles of 16 rows). Each warp takes whole strips in turns; the
    `strips % warps` that come out over are split evenly, along K, over all warps ("loose" strips), and go first.
    """

    config: Config
    gathered: bool = False

    @property
    def height(self) -> int:
        return self.config.height if self.tiles % self.config.height == 0 else 1

    @property
    def strips(self) -> int:
        return self.tiles // self.height

    @property
    def clusters(self) -> int:
        return min(self.config.blocks // self.config.cluster, self.strips)

    @property
    def single(self) -> bool:
        """Whether no cluster has more than one strip."""
        return self.strips <= self.clusters

    @property
    def chunks(self) -> int:
        """Chunks of a copy: divides those of a block, and fits the groups."""
        for c in range(self.config.chunks, 1, -1):
            span, group = c * CHUNK, self.form.group
            if self.block_chunks % c == 0 and (not group or span % group == 0 or group % span == 0):
                return c
        return 1

    @property
    def pieces(self) -> int:
        """Copies along the K of a block."""
        return self.block_chunks // self.chunks

    @property
    def piece_groups(self) -> int:
        """Groups that one copy touches."""
        return groups_of(self.form, self.chunks * CHUNK)

    @property
    def unroll(self) -> int:
        """Chunks of one turn of the arithmetic: divides the chunks of a copy, and ends with groups."""
        for u in range(min(self.config.unroll, self.chunks), 0, -1):
            span, group = u * CHUNK, self.form.group
            whole = not group or span % group == 0 or (group % span == 0 and self.chunks * CHUNK <= group)
            if self.chunks % u == 0 and whole and self.form.scale != "u8":
                return u
        return self.chunks

    @property
    def part_groups(self) -> int:
        """Groups of one turn of the arithmetic."""
        return groups_of(self.form, self.unroll * CHUNK)

    @property
    def code_bytes(self) -> int:
        return self.chunks * self.form.chunk_bytes

    @property
    def param_bytes(self) -> list[int]:
        """Bytes of the scales and of the zeros of one tile in a stage."""
        return [self.piece_groups * ROWS * ITEM_BYTES[kind] for kind in self.form.params]

    @property
    def param_offsets(self) -> list[int]:
        """Offsets of scales and zeros of the first tile in a stage, and the stage's size at the end."""
        offsets, at = [], self.height * self.code_bytes
        for size in self.param_bytes:
            offsets.append(at)
            at += self.height * size
        return [*offsets, -(-at // 16) * 16]

    @property
    def stage_bytes(self) -> int:
        return self.param_offsets[-1]

    @property
    def limit(self) -> int:
        """Shared memory of a block: all blocks must be resident at once (Hopper has 132 multiprocessors)."""
        return SMEM_BYTES // -(-self.config.blocks // MULTIPROCESSORS)

    @property
    def stages(self) -> int:
        """Slots of a warp's ring: what the configuration asks for, less where the work or the memory is smaller."""
        most = -(-(-(-self.strips // self.clusters) * self.pieces) // self.config.warps)
        room = (self.limit - 2048 - self.fixed_bytes) // self.config.warps
        return max(2, min(min(self.config.ring_bytes // self.config.warps, room) // self.stage_bytes, most, 32))

    @property
    def fixed_bytes(self) -> int:
        """Shared memory that does not depend on the length of the rings."""
        return self.table_bytes + self.other_bytes

    @property
    def other_bytes(self) -> int:
        """Without the decode function's table."""
        x = self.m * self.x_pitch + self.unordered_bytes
        return x + self.table2_bytes + self.sums_bytes + self.loose_bytes

    @functools.cached_property
    def wide_table(self) -> bool:
        return self.tables_of(True) + self.other_bytes + self.config.ring_bytes <= self.limit - 2048

    @property
    def columns(self) -> int:
        """Groups of 8 rows of x."""
        return -(-self.m // 8)

    @property
    def x_warps(self) -> int:
        """Warps that fetch rows of x."""
        return min(self.m, self.config.warps)

    @property
    def unordered_bytes(self) -> int:
        """x as it comes, and the block's part of the permutation."""
        return self.k * 2 + self.block_chunks * CHUNK * 4 if self.gathered else 0

    @property
    def x_pitch(self) -> int:
        """Bytes from row to row of x: 16 over a multiple of 128, so that 8 rows lie in different banks."""
        return self.block_chunks * CHUNK * 2 + 16

    @property
    def lanes(self) -> int:
        """Lanes of a warp that hold sums."""
        return 8 if self.m == 1 else 32

    @property
    def tile_sums(self) -> int:
        """Sums of a tile that one of these lanes holds."""
        return 2 if self.m == 1 else 4 * self.columns

    @property
    def strip_bytes(self) -> int:
        """One warp's sums of a strip."""
        return self.height * self.tile_sums * self.lanes * 4

    @property
    def unit(self) -> int:
        """Neighbouring sums of a lane that one block of the cluster adds up."""
        return min(2 if self.m == 1 else 4, self.height * self.tile_sums // self.config.cluster)

    @property
    def units(self) -> int:
        return self.height * self.tile_sums // self.unit

    @property
    def sums_bytes(self) -> int:
        return self.config.warps * BUFFERS * self.strip_bytes if self.config.cluster > 1 else 0

    @property
    def loose(self) -> list[int]:
        """Numbers of loose strips: of most clusters, and of the first ones if these have a strip more."""
        least = self.strips // self.clusters
        counts = [least, least + 1] if self.strips % self.clusters else [least]
        return [count % self.config.warps for count in counts]

    def loose_parts(self, count: int) -> int:
        """Most warps of a block that share one of `count` loose strips."""
        most, p = 1, self.pieces
        total, warps = count * p, min(self.config.warps, count * p)
        for j in range(count):
            most = max(most, ((j + 1) * p * warps - 1) // total - ((j * p + 1) * warps - 1) // total + 1)
        return most

    @property
    def loose_bytes(self) -> int:
        """Room for the parts of the loose strips that one block adds up."""
        cluster = self.config.cluster
        return max(-(-f // cluster) * self.loose_parts(f) for f in self.loose) * cluster * self.strip_bytes

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        sizes = {
            "ring": self.config.warps * self.stages * self.stage_bytes,
            "barriers": 8 * (self.config.warps * (self.stages + BUFFERS) + self.x_warps + 1),
            "x": self.m * self.x_pitch,
            "unordered": self.unordered_bytes,
            "tables": self.table_bytes,
            "table2": self.table2_bytes,
            "sums": self.sums_bytes,
            "loose": self.loose_bytes,
        }
        return offsets(sizes, 128)

    @property
    def nested_span(self) -> int:
        """Blocks of second-level scales that the groups of one row and one copy can touch: 0 (none there), 1 or 2."""
        if self.form.scale != "u8":
            return 0
        groups = self.form.groups(self.k)
        return (
            1
            if NESTED_BLOCK % groups == 0 or NESTED_BLOCK % self.piece_groups == 0 == groups % self.piece_groups
            else 2
        )

    def reason(self) -> str | None:
        """Why this launch is not possible, or None."""
        if self.m > MAX_ROWS:
            return f"{self.m} rows of x, at most {MAX_ROWS}"
        if self.gathered and self.m > 1:
            return "act-order inside the kernel is for one row of x"
        if self.k % 8 or self.n % 8:
            return f"{self.n}x{self.k} are no multiples of 8"
        if self.k_chunks % self.config.cluster:
            return f"{self.k_chunks} chunks of {CHUNK} inputs, not a multiple of {self.config.cluster} blocks"
        if self.height * self.tile_sums < self.config.cluster:
            return f"fewer sums of a lane than the {self.config.cluster} blocks of a cluster"
        if self.layout["bytes"] > self.limit:
            return f"{self.layout['bytes']} bytes of shared memory, {self.limit} are there"
        return None
