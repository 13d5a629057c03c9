"""Partial sums of the streaming kernel: exchanged, added up in a fixed order, written as y."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import ROWS
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.output import Writer
from pallas_kernels.skeletons.stream_plan import BUFFERS, Plan


class Sums(Writer):
    """What becomes of the sums of a strip. A lane's sums of a strip lie tile by tile, in each tile 8 rows of x by 8 rows
    of x, in each of these as an m16n8 accumulator (for one row of x: rows g and g + 8, in every fourth lane).
    """

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int, bars: Int, thread: Int, rank: Int):
        c = plan.config
        self.plan, self.pointers, self.thread, self.rank = plan, pointers, thread, rank
        self.lane, self.warp = thread & 31, thread >> 5
        self.cluster_first = ptx.special("clusterid.x") if c.cluster > 1 else ptx.special("ctaid.x")
        self.buffers = shared + plan.layout["sums"] + self.warp * (BUFFERS * plan.strip_bytes)
        self.loose = shared + plan.layout["loose"]
        self.bars, self.loose_bar = bars + self.warp * (8 * BUFFERS), bars + c.warps * 8 * BUFFERS
        self.place = self.lane >> 2 if plan.m == 1 else self.lane  # of a lane's sums among those of the warp
        self.holds = (self.lane & 3) == 0
        self.more = self.cluster_first < plan.strips % plan.clusters  # this cluster has a strip more than others
        self.strips = self.by_count(lambda count: count)  # loose ones

    def initialise(self) -> None:
        """Barriers, before the blocks meet."""
        plan, c = self.plan, self.plan.config
        with ptx.when(ptx.select(self.lane == 0, 1, 0) & ptx.select(self.warp < c.warps, 1, 0) == 1):
            for i in range(BUFFERS if c.cluster > 1 else 0):
                ptx.barrier_init(self.bars + 8 * i, 1)
            with ptx.when(self.warp == 0):
                ptx.barrier_init(self.loose_bar, 1 if c.cluster > 1 else c.warps)
            ptx.fence_barrier_init()
            if c.cluster > 1:
                with ptx.when(self.warp == 0):

                    def count(j: Int, carry: list[Any]) -> list[Any]:
                        return [carry[0] + self.sharers(j)]

                    parts = ptx.loop(self.rank, self.strips, c.cluster, [Int(0)], count)[0]
                    ptx.barrier_expect(self.loose_bar, parts * (c.cluster * plan.strip_bytes))
        ptx.sync_warp()

    # ---- loose strips

    def by_count(self, function: Callable[[int], Any]) -> Int:
        """A function of the number of loose strips: static but for the choice of one of two."""
        values = [function(count) for count in self.plan.loose]
        return ptx.select(self.more, values[1], values[0]) if len(values) == 2 else Int(ptx.raw(values[0]))

    def share(self, worker: Int) -> tuple[Int, Int]:
        """First piece of the loose strips (as one sequence) that is a warp's, and the one behind its last."""

        def end(warp: Int, count: int) -> Any:
            total = count * self.plan.pieces
            warps = min(self.plan.config.warps, total)  # that have a share
            return ptx.select(warp < warps, warp, warps) * total // warps if total else 0

        first, behind = (self.by_count(functools.partial(end, w)) for w in (worker, worker + 1))
        return first, behind

    def sharer(self, piece: Int) -> Int:
        """The warp that has a piece of the loose strips."""

        def warp(count: int) -> Any:
            total = count * self.plan.pieces
            return ((piece + 1) * min(self.plan.config.warps, total) - 1) // total if total else 0

        return self.by_count(warp)

    def sharers(self, j: Int) -> Int:
        """Number of warps of a block that have pieces of loose strip j."""
        pieces = self.plan.pieces
        return self.sharer((j + 1) * pieces - 1) - self.sharer(j * pieces) + 1

    def loose_place(self, j: Int, sharer: Any, rank: Any) -> Int:
        """Where the sums of loose strip j lie in the block that owns it."""
        plan, cluster = self.plan, self.plan.config.cluster
        slot = j // cluster if cluster > 1 else j
        return self.loose + ((slot * self.by_count(plan.loose_parts) + sharer) * cluster + rank) * plan.strip_bytes

    def send_loose(self, j: Int, sums: Sequence[ir.Value]) -> None:
        plan, cluster = self.plan, self.plan.config.cluster
        at = self.loose_place(j, self.warp - self.sharer(j * plan.pieces), self.rank)
        bar = self.loose_bar
        if cluster > 1:
            owner = j % cluster
            at, bar = ptx.remote(at, owner), ptx.remote(bar, owner)
        width = 2 if plan.m == 1 else 4
        for i in range(0, len(sums), width):
            self.store(at + (i * plan.lanes + self.place * width) * 4, sums[i : i + width], bar)

    def store(self, at: Int, values: Sequence[ir.Value], bar: Int) -> None:
        with ptx.when(self.holds) if self.plan.m == 1 else contextlib.nullcontext():
            if self.plan.config.cluster > 1:
                ptx.store_remote(at, values, bar)
            else:
                ptx.store_shared(at, values)

    def loose_sent(self) -> None:
        """Of a warp, once, behind its last loose sums."""
        if self.plan.config.cluster == 1:
            ptx.sync_warp()
            with ptx.when(self.lane == 0):
                ptx.barrier_arrive(self.loose_bar)

    def finish_loose(self) -> None:
        """All warps: adds the parts of the loose strips that the block owns, and writes them."""
        plan, c = self.plan, self.plan.config
        ptx.barrier_wait(self.loose_bar, 0)
        ptx.sync_warp()
        width = 2 if plan.m == 1 else 4
        per_strip = plan.height * plan.tile_sums // width

        def item(i: Int, carry: list[Any]) -> list[Any]:
            slot, group = i // per_strip, i % per_strip
            j = slot * c.cluster + self.rank
            at = self.loose_place(j, 0, 0) + (group * plan.lanes + self.place) * (width * 4)

            def part(p: Int, totals: list[Any]) -> list[Any]:
                values = ptx.load_shared(at + p * plan.strip_bytes, "f32", width)
                return [ptx.add(t, v) for t, v in zip(totals, values)]

            totals = ptx.loop(0, self.sharers(j) * c.cluster, 1, [ptx.zero()] * width, part)
            ptx.sync_warp()
            self.write(j, group * width, totals)
            return carry

        owned = (self.strips + (c.cluster - 1) - self.rank) // c.cluster
        # the first items go to the last warps: those have the fewest strips
        ptx.loop(c.warps - 1 - self.warp, owned * per_strip, c.warps, [], item)
        ptx.sync_warp()

    # ---- strips that a warp has alone

    def send(self, turn: Int, strip: Int, sums: Sequence[ir.Value]) -> None:
        """To the warps of the same number in the blocks of the cluster, each of which adds up a share."""
        plan, cluster = self.plan, self.plan.config.cluster
        if cluster == 1:
            width = 2 if plan.m == 1 else 4
            for i in range(0, len(sums), width):
                self.write(strip, i, sums[i : i + width])
            return
        bar, at = self.buffer(turn)
        with ptx.when(self.lane == 0):
            ptx.barrier_expect(bar, plan.strip_bytes)
        ptx.sync_warp()
        size = plan.lanes * plan.unit * 4
        for u in range(plan.units):
            owner = (self.warp + u) & (cluster - 1)
            to = at + (u // cluster * cluster + self.rank) * size + self.place * (plan.unit * 4)
            self.store(ptx.remote(to, owner), sums[u * plan.unit : (u + 1) * plan.unit], ptx.remote(bar, owner))

    def buffer(self, turn: Int) -> tuple[Int, Int]:
        """Barrier and place of the buffer of a turn."""
        which = turn & (BUFFERS - 1)
        return self.bars + which * 8, self.buffers + which * self.plan.strip_bytes

    def finish(self, turn: Int, strip: Int) -> None:
        """Adds what the blocks sent in a turn, and writes it."""
        plan, cluster = self.plan, self.plan.config.cluster
        bar, at = self.buffer(turn)
        ptx.barrier_wait(bar, turn // BUFFERS & 1)
        ptx.sync_warp()
        size = plan.lanes * plan.unit * 4
        for k in range(plan.units // cluster):
            totals = [ptx.zero()] * plan.unit
            for p in range(cluster):
                values = ptx.load_shared(at + (k * cluster + p) * size + self.place * (plan.unit * 4), "f32", plan.unit)
                totals = [ptx.add(t, v) for t, v in zip(totals, values)]
            unit = k * cluster + ((self.rank - self.warp) & (cluster - 1))
            self.write(strip, unit * plan.unit, totals)

    # ---- output

    def write(self, strip: Int, first: Any, totals: Sequence[ir.Value]) -> None:
        """A lane's sums `first`, ... of a strip of the cluster as y; a whole warp calls it."""
        plan = self.plan
        first = first if isinstance(first, Int) else Int(first)
        tile = (self.cluster_first + strip * plan.clusters) * plan.height + first // plan.tile_sums
        rest = first % plan.tile_sums
        g, t = self.lane >> 2, self.lane & 3
        if plan.m == 1:
            for e, total in enumerate(totals):
                self.put(tile * ROWS + g + 8 * (rest + e), Int(0), total, self.holds)
        elif len(totals) == 1:
            e = rest & 3
            self.put(tile * ROWS + g + 8 * (e >> 1), (rest >> 2) * 8 + t * 2 + (e & 1), totals[0])
        else:
            for i in range(0, len(totals), 2):
                self.put_pairs(tile * ROWS + 8 * (((rest & 3) >> 1) + i // 2), (rest >> 2) * 8, totals[i : i + 2])

    def put(self, n: Int, m: Int, total: ir.Value, condition: ir.Value | None = None) -> None:
        """One value of y, if it exists."""
        plan = self.plan
        inside = ptx.select(n < plan.n, 1, 0) & ptx.select(m < plan.m, 1, 0)
        if condition is not None:
            inside = inside & ptx.select(condition, 1, 0)
        with ptx.when(inside == 1):
            total = self.biased(n, total)
            text = f"{{ .reg .b16 h; cvt.rn.{plan.dtype}.f32 h, $1; st.global.b16 [$0], h; }}"
            ptx.asm([], text, ptx.address(self.pointers["y"], m * plan.n + n, 2), total)
        ptx.sync_warp()
