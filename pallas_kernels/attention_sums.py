"""The end of the attention kernel: the softmax sums of all warps and blocks meet, and are added in a fixed order."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.attention_plan import CHUNK, LOG2E, NONE, Heads, Plan
from pallas_kernels.ptx import Int


class Sums:
    """What becomes of the state (maximum, total, weighted values) that each warp has of its keys."""

    plan: Plan
    spec: Heads
    pointers: dict[str, ir.Value]
    thread: Int
    lane: Int
    warp: Int
    g: Int
    t: Int
    rank: Int
    row: Int
    head: Int
    part: Int
    sums: Int
    softmax: Int
    weights: Int
    barrier: Int

    def send(self, state: list[ir.Value]) -> None:
        """This warp's softmax to the blocks that add it up."""
        plan, heads = self.plan, self.spec.at_once
        top, total, out = state[0], state[1], state[2:]
        for mask in (1, 2):
            total = ptx.add(total, ptx.shuffle_xor(total, mask))
        if plan.cluster > 1:
            ptx.cluster_wait()
        exists = ptx.select(self.g < heads, 1, 0)
        for h in range(self.spec.head_dim // 64):
            chunk = self.t + 4 * h
            owner, place = chunk // plan.held, chunk % plan.held
            entry = self.part * heads + self.g
            at, pair = self.sums + (entry * plan.held + place) * (CHUNK * 4), self.softmax + entry * 8
            bar = self.barrier
            if plan.cluster > 1:
                at, pair, bar = ptx.remote(at, owner), ptx.remote(pair, owner), ptx.remote(bar, owner)
            with ptx.when(exists == 1):
                for e in range(0, CHUNK, 4):
                    self.put(at + e * 4, out[CHUNK * h + e : CHUNK * h + e + 4], bar)
            with ptx.when((exists & ptx.select(place == 0, 1, 0)) == 1):
                self.put(pair, [top, total], bar)
        ptx.sync_warp()

    def put(self, at: Int, values: list[ir.Value], bar: Int) -> None:
        if self.plan.cluster > 1:
            ptx.store_remote(at, values, bar)
        else:
            ptx.store_shared(at, values)

    def finish(self) -> None:
        """The weight of each part, and the weighted sum of the parts in order."""
        plan, spec = self.plan, self.spec
        heads, parts = spec.at_once, plan.parts
        if plan.cluster > 1:
            ptx.barrier_wait(self.barrier, 0, "cluster")
        else:
            ptx.sync_block()
        for first in range(0, heads, plan.warps):
            head = self.warp + first
            with ptx.when(head < heads):
                self.weigh(head)
        ptx.sync_block()
        width = plan.held * CHUNK

        def item(i: Int, carry: list[Any]) -> list[Any]:
            head, place = (i * 2) // width, (i * 2) % width
            totals = [ptx.zero(), ptx.zero()]
            for p in range(parts):
                weight = ptx.load_shared(self.weights + (head * parts + p) * 4, "f32")[0]
                part = ptx.load_shared(self.sums + p * (heads * width * 4) + i * 8, "f32", 2)
                totals = [ptx.fma(weight, x, y) for x, y in zip(part, totals, strict=True)]
            at = ptx.address(self.pointers["out"], self.row, spec.heads * spec.head_dim * 2)
            at = ptx.address(at, (self.head + head) * spec.head_dim + self.rank * width + place, 2)
            ptx.store_words(at, [ptx.pack_pair(totals[0], totals[1], plan.dtype)])
            return carry

        ptx.loop(self.thread, heads * width // 2, plan.warps * 32, [], item)

    def weigh(self, head: Int) -> None:
        """One warp: exp(maximum of a part - maximum of all) / sum of all, for each part of a head."""
        heads, parts = self.spec.at_once, self.plan.parts
        ptx.sync_warp()
        inside = self.lane < parts
        lane = ptx.select(inside, self.lane, 0)
        top, total = ptx.load_shared(self.softmax + (lane * heads + head) * 8, "f32", 2)
        top = ptx.select_float(inside, top, ptx.constant(NONE))
        most = top
        for mask in (1, 2, 4, 8, 16):
            most = ptx.maximum(most, ptx.shuffle_xor(most, mask))
        sink = None
        if "sinks" in self.pointers:
            stored = ptx.load_global(ptx.address(self.pointers["sinks"], self.head + head, 4), "f32")
            sink = ptx.mul(stored, ptx.constant(LOG2E))
            most = ptx.maximum(most, sink)
        minus = ptx.mul(most, ptx.constant(-1.0))
        weight = ptx.exp2(ptx.add(top, minus))
        everything = ptx.mul(weight, total)
        for mask in (1, 2, 4, 8, 16):
            everything = ptx.add(everything, ptx.shuffle_xor(everything, mask))
        if sink is not None:
            everything = ptx.add(everything, ptx.exp2(ptx.add(sink, minus)))
        with ptx.when(inside):
            ptx.store_shared(self.weights + (head * parts + lane) * 4, [ptx.mul(weight, ptx.reciprocal(everything))])
        ptx.sync_warp()
