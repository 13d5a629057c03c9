"""Configuration of the streaming kernel, and everything static about one launch: sizes and offsets."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.decode import DECODES
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS, Form

SMEM_BYTES = 226 * 1024  # of 227 KiB: the launch adds a static byte
MAX_ROWS = 16
MULTIPROCESSORS = 132
# Exchange buffers. A warp writes sums of batch b + 4 into the buffer of batch b: by then it has seen batch b + 2
# complete, so every warp has sent batch b + 2, which each does after it has read batch b.
BUFFERS = 4
PARTIALS_BYTES = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Knobs of the kernel; see `pallas_kernels.select` for how they are chosen.

    Fields:
      warps: warps of a block, a multiple of 4.
      cluster: blocks that share the K of a tile.
      chunks: tiles of 64 along K that one copy brings.
      ring_bytes: shared memory for the rings of all warps of a block.
      blocks: blocks to launch; a multiple of `cluster`.
      hint: ask L2 to evict the weight first.
      unroll: chunks in one turn of the arithmetic; fewer make a smaller program.
    """

    warps: int = 8
    cluster: int = 2
    chunks: int = 4
    ring_bytes: int = 96 * 1024
    blocks: int = 132
    hint: bool = True
    unroll: int = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch: sizes, and offsets in shared memory."""

    m: int
    n: int
    k: int
    form: Form
    config: Config
    dtype: str
    gathered: bool = False

    @property
    def tiles(self) -> int:
        return -(-self.n // ROWS)

    @property
    def k_chunks(self) -> int:
        return -(-self.k // CHUNK)

    @property
    def chunks(self) -> int:
        """Chunks of a copy: divides the number of chunks, and fits the groups."""
        for c in range(self.config.chunks, 1, -1):
            span, group = c * CHUNK, self.form.group
            if self.k_chunks % c == 0 and (not group or span % group == 0 or group % span == 0):
                return c
        return 1

    @property
    def pieces(self) -> int:
        return self.k_chunks // self.chunks

    @property
    def parts(self) -> int:
        return self.config.warps * self.config.cluster

    @property
    def clusters(self) -> int:
        return min(self.config.blocks // self.config.cluster, self.tiles)

    @property
    def piece_groups(self) -> int:
        """Groups that one copy touches."""
        return max(1, self.chunks * CHUNK // self.form.group) if self.form.group else 1

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
        return max(1, self.unroll * CHUNK // self.form.group) if self.form.group else 1

    @property
    def code_bytes(self) -> int:
        return self.chunks * self.form.chunk_bytes

    @property
    def param_offsets(self) -> list[int]:
        """Offsets of scales and zeros in a stage, and its size at the end."""
        offsets, at = [], self.code_bytes
        for kind in self.form.params:
            offsets.append(at)
            at += self.piece_groups * ROWS * ITEM_BYTES[kind]
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
        most = -(-self.pieces // self.parts) * -(-self.tiles // self.clusters)
        room = (
            self.limit - 4096 - self.fixed_bytes - BUFFERS * self.owned * self.parts * self.partial_bytes
        ) // self.config.warps
        return max(2, min(min(self.config.ring_bytes // self.config.warps, room) // self.stage_bytes, most, 32))

    @property
    def owned(self) -> int:
        """Tiles that a block adds up at once."""
        most = -(-self.tiles // self.clusters // self.config.cluster)
        return max(1, min(PARTIALS_BYTES // (BUFFERS * self.parts * self.partial_bytes), most))

    @property
    def fixed_bytes(self) -> int:
        """Shared memory that does not depend on the length of the rings."""
        tables = DECODES[self.form.kind].shared_bytes(self.form) + (1024 if self.form.scale == "u8" else 0)
        return self.m * self.x_pitch + tables + self.unordered_bytes

    @property
    def columns(self) -> int:
        """Groups of 8 rows of x."""
        return -(-self.m // 8)

    @property
    def x_chunks(self) -> int:
        """Most chunks of x that one block reads."""
        ends = [
            ((r + 1) * self.config.warps * self.pieces // self.parts)
            - (r * self.config.warps * self.pieces // self.parts)
            for r in range(self.config.cluster)
        ]
        return max(ends) * self.chunks

    @property
    def unordered_bytes(self) -> int:
        """x as it comes, and the block's part of the permutation."""
        return self.k * 2 + self.x_chunks * CHUNK * 4 if self.gathered else 0

    @property
    def x_pitch(self) -> int:
        """Bytes from row to row of x: 16 over a multiple of 128, so that 8 rows lie in different banks."""
        return self.x_chunks * CHUNK * 2 + 16

    @property
    def partial_bytes(self) -> int:
        """One warp's partial sums of a tile."""
        return ROWS * 4 if self.m == 1 else ROWS * 8 * 4 * self.columns

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        at, out = 0, {}

        def put(name: str, nbytes: int) -> None:
            nonlocal at
            out[name] = at
            at += -(-nbytes // 128) * 128

        put("ring", self.config.warps * self.stages * self.stage_bytes)
        put("barriers", 8 * (self.config.warps * self.stages + 1 + BUFFERS))
        put("x", self.m * self.x_pitch)
        put("unordered", self.unordered_bytes)
        put("tables", DECODES[self.form.kind].shared_bytes(self.form))
        put("table2", 1024 if self.form.scale == "u8" else 0)
        put("partials", BUFFERS * self.owned * self.parts * self.partial_bytes)
        out["bytes"] = at
        return out

    def reason(self) -> str | None:
        """Why this launch is not possible, or None."""
        if self.m > MAX_ROWS:
            return f"{self.m} rows of x, at most {MAX_ROWS}"
        if self.gathered and self.m > 1:
            return "act-order inside the kernel is for one row of x"
        if self.k % 8:
            return f"in_features {self.k} is not a multiple of 8"
        if self.layout["bytes"] > self.limit:
            return f"{self.layout['bytes']} bytes of shared memory, {self.limit} are there"
        return None
