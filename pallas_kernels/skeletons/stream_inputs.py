"""x in the streaming kernel: copied to shared memory (in the order of act-order codes), read as B fragments."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import CHUNK
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.stream_plan import Plan


class Inputs:
    """The block's part of x: emits copies, the permutation, and loads of fragments."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int, bars: Int, thread: Int, rank: Int):
        self.plan, self.pointers, self.bars, self.thread = plan, pointers, bars, thread
        self.lane, self.warp = thread & 31, thread >> 5
        self.x, self.unordered = shared + plan.layout["x"], shared + plan.layout["unordered"]
        self.begin = rank * (plan.block_chunks * CHUNK)  # first input of the block
        end = self.begin + plan.block_chunks * CHUNK
        self.is_last = Int(plan.k) < end + 1
        self.end = ptx.select(self.is_last, plan.k, end)

    def copy(self) -> None:
        """Sends the copies. The rows are shared out over the warps, and each of these has a barrier of its own."""
        plan = self.plan
        width = self.end - self.begin
        rows = -(-plan.m // plan.x_warps)  # of a warp
        bar, row = self.bars + self.warp * 8, self.warp + self.lane * plan.x_warps
        with ptx.when(self.warp < plan.x_warps):
            with ptx.when(self.lane == 0):
                ptx.barrier_init(bar, 1)
                ptx.fence_barrier_init()
                if plan.gathered:
                    ptx.barrier_expect(bar, plan.k * 2 + width * 4)
                    ptx.bulk_copy(self.unordered, self.pointers["x"], plan.k * 2, bar)
                    source = ptx.address(self.pointers["perm"], self.begin, 4)
                    ptx.bulk_copy(self.unordered + plan.k * 2, source, width * 4, bar)
                else:
                    count = (Int(plan.m + plan.x_warps - 1) - self.warp) // plan.x_warps
                    ptx.barrier_expect(bar, count * width * 2)
            ptx.sync_warp()
            if not plan.gathered:
                with ptx.when(ptx.select(self.lane < rows, 1, 0) & ptx.select(row < plan.m, 1, 0) == 1):
                    source = ptx.address(self.pointers["x"], self.begin + row * plan.k, 2)
                    ptx.bulk_copy(self.x + row * plan.x_pitch, source, width * 2, bar)
        ptx.sync_warp()

    def pad(self) -> None:
        """Zeros behind the last input, where K is not a multiple of 64 (the codes there are padding)."""
        plan = self.plan
        if plan.k % CHUNK == 0 or plan.gathered:
            return
        with ptx.when(ptx.select(self.is_last, 1, 0) & ptx.select(self.thread < plan.m, 1, 0) == 1):
            for i in range(0, (plan.k_chunks * CHUNK - plan.k) * 2, 16):
                at = self.x + self.thread * plan.x_pitch + (self.end - self.begin) * 2 + i
                ptx.store_shared(at, [0, 0, 0, 0])

    def wait(self) -> None:
        """All threads: returns when x is there, in the order of the codes."""

        def one(i: Int, carry: list[Any]) -> list[Any]:
            ptx.barrier_wait(self.bars + i * 8, 0)
            return carry

        ptx.loop(0, self.plan.x_warps, 1, [], one)
        ptx.sync_warp()
        if self.plan.gathered:
            self.order()

    def order(self) -> None:
        """All threads: x in the order of the codes, eight inputs at a time; zeros behind the last input."""
        plan = self.plan
        perm = self.unordered + plan.k * 2

        def item(i: Int, carry: list[Any]) -> list[Any]:
            inside = i * 8 < self.end - self.begin
            at = perm + ptx.select(inside, i, 0) * 32
            places = ptx.load_shared(at, "u32", 4) + ptx.load_shared(at + 16, "u32", 4)
            values = [Int(ptx.load_shared(self.unordered + Int(p) * 2, "u16")[0]) for p in places]
            pairs = [ptx.select(inside, values[j] + (values[j + 1] << 16), 0) for j in range(0, 8, 2)]
            ptx.store_shared(self.x + i * 16, pairs)
            return carry

        ptx.loop(self.thread, plan.block_chunks * CHUNK >> 3, plan.config.warps * 32, [], item)
        ptx.sync_warp()
        ptx.sync_block()

    def fragments(self, chunk: Int, column: int) -> list[list[ir.Value]]:
        """B fragments of the four steps of a chunk of the block; rows of x that do not exist repeat the last one."""
        plan = self.plan
        row = (self.lane & 7) + 8 * column
        row = ptx.select(row < plan.m, row, plan.m - 1)
        base = self.x + row * plan.x_pitch + (self.lane >> 3) * 16 + chunk * (CHUNK * 2)
        low, high = ptx.load_matrices(base), ptx.load_matrices(base + 64)
        return [low[:2], low[2:], high[:2], high[2:]]
