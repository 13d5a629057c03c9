"""From the accumulators of a warpgroup to y: sums over blocks, bias, transposition, store."""

from __future__ import annotations

import functools
from typing import Any

from pallas_kernels import hopper, ptx
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_block import Block


class Output(Block):
    """Epilogues."""

    def epilogue(self, n0: Int, row0: Int, sums: list[Any], target: str) -> None:
        """Writes y of one unit, rows of x from row0 on: through shared memory, in pieces."""
        plan = self.plan
        if "bias" in self.refs:
            sums = self.add_bias(n0, sums)
        rows = 2 * len(sums)
        piece, size = plan.piece(rows), plan.epilogue_rows * 128
        buffers = self.at["y"] + self.unit * (2 * size)
        for i in range(rows // piece):
            buffer = buffers + (i % 2) * size
            with ptx.when(self.t == 0):
                hopper.tensor_store_wait(1 if i else 0)
            ptx.sync_warp()
            hopper.sync_threads(self.wg + 1, 128)
            self.transpose(buffer, sums[i * piece // 2 : (i + 1) * piece // 2])
            ptx.fence_async()
            hopper.sync_threads(self.wg + 1, 128)
            with ptx.when(self.t == 0):
                hopper.tensor_store(self.maps[target], [n0, row0 + i * piece], buffer)
            ptx.sync_warp()

    def transpose(self, buffer: Int, sums: list[Any]) -> None:
        """Accumulators (rows of the weight x rows of x) to [rows of x][64] in shared memory, 128-byte swizzle."""
        plan = self.plan
        matrix, r = self.lane >> 3, self.lane & 7
        chunk = (self.warp & 3) * 2 + (matrix & 1)  # 16-byte column of y: 8 rows of the weight
        for j in range(0, len(sums), 8):  # 16 rows of x, or the last 8
            row = (matrix >> 1) * 8 + r + (j // 8) * 16
            at = buffer + row * 128 + ((chunk ^ r) << 4)
            pairs = [ptx.pack_pair(a, b, plan.dtype) for a, b in zip(sums[j : j + 8 : 2], sums[j + 1 : j + 8 : 2])]
            # registers: rows g, rows g + 8 of the first 8 columns, then of the next 8
            hopper.store_matrices_transposed(at, pairs)

    def add_bias(self, n0: Int, sums: list[Any]) -> list[Any]:
        plan = self.plan
        row = n0 + (self.warp & 3) * 16 + (self.lane >> 2)
        last = plan.n - 1
        pointer = ptx.global_pointer(self.refs["bias"])
        bias = [
            ptx.load_global(ptx.address(pointer, ptx.select(row + h < last, row + h, last), 4), "f32") for h in (0, 8)
        ]
        return [ptx.add(s, bias[i // 2 % 2]) for i, s in enumerate(sums)]

    def finish(self, t: Int, n0: Int, row0: Int, sums: list[Any]) -> None:
        """From a warpgroup's sums in pass t to y: first those of the warpgroups that share its rows, then those of the
        other blocks, always in the same order.

        Args:
          row0: first row of x that the block writes.
        """
        plan, c = self.plan, self.plan.config
        if plan.depth == 1:
            self.epilogue(n0, row0, self.exchange(t, sums) if c.split > 1 else sums, "y")
            return
        threads, size = 128 * plan.depth, len(sums) * 512
        filled, emptied = self.unit + (c.wn + 1), self.unit + (c.wn + 1 + plan.block_units)  # named barriers
        at = self.at["local"] + self.unit * ((plan.depth - 1) * size) + self.t * 16
        with ptx.when(Int(0) < self.turn):
            ptx.sync_warp()
            with ptx.when(Int(0) < t):
                ptx.sync_warp()
                hopper.sync_threads(emptied, threads)
            ptx.sync_warp()
            for v in range(0, len(sums), 4):
                ptx.store_shared(at + (self.turn - 1) * size + v * 512, sums[v : v + 4])
            ptx.sync_warp()
            hopper.arrive_threads(filled, threads)
        ptx.sync_warp()
        with ptx.when(self.turn == 0):
            ptx.sync_warp()
            hopper.sync_threads(filled, threads)
            for d in range(plan.depth - 1):
                others = (ptx.load_shared(at + d * size + v * 512, "f32", 4) for v in range(0, len(sums), 4))
                sums = [ptx.add(s, other) for s, other in zip(sums, ptx.chain(*others))]
            with ptx.when(t + 1 < self.work.passes):
                ptx.sync_warp()
                hopper.arrive_threads(emptied, threads)
            ptx.sync_warp()
            self.epilogue(n0, row0, self.exchange(t, sums) if c.split > 1 else sums, "y")
            ptx.sync_warp()
        ptx.sync_warp()

    def exchange(self, t: Int, sums: list[Any]) -> list[Any]:
        """Sums of this block's columns over all blocks of the split, added in the order of their ranks."""
        plan, c = self.plan, self.plan.config
        share = len(sums) // c.split
        vectors = share // 4
        inbox_wg = vectors * 128 * 16
        inbox = plan.block_units * inbox_wg
        with ptx.when(self.thread == 0):
            ptx.barrier_expect(self.arrived, plan.inbox_bytes)

        @functools.partial(_when_positive, t)
        def _() -> None:
            ptx.barrier_wait(self.freed, (t + 1) & 1)

        own: list[Any] = [ptx.zero()] * share
        for r in range(c.split):
            mine = self.part == r
            own = [ptx.select_float(mine, s, o) for s, o in zip(sums[r * share : (r + 1) * share], own)]
            # my place in the inbox of r: ranks below r keep their number, ranks above it move down by one
            place = ptx.select(self.part < r, self.part, self.part - 1)
            at = self.at["inbox"] + place * inbox + self.unit * inbox_wg + self.t * 16
            with ptx.when(ptx.select(mine, 0, 1) == 1):
                rank = self.mate + r * c.share
                target, bar = ptx.remote(at, rank), ptx.remote(self.arrived, rank)
                for v in range(vectors):
                    ptx.store_remote(target + v * 2048, sums[r * share + 4 * v : r * share + 4 * v + 4], bar)
        ptx.barrier_wait(self.arrived, t & 1, "cluster")
        totals: list[Any] = [ptx.zero()] * share
        received = [
            ptx.chain(
                *(
                    ptx.load_shared(
                        self.at["inbox"] + p * inbox + self.unit * inbox_wg + self.t * 16 + v * 2048, "f32", 4
                    )
                    for v in range(vectors)
                )
            )
            for p in range(c.split - 1)
        ]
        for r in range(c.split):
            below = received[min(r, c.split - 2)]
            above = received[max(r - 1, 0)]
            for i in range(share):
                other = (
                    ptx.select_float(self.part < r, above[i], below[i])
                    if 0 < r < c.split - 1
                    else (above[i] if r else below[i])
                )
                totals[i] = ptx.add(totals[i], ptx.select_float(self.part == r, own[i], other))
        # not behind the last pass: the other block may have left
        more = ptx.select(t + 1 < self.work.passes, 1, 0)
        with ptx.when(more & ptx.select(self.t < c.split, 1, 0) & ptx.select(self.t == self.part, 0, 1) == 1):
            hopper.arrive_remote(self.freed, self.mate + self.t * c.share)
        return totals

    def swap(self, sums: list[Any]) -> list[Any]:
        """Half of the columns of the unit that both blocks of a pair have summed a part of, summed."""
        count = len(sums) // 2
        # all warpgroups of both blocks are behind their last step: the ring is free to be the inbox
        ptx.cluster_arrive(relaxed=True)
        ptx.cluster_wait()
        with ptx.when(self.t == 0):
            ptx.barrier_expect(self.arrived, count * 128 * 4)
        ptx.sync_warp()
        first = self.rank == 0
        own = [ptx.select_float(first, a, b) for a, b in zip(sums[:count], sums[count:])]
        other = [ptx.select_float(first, b, a) for a, b in zip(sums[:count], sums[count:])]
        at, mate = self.at["inbox"] + self.t * 16, 1 - self.rank
        target, bar = ptx.remote(at, mate), ptx.remote(self.arrived, mate)
        for v in range(0, count, 4):
            ptx.store_remote(target + v * 512, other[v : v + 4], bar)
        ptx.barrier_wait(self.arrived, 0, "cluster")
        received = ptx.chain(*(ptx.load_shared(at + v * 512, "f32", 4) for v in range(0, count, 4)))
        return [ptx.add(a, b) for a, b in zip(own, received)]


def _when_positive(t: Int, function: Any) -> None:
    with ptx.when(Int(0) < t):
        function()
