"""Scales and zeros in the streaming kernel: read from the ring, nested scales put together."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES
from pallas_kernels.decode.scaled import as_floats, shifts
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.nested import Nested, one_of
from pallas_kernels.skeletons.stream_plan import Plan


class Params:
    """What a lane needs of scales and zeros: those of rows g and g + 8 (g = lane / 4) of each tile."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int, thread: Int, rank: Int):
        self.plan, self.pointers, self.thread, self.rank = plan, pointers, thread, rank
        self.lane = thread & 31
        self.cluster_first = ptx.special("clusterid.x") if plan.config.cluster > 1 else ptx.special("ctaid.x")
        self.is_nested = plan.form.scale == "u8"
        self.scales = Nested(plan, pointers, shared + plan.layout["table2"], thread, plan.config.warps * 32)

    def group_of(self, piece: Int) -> Int:
        """First group of a piece (counted along the whole K)."""
        plan, form = self.plan, self.plan.form
        if not form.group:
            return Int(0)
        span = plan.chunks * CHUNK
        return piece * (span // form.group) if span >= form.group else piece // (form.group // span)

    def load(self, at: Int, h: int, group: Int) -> list[list[ir.Value]]:
        """Scales and zeros of one group for rows g and g + 8 of tile h, as stored."""
        plan, out = self.plan, []
        for kind, tile_bytes, offset in zip(plan.form.params, plan.param_bytes, plan.param_offsets):
            size = ITEM_BYTES[kind]
            where = at + offset + h * tile_bytes + group * (ROWS * size) + (self.lane >> 2) * (2 * size)
            if kind == "f32":
                out.append(ptx.load_shared(where, "f32", 2))
            else:
                out.append(ptx.load_shared(where, "u16" if size == 1 else "u32"))
        return out

    def convert(self, stored: list, nested: list, h: int, group: int) -> dict[str, Any]:
        """float32 scales of rows g and g + 8 of tile h, and what the zeros need."""
        form = self.plan.form
        if self.is_nested:
            scales = self.expand(Int(stored[0][0]), nested, h, group)
        else:
            scales = as_floats(form.scale, stored[0])
        out: dict[str, Any] = {"scale": scales}
        if form.zero == "u8" and form.zero_form == "code":
            out["zero"] = DECODES[form.decode].integer_zeros(self.plan.dtype, stored[1][0])
        elif form.zero:
            # (code - zero) * scale = (code - point) * scale + shift, and the like; shift meets the sum of x
            out["shift"] = shifts(form, scales, as_floats(form.zero, stored[1]))
        return out

    # ---- nested scales

    def read(self) -> list[tuple[Int, ir.Value]]:
        """See `Nested.read`. Asks for the second-level scales of the cluster as well: a strip has a few, and each strip
        would begin with a wait for the memory.
        """
        if not self.is_nested:
            return []
        if not self.plan.single:
            self.prefetch()
        return self.scales.read()

    def prefetch(self) -> None:
        plan = self.plan
        strip, groups = self.cluster_first + self.thread * plan.clusters, plan.form.groups(plan.k)
        with ptx.when(strip < plan.strips):
            for h in range(plan.height):
                begin = (strip * plan.height + h) * (ROWS * groups)
                for place in (begin, begin + (ROWS * groups - 1)):
                    ptx.prefetch(self.scales.second(self.scales.block(place)))
        ptx.sync_warp()

    def write(self, entries: list[tuple[Int, ir.Value]]) -> None:
        if entries:
            self.scales.write(entries)

    def nested(self, strip: Int, piece: Int) -> list[Any]:
        """Second-level scales of a piece of a strip of the cluster, loaded a piece ahead of their use (a strip ahead
        where they are those of a row).

        Returns:
          of each tile, for rows g and g + 8, what `Nested.over` finds for the groups of the piece. Nothing where scales
          are plain.
        """
        plan = self.plan
        if not self.is_nested:
            return []
        groups = plan.form.groups(plan.k)
        at = self.group_of(self.rank * plan.pieces + piece)
        out: list[Any] = []
        for h in range(plan.height):
            row = ((self.cluster_first + strip * plan.clusters) * plan.height + h) * ROWS + (self.lane >> 2)
            for half in (0, 8):
                first = (row + half) * groups + at
                out += self.scales.over(first, plan.piece_groups, plan.nested_span)
        return out

    def expand(self, pair: Int, nested: list[Any], h: int, group: int) -> list[ir.Value]:
        """Nested scales of rows g and g + 8 as float32."""
        size = len(nested) // (2 * self.plan.height)  # of a row
        seconds = [one_of(nested[(2 * h + i) * size : (2 * h + i + 1) * size], group) for i in range(2)]
        return self.scales.floats(pair, seconds)
