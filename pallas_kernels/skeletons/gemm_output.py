"""From the accumulators of a warpgroup to y: sums over blocks, bias, transposition, store."""

from __future__ import annotations

import functools
from typing import Any

from pallas_kernels import hopper, ptx
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_sums import Sums


class Output(Sums):
    """Epilogues, and the steps during which sums travel."""

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
            self.total(t, n0, row0, sums)
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
            self.total(t, n0, row0, sums)
            ptx.sync_warp()
        ptx.sync_warp()

    def total(self, t: Int, n0: Int, row0: Int, sums: list[Any]) -> None:
        """From a block's sums to y."""
        if self.plan.config.split == 1:
            self.epilogue(n0, row0, sums, "y")
            return
        self.epilogue(n0, row0, self.exchange(t, sums), "y")
        self.free(t)

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
                self.post(at, sums[r * share : (r + 1) * share], self.mate + r * c.share)
        ptx.barrier_wait(self.arrived, t & 1, "cluster")
        totals: list[Any] = [ptx.zero()] * share
        place = self.at["inbox"] + self.unit * inbox_wg + self.t * 16
        received = [self.posted(place + p * inbox, share) for p in range(c.split - 1)]
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
        return totals

    def swap(self, sums: list[Any], slot: Int, parity: Int) -> tuple[list[Any], tuple[Int, Int], int]:
        """Half of the columns of the unit that both blocks of a pair have summed a part of, summed.

        The other warpgroups go on: this one lets their steps pass meanwhile, and sends a little in each of them, as in
        `last_steps`.

        Returns:
          The sums, the slot of the next step, and how many steps have passed.
        """
        plan, count = self.plan, len(sums) // 2
        with ptx.when(self.t == 0):
            ptx.barrier_expect(self.arrived, count * 128 * 4)
        ptx.sync_warp()
        first = self.rank == 0
        own = [ptx.select_float(first, a, b) for a, b in zip(sums[:count], sums[count:])]
        other = [ptx.select_float(first, b, a) for a, b in zip(sums[:count], sums[count:])]
        left = plan.steps // 2
        sending = max(1, min(count // 4, left // 2))
        waiting = (left - sending) // 2  # until those of the other block are likely to be here
        inbox = self.at["inbox"] + self.t * 16
        for i in range(sending):
            slot, parity = self.skip(slot, parity, Int(1))
            self.post_part(inbox, other, i, sending)
        slot, parity = self.skip(slot, parity, Int(waiting))
        ptx.barrier_wait(self.arrived, 0, "cluster")
        ptx.sync_warp()
        half = [ptx.add(a, b) for a, b in zip(own, self.posted(inbox, count))]
        hopper.sync_threads(self.wg + 1, 128)
        with ptx.when(self.t == 0):
            ptx.barrier_arrive(self.swapped)
        ptx.sync_warp()
        return half, (slot, parity), sending + waiting

    def post(self, at: Int, sums: list[Any], rank: Int) -> None:
        """Sums of a thread to its place `at` in the inbox of another block."""
        target, bar = ptx.remote(at, rank), ptx.remote(self.arrived, rank)
        for v in range(0, len(sums), 4):
            ptx.store_remote(target + v * 512, sums[v : v + 4], bar)

    def post_part(self, at: Int, sums: list[Any], part: int, parts: int) -> None:
        """One of several parts, as even as can be, of what `post` sends to the other block of a pair."""
        begin, end = (len(sums) // 4 * i // parts * 4 for i in (part, part + 1))
        self.post(at + begin * 512, sums[begin:end], 1 - self.rank)

    def posted(self, at: Int, count: int) -> list[Any]:
        return ptx.chain(*(ptx.load_shared(at + v * 512, "f32", 4) for v in range(0, count, 4)))

    def announce(self, t: Int) -> None:
        """Makes the inbox ready for the sums of pass t, and waits until that of the other block of the pair is."""
        with ptx.when(self.thread == 0):
            ptx.barrier_expect(self.arrived, self.plan.inbox_bytes)
        ptx.sync_warp()
        _when_positive(t, lambda: ptx.barrier_wait(self.freed, (t + 1) & 1))
        ptx.sync_warp()

    def last_steps(self, sums: list[Any], slot: Int, parity: Int, scaling: Any) -> list[Any]:
        """The tail: steps for the columns that this block writes, while its sums of the others travel.

        A few of them leave in each step, behind the reads of the next step's codes: stores to another block leave at 17
        bytes a cycle, and what stands behind them in the queue waits for them.
        """
        plan, count = self.plan, len(sums) // 2
        own, others = sums[:count], sums[count:]
        at = self.at["inbox"] + self.unit * (count * 512) + self.t * 16
        steps = plan.steps - 2 * plan.common
        sending = max(1, steps - 1)
        ready = self.fetch(slot, parity, scaling)
        for i in range(steps):
            own, _ = self.step(own, ready, slot, scaling=scaling)
            following = self.after(slot, parity)
            if i + 1 < steps:
                ready = self.fetch(*following, scaling)
            if i < sending:
                self.post_part(at, others, i, sending)
            if i + 1 < steps and not self.plan.looked_up:
                ready["a"] = self.first_fragment(ready, scaling)
            hopper.wgmma_wait(0)
            self.release(slot)
            ptx.sync_warp()
            slot, parity = following
        return own

    def receive(self, t: Int, own: list[Any]) -> list[Any]:
        """Own sums plus those that the other block of the pair has sent."""
        ptx.barrier_wait(self.arrived, t & 1, "cluster")
        ptx.sync_warp()
        received = self.posted(self.at["inbox"] + self.unit * (len(own) * 512) + self.t * 16, len(own))
        return [ptx.add(a, b) for a, b in zip(own, received)]

    def free(self, t: Int) -> None:
        """Lets the other blocks of the split send again what `exchange` or `receive` has read in pass t.

        Behind the epilogue, whose barriers order every thread's reads before the one arrival for all of them.
        """
        # not behind the last pass: the other block may have left
        more = ptx.select(t + 1 < self.work.passes, 1, 0)
        other = ptx.select(self.t < self.plan.config.split, 1, 0) & ptx.select(self.t == self.part, 0, 1)
        with ptx.when(more & other == 1):
            hopper.arrive_remote(self.freed, self.mate + self.t * self.plan.config.share)
        ptx.sync_warp()


def _when_positive(t: Int, function: Any) -> None:
    with ptx.when(Int(0) < t):
        function()
