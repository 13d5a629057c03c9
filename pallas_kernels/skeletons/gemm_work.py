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
        self.split_wg, self.tail = Int(-1), (0, 0)
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
    """A pair of blocks takes a range of units for one tile of x. What does not fill a pass of both blocks is dealt out
    evenly, and an odd unit goes to both: the first block runs over the first half of its steps, the second over the
    rest. So no block waits for others that have a tile more. `split_wg` is the warpgroup with the odd unit, or -1.
    """

    def __init__(self, plan: Plan, cluster: Int, rank: Int):
        self.plan, self.rank = plan, rank
        groups, both = plan.tiles // plan.m_tiles, 2 * plan.config.wn
        self.im, j = cluster % plan.m_tiles, cluster // plan.m_tiles
        self.low = j * plan.units // groups
        count = (j + 1) * plan.units // groups - self.low
        self.full = count // both
        rest = count - self.full * both
        self.each = rest >> 1
        self.odd = rest & 1
        self.passes = self.full + ptx.select(Int(0) < rest, 1, 0)
        self.begin, self.end = Int(0), Int(plan.steps)
        self.split_wg, self.tail = ptx.select(self.odd == 1, self.each, -1), (0, 0)

    def tile(self, t: Int) -> tuple[Int, Int]:
        wn = self.plan.config.wn
        mine = ptx.select(t < self.full, wn, self.each)
        return self.im, self.low + t * (2 * wn) + self.rank * mine

    def share(self, t: Int, first: Int, w: Any) -> Share:
        plan, wn = self.plan, self.plan.config.wn
        w = Int(w) if isinstance(w, int) else w
        whole = w < ptx.select(t < self.full, wn, self.each)
        odd = w == ptx.select(t < self.full, -1, self.split_wg)
        middle = plan.steps // 2
        last = self.low + self.full * (2 * wn) + self.each * 2
        begin = ptx.select(odd, self.rank * middle, 0)
        end = ptx.select(whole, plan.steps, ptx.select(odd, ptx.select(self.rank == 0, middle, plan.steps), 0))
        return Share(ptx.select(odd, last, first + w), begin, end)
