"""Many rows of x, or some and a narrow weight: persistent, warp-specialised, wgmma with the weight as A operand from
registers.

One warp fetches (TMA), `wn` warpgroups compute. Each owns a unit of 64 rows of the weight (or several units, or shares
one with others, taking turns along K): it reads packed codes from shared memory, turns them into scaled 16-bit floats in
registers, and multiplies with the tile of x in shared memory. Decode of one k16 step runs while the wgmma of the one
before it does. The accumulator is y^T; the epilogue transposes it on the way through shared memory.

A cluster is used in one of three ways: `share` blocks take neighbouring rows of the weight and one copy of x serves all
of them (multicast); `split` blocks share the K of a tile, and each adds up its part of the columns from what the others
send (distributed shared memory, in a fixed order); or, with `even`, two blocks get an even share of the rows, down to
half a unit of 64 (see `gemm_work.Pairs`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode import affine
from pallas_kernels.form import CHUNK, ROWS, Packed
from pallas_kernels.launch import arguments, launch
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_output import Output
from pallas_kernels.skeletons.gemm_plan import CONSUMER_REGISTERS, PRODUCER_REGISTERS, UNIT, Config, Plan
from pallas_kernels.skeletons.gemm_work import Pairs

__all__ = ["Config", "Plan", "matmul"]


def matmul(x: jax.Array, w: Packed, config: Config, bias: jax.Array | None = None, layer: jax.Array | None = None):
    """y = x @ w.T (+ bias); arguments and result as `stream.matmul`, any M."""
    (m, k), (n, _) = x.shape, w.shape
    dtype = {"bfloat16": "bf16", "float16": "f16"}[str(x.dtype)]
    plan = Plan(m, n, k, w.form, config, dtype)
    if reason := plan.reason():
        raise ValueError(f"gemm.matmul: {reason}")
    if w.perm is not None:
        raise ValueError("gemm.matmul: x must be in the order of the codes already")
    arrays = arguments(x, w, bias, layer)

    def emit(ctx: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        ptx.skip_preamble()
        _Kernel(plan, ctx, refs, arrays, shared).run()

    out = {"y": jax.ShapeDtypeStruct((m, n), x.dtype)}
    size = {"clusters": plan.clusters, "cluster": plan.cluster, "warps": 4 * (config.wn + 1)}
    return launch(emit, "gemm_matmul", arrays, out, shared_bytes=plan.layout["bytes"], **size)[0]


class _Kernel(Output):
    """Emits the kernel."""

    def run(self) -> None:
        plan, c = self.plan, self.plan.config
        early = c.share == 1  # no copy reaches into a block that does not run yet
        consumers, everyone = 128 * c.wn, 128 * (c.wn + 1)
        with ptx.when(self.thread == consumers):  # the thread that fetches: it need not wait for another one
            for i in range(plan.stages):
                ptx.barrier_init(self.full + 8 * i, 1)
                ptx.barrier_init(self.empty + 8 * i, c.wn // plan.depth * c.share)
            ptx.barrier_init(self.arrived, 1)
            ptx.barrier_init(self.swapped, 1)
            ptx.barrier_init(self.freed, plan.block_units * max(1, c.split - 1))
            ptx.fence_barrier_init()
            ptx.store_shared(self.at["magic"], [Int(affine.MAGIC * 0x10001)])
        ptx.sync_warp()
        if plan.cluster > 1:
            ptx.cluster_arrive(relaxed=True)
        with ptx.when(self.wg == c.wn):
            ptx.sync_warp()
            hopper.arrive_threads(0, everyone)
            hopper.set_registers(PRODUCER_REGISTERS, "dec")
            if plan.cluster > 1 and not early:
                ptx.cluster_wait()
            with ptx.when(self.t == 0):
                self.produce()
            ptx.sync_warp()
            if plan.cluster > 1 and early:
                ptx.cluster_wait()
        ptx.sync_warp()
        with ptx.when(self.wg < c.wn):
            ptx.sync_warp()
            hopper.set_registers(CONSUMER_REGISTERS[c.wn], "inc")
            if self.searched:
                self.prefetch_scales()
            entries = self.nested.read() if self.nested else []
            if self.pairs:
                own = self.decode.read(plan.form, self.tables.get("table"), self.thread, consumers)
                self.decode.write(plan.form, plan.dtype, self.at["tables"], own, plan.wide_table)
                ptx.sync_warp()
            if self.nested:
                self.nested.write(entries)
                ptx.sync_warp()
            hopper.sync_threads(0, everyone)
            if plan.cluster > 1:
                ptx.cluster_wait()
            self.consume()
        ptx.sync_warp()
        if c.share > 1:  # others still release slots here; sums that they send have all been waited for
            ptx.cluster_arrive(relaxed=True)
            ptx.cluster_wait()

    # ---- one thread: copies

    def produce(self) -> None:
        plan, c, work = self.plan, self.plan.config, self.work
        part = c.tile_m // c.share
        policy = ptx.evict_first() if plan.m_tiles == 1 else None
        unit_bytes = plan.unit_bytes + sum(plan.unit_params)

        def one_pass(t: Int, carry: list[Int]) -> list[Int]:
            im, first = work.tile(t)
            shares = [work.share(t, first, i) for i in range(plan.boxes)]

            def weight(slot: Int, kk: Int, i: int, bar: Int) -> None:
                row = shares[i].unit * (UNIT // ROWS)
                codes = self.at["codes"] + slot * plan.code_bytes + i * plan.unit_bytes
                hopper.tensor_copy(codes, self.maps["codes"], [0, kk * c.chunks, row, *self.layer], bar, policy=policy)
                group = self.group_of(kk) * ROWS
                for name, nbytes, pitch in zip(("scales", "zeros"), plan.param_bytes, plan.param_pitch):
                    target = self.at[name] + slot * nbytes + i * pitch
                    hopper.tensor_copy(target, self.maps[name], [group, row, *self.layer], bar)

            def note(slot: Int, kk: Int) -> None:
                if plan.place_bytes:
                    ptx.store_shared(self.at["places"] + slot * 4, [self.group_of(kk)])

            def step(kk: Int, carry: list[Int], halves: int = 2) -> list[Int]:
                slot, parity = carry
                ptx.barrier_wait(self.empty + slot * 8, parity ^ 1)
                bar = self.full + slot * 8
                if isinstance(work, Pairs):
                    busy = [ptx.select(kk < s.end, 1, 0) for s in shares]
                    kk = work.place(t, kk)
                    note(slot, kk)
                    ptx.barrier_expect(bar, functools.reduce(lambda a, b: a + b, busy) * unit_bytes + plan.x_fetched)
                    for i, on in enumerate(busy):
                        with ptx.when(on == 1):
                            weight(slot, kk, i, bar)
                else:
                    note(slot, kk)
                    ptx.barrier_expect(bar, plan.x_fetched * halves // 2 + plan.block_units * unit_bytes)
                    weight(slot, kk, 0, bar)
                x = self.at["x"] + slot * plan.x_bytes
                for i in range(c.chunks):
                    target, k = x + i * (c.tile_m * CHUNK * 2), kk * plan.span + i * CHUNK
                    if c.share > 1:
                        target, row = target + self.mate * (part * 128), im * c.tile_m + self.mate * part
                        mates = Int((1 << c.share) - 1) << (self.rank - self.mate)
                        hopper.tensor_copy(target, self.maps["x"], [k, row], bar, mates)
                    elif c.tail:  # the rows that this block writes come first
                        for half in range(halves):
                            row = im * c.tile_m + (self.part ^ half) * plan.own_rows
                            hopper.tensor_copy(target + half * (plan.own_rows * 128), self.maps["x"], [k, row], bar)
                    else:
                        hopper.tensor_copy(target, self.maps["x"], [k, im * c.tile_m], bar)
                return list(self.after(slot, parity))

            carry = ptx.loop(work.begin, work.end, 1, carry, step)
            if c.tail:
                own = functools.partial(step, halves=1)
                begin, end = work.tail
                carry = ptx.loop(begin, end, 1, carry, own)
            return carry

        ptx.loop(0, work.passes, 1, [Int(0), Int(0)], one_pass)

    def group_of(self, step: Int) -> Int:
        group, span = self.plan.form.group, self.plan.span
        if not group:
            return Int(0)
        return step * (span // group) if group <= span else step // (group // span)

    # ---- warpgroups: arithmetic

    def consume(self) -> None:
        plan, c, work = self.plan, self.plan.config, self.work

        def one_pass(t: Int, carry: list[Int]) -> list[Int]:
            im, first = work.tile(t)
            mine = work.share(t, first, self.unit)
            row, n0 = im * c.tile_m, mine.unit * UNIT
            if not isinstance(work, Pairs):
                steps = Int(plan.steps - plan.common) if c.tail else mine.end - mine.begin
                self.tile(t, n0, row + self.part * plan.own_rows, steps)
                return carry
            step = t * plan.steps  # every pass runs over all steps
            slot, parity = step % plan.stages, step // plan.stages & 1
            with ptx.when(mine.end == 0):
                self.skip(slot, parity, Int(plan.steps))
            ptx.sync_warp()
            with ptx.when(Int(0) < mine.end):
                sums, at = self.multiply(slot, parity, mine.end, self.scaling(n0))
                with ptx.when(mine.end == plan.steps):
                    with ptx.when(work.odd == 1):
                        ptx.barrier_wait(self.swapped, 0)
                    ptx.sync_warp()
                    self.epilogue(n0, row, sums, "y")
                ptx.sync_warp()
                with ptx.when(mine.end < plan.steps):
                    half, (slot, parity), passed = self.swap(sums, *at)
                    self.epilogue(n0, row + self.rank * (c.tile_m // 2), half, "y half")
                    self.skip(slot, parity, plan.steps - mine.end - passed)
                ptx.sync_warp()
            ptx.sync_warp()
            return carry

        ptx.loop(0, work.passes, 1, [], one_pass)
        with ptx.when(self.t == 0):
            hopper.tensor_store_wait(0)
        ptx.sync_warp()

    def tile(self, t: Int, n0: Int, row0: Int, steps: Int) -> None:
        """A warpgroup's part of pass t, in which the block runs over `steps` steps.

        Args:
          n0: first row of the weight.
          row0: first row of x that the block writes.
        """
        plan, c = self.plan, self.plan.config
        begin = (self.turn + (plan.depth - t * steps % plan.depth)) % plan.depth  # the slots of this warpgroup's turn
        step = t * steps + begin
        slot, parity = step % plan.stages, step // plan.stages & 1
        own = (steps - begin + (plan.depth - 1)) // plan.depth
        if c.tail:
            scaling = self.scaling(n0)
            sums, at = self.accumulate(slot, parity, Int(plan.common), scaling)
            self.announce(t)
            totals = self.receive(t, self.last_steps(sums, *at, scaling[0]))
            self.epilogue(n0, row0, self.whole(totals, scaling), "y")
            self.free(t)
            return
        low = plan.block_units % c.wn  # warpgroups with a unit more than the others
        for i, height in enumerate(plan.heights):
            mine = ptx.when(ptx.select(self.wg < low, 1 - i, i) == 1) if plan.heights[1:] else contextlib.nullcontext()
            with mine:
                ptx.sync_warp()
                sums, _ = self.multiply(slot, parity, own, self.scaling(n0, height), plan.sums * height)
                for u in range(height):
                    self.finish(t, n0 + u * (c.wn * UNIT), row0, sums[u * plan.sums : (u + 1) * plan.sums])
            ptx.sync_warp()
