"""What every part of the wgmma kernel knows: the plan, this thread's place, and addresses."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode import DECODES
from pallas_kernels.form import CHUNK, ROWS
from pallas_kernels.launch import pointers
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_plan import UNIT, Plan
from pallas_kernels.skeletons.gemm_work import Pairs, Tiles
from pallas_kernels.skeletons.nested import Nested

TABLES = ("table", "table2", "absmax2", "offset")


class Block:
    """A block of the kernel; attributes are values of one thread."""

    def __init__(self, plan: Plan, ctx: Any, refs: dict[str, ir.Value], arrays: dict[str, Any], shared: Int):
        self.plan, self.refs = plan, refs
        c = plan.config
        self.decode = DECODES[plan.form.decode]
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, hopper.uniform(self.thread >> 5)
        self.wg, self.t = self.warp >> 2, self.thread & 127
        self.unit, self.turn = (self.wg // plan.depth, self.wg % plan.depth) if plan.depth > 1 else (self.wg, Int(0))
        clustered = plan.cluster > 1
        self.rank = ptx.special("cluster_ctarank") if clustered else Int(0)
        cluster = ptx.special("clusterid.x") if clustered else ptx.special("ctaid.x")
        # ranks of a cluster: `share` neighbours use the same x; the parts of K follow each other
        self.mate = self.rank % c.share if c.share > 1 else Int(0)
        self.part = self.rank // c.share if c.split > 1 else Int(0)
        self.work = Pairs(plan, cluster, self.rank) if c.even else Tiles(plan, cluster, self.mate, self.part)
        at = plan.layout
        self.at = {name: shared + offset for name, offset in at.items() if name != "bytes"}
        self.full, self.empty = self.at["barriers"], self.at["barriers"] + 8 * plan.stages
        self.arrived, self.freed, self.swapped = (self.empty + 8 * (plan.stages + i) for i in range(3))
        stacked = "layer" in refs
        names = [n for n in TABLES if n in refs]
        names += ["layer"] if names and "layer" in refs else []
        self.tables = pointers({n: refs[n] for n in names}, {n: arrays[n] for n in names})
        nested, table2 = plan.form.scale == "u8", self.at["table2"]
        self.pairs = plan.pairs(self.at["tables"], self.lane)
        self.nested = Nested(plan, self.tables, table2, self.thread, 128 * c.wn) if nested else None
        self.layer = [Int(ptx.load_global(ptx.global_pointer(refs["layer"]), "u32"))] if stacked else []
        lead = (1,) if stacked else ()
        # boxes are given slowest axis first, as shapes are
        self.maps = {"x": hopper.tensor_map(ctx, refs["x"], (plan.x_rows, CHUNK), 128)}
        for name, rows in {"y": plan.own_rows, **({"y half": c.tile_m // 2} if c.even else {})}.items():
            self.maps[name] = hopper.tensor_map(ctx, refs["y"], (plan.piece(rows), UNIT), 128)
        rows = plan.block_units * UNIT // ROWS // plan.boxes
        self.maps["codes"] = hopper.tensor_map(ctx, refs["codes"], (*lead, rows, c.chunks, plan.form.bits * 32))
        for name in ("scales", "zeros")[: len(plan.form.params)]:
            # all groups of a step in one piece for the copy engine
            box = (*lead, rows, plan.step_groups * ROWS)
            self.maps[name] = hopper.tensor_map(ctx, refs[name], box, folded=True)

    def after(self, slot: Int, parity: Int, count: int = 1) -> tuple[Int, Int]:
        """The slot of the ring `count` behind a slot."""
        behind, stages = slot + count, self.plan.stages
        if count == 1:  # stands in the way of the next wait: the shortest form
            wrap, first = behind == stages, Int(0)
        else:
            wrap, first = Int(stages - 1) < behind, behind - stages
        return ptx.select(wrap, first, behind), parity ^ ptx.select(wrap, 1, 0)

    def release(self, slot: Int) -> None:
        """The slot may be filled again, here and in the blocks that share x."""
        c = self.plan.config
        if c.share == 1:
            with ptx.when(self.t == 0):
                ptx.barrier_arrive(self.empty + slot * 8)
        else:
            with ptx.when(self.t < c.share):
                rank = self.rank - self.mate + self.t
                hopper.arrive_remote(self.empty + slot * 8, rank)
