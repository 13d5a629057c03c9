"""Which rows a warpgroup of the wgmma kernel multiplies in which pass, and over which steps along K."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels import ptx
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_plan import Plan


@dataclasses.dataclass
class Share:
    """A warpgroup's part of a pass: a unit of 64 rows of the weight, and the steps [begin, end); none where equal."""

    unit: Int
    begin: Int
    end: Int


class Tiles:
    """Clusters take tiles of `block_units` units in turn; all warpgroups run over the same steps."""

    def __init__(self, plan: Plan, cluster: Int, mate: Int, part: Int):
        self.plan, self.cluster, self.mate = plan, cluster, mate
        self.passes = (plan.tiles + plan.clusters - 1 - cluster) // plan.clusters
        self.begin = part * plan.steps // plan.config.split
        self.end = (part + 1) * plan.steps // plan.config.split
        self.tail: tuple[Any, Any] = (0, 0)
        if plan.config.tail:
            self.begin = part * (plan.steps - plan.common)
            self.end = self.begin + plan.common
            self.tail = plan.common, plan.steps - plan.common  # of both, each for its own columns

    def tile(self, t: Int) -> tuple[Int, Int]:
        """Tile of x, and first unit of the weight, of pass t."""
        plan, c = self.plan, self.plan.config
        u = self.cluster + t * plan.clusters
        group = min(c.m_group or plan.m_tiles, plan.m_tiles)
        first = u // (group * plan.n_tiles) * group  # of the group's tiles of x
        size = ptx.select(first + group < plan.m_tiles, group, plan.m_tiles - first)
        rest = u - first * plan.n_tiles
        im, it = first + rest % size, rest // size
        if c.share > 1:
            it = it * c.share + self.mate
        return im, it * plan.block_units

    def share(self, t: Int, first: Int, w: Any) -> Share:
        return Share(first + w, self.begin, self.end)


class Pairs:
    """A pair of blocks takes a range of units for one tile of x, so that no block waits for others that have a tile more.

    What does not fill a pass of both blocks is dealt out evenly and comes first. An odd unit goes to both: the first
    block runs over the first half of its steps, the second, whose first pass begins in the middle, over the rest. Their
    sums meet, and are written, while other warpgroups go on; and the warpgroups that had less to do stay ahead by some
    steps in the passes that follow, so that epilogues do not coincide and the tensor core always has work.
    """

    def __init__(self, plan: Plan, cluster: Int, rank: Int):
        self.plan, self.rank = plan, rank
        groups, both = plan.tiles // plan.m_tiles, 2 * plan.config.wn
        self.im, j = cluster % plan.m_tiles, cluster // plan.m_tiles
        self.low = j * plan.units // groups
        count = (j + 1) * plan.units // groups - self.low
        full = count // both
        self.rest = count - full * both
        self.each = self.rest >> 1
        self.odd = self.rest & 1
        self.partial = ptx.select(Int(0) < self.rest, 1, 0)  # passes that not all warpgroups have a unit for
        self.passes = full + self.partial
        self.begin, self.end, self.tail = Int(0), Int(plan.steps), (0, 0)

    def tile(self, t: Int) -> tuple[Int, Int]:
        wn = self.plan.config.wn
        later = self.low + self.rest + (t - self.partial) * (2 * wn) + self.rank * wn
        return self.im, ptx.select(t < self.partial, self.low + self.rank * self.each, later)

    def share(self, t: Int, first: Int, w: Any) -> Share:
        w = Int(w) if isinstance(w, int) else w
        steps, middle = self.plan.steps, self.plan.steps // 2
        whole = w < ptx.select(t < self.partial, self.each, self.plan.config.wn)
        half = ptx.select(self.rank == 0, middle, steps - middle) * self.odd
        half = ptx.select(w == ptx.select(t < self.partial, self.each, -1), half, 0)
        unit = ptx.select(whole, first + w, self.low + self.each * 2)
        return Share(unit, self.begin, ptx.select(whole, steps, half))

    def place(self, t: Int, step: Int) -> Int:
        """Where along K a block is in a step of pass t."""
        steps = self.plan.steps
        turned = ptx.select(t < self.partial, self.rank * self.odd, 0) * (steps // 2)
        at = step + turned
        return ptx.select(at < steps, at, at - steps)
