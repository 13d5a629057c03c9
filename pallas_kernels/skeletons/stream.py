"""Few rows of x (M <= 16): the weight is streamed once, at the speed of the memory.

Every warp is its own pipeline. It owns a ring of buffers in shared memory, fills it by the copy engine (contiguous
pieces, no tensor map) and feeds `mma.sync` from it, with weights as the A operand decoded in registers and x, resident
in shared memory, as B. No barrier joins the warps of a block while they stream.

A warp takes whole strips of 16 (or 32) rows; what does not divide by the warps is cut along K and goes first, so that
the adding up hides behind the rest. K may be split over the blocks of a cluster as well, which shares out x: many rows
of it are as large as the weight. Then warps of equal number exchange sums through distributed shared memory. All sums
are added in a fixed order: repeated runs give equal bits.

Compared with wgmma fed by one producer (the usual design): no warpgroup waits for another one's bytes, the first copies
leave before anything is set up, and the tail after the last byte is one strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES, affine
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS, Packed
from pallas_kernels.launch import arguments, launch, pointers
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.plan import tile_words
from pallas_kernels.skeletons.stream_inputs import Inputs
from pallas_kernels.skeletons.stream_params import Params
from pallas_kernels.skeletons.stream_plan import BUFFERS, MAX_ROWS, SMEM_BYTES, Config, Plan
from pallas_kernels.skeletons.stream_sums import Sums

__all__ = ["MAX_ROWS", "SMEM_BYTES", "Config", "Plan", "matmul"]


def matmul(x: jax.Array, w: Packed, config: Config, bias: jax.Array | None = None, layer: jax.Array | None = None):
    """y = x @ w.T (+ bias), y and x of one 16-bit dtype.

    Args:
      x: [M, K], bf16 or fp16, M <= 16, K a multiple of 8.
      bias: [N] float32, or None.
      layer: int32[1], index into a stacked weight; required if and only if `w` is stacked.

    Returns:
      [M, N].
    """
    (m, k), (n, _) = x.shape, w.shape
    dtype = {"bfloat16": "bf16", "float16": "f16"}[str(x.dtype)]
    plan = Plan(m, n, k, w.form, config, dtype, w.perm is not None)
    if reason := plan.reason():
        raise ValueError(f"stream.matmul: {reason}")
    arrays = arguments(x, w, bias, layer)

    def emit(_: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        ptx.skip_preamble()
        at = pointers(refs, arrays)
        _Kernel(plan, at, shared).run()

    out = {"y": jax.ShapeDtypeStruct((m, n), x.dtype)}
    size = {"clusters": plan.clusters, "cluster": config.cluster, "warps": config.warps}
    return launch(emit, "stream_matmul", arrays, out, shared_bytes=plan.layout["bytes"], **size)[0]


class _Kernel:
    """Emits the kernel. Methods run while tracing; attributes are values of one thread of the kernel."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int):
        self.plan, self.pointers = plan, pointers
        c, at = plan.config, plan.layout
        self.decode = DECODES[plan.form.decode]
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.rank = ptx.special("cluster_ctarank") if c.cluster > 1 else Int(0)
        self.first_strip = ptx.special("clusterid.x") if c.cluster > 1 else ptx.special("ctaid.x")
        self.ring = shared + at["ring"] + self.warp * (plan.stages * plan.stage_bytes)
        bars = shared + at["barriers"]
        self.bars = bars + self.warp * (plan.stages * 8)
        bars = bars + c.warps * plan.stages * 8
        self.sums = Sums(plan, pointers, shared, bars, self.thread, self.rank)
        bars = bars + 8 * (c.warps * BUFFERS + 1)
        self.inputs = Inputs(plan, pointers, shared, bars, self.thread, self.rank)
        self.params = Params(plan, pointers, shared, self.thread, self.rank)
        self.tables = shared + at["tables"]
        self.policy = ptx.evict_first() if c.hint else None

    def run(self) -> None:
        plan, c = self.plan, self.plan.config
        # a cold load takes a microsecond: ahead of the copies, which would stand in its way
        entries = []
        if plan.table_bytes:
            entries = self.decode.read(plan.form, self.pointers.get("table"), self.thread, c.warps * 32)
        second = self.params.read()
        self.loose, (self.begin, self.end) = self.sums.strips, self.sums.share(self.warp)
        strips = (plan.strips + plan.clusters - 1 - self.first_strip) // plan.clusters
        self.turns = strips // c.warps
        self.units = self.end - self.begin + self.turns * plan.pieces  # copies of this warp
        state = self.start_ring()
        self.sums.initialise()
        if entries:
            self.decode.write(plan.form, plan.dtype, self.tables, entries, plan.wide_table)
        self.params.write(second)
        self.inputs.pad()
        ptx.sync_warp()
        ptx.sync_block()
        if c.cluster > 1:
            ptx.cluster_arrive(relaxed=True)
            ptx.cluster_wait()
        self.inputs.wait()
        self.stream(state)

    def stream(self, state: list[Any]) -> None:
        """The strips of this warp in order: its share of the loose ones, then a whole one in each turn."""
        plan, c = self.plan, self.plan.config
        p = plan.pieces
        some = ptx.select(self.begin < self.end, 1, 0)
        shares = ((self.end - 1) // p - self.begin // p + 1) * some  # at most two loose strips

        def strip(s: Int, state: list[Any]) -> list[Any]:
            is_loose, turn = s < shares, s - shares
            number = ptx.select(is_loose, self.begin // p + s, self.loose + self.warp + turn * c.warps)
            start = ptx.select(s == 0, self.begin % p, 0)
            stop = ptx.select(s == shares - 1, (self.end - 1) % p + 1, p)
            start = ptx.select(is_loose, start, 0)
            stop = ptx.select(is_loose, stop, ptx.select(turn < self.turns, p, 0))
            sums, state = self.strip(number, start, stop, state)
            with ptx.when(is_loose):
                ptx.sync_warp()
                self.sums.send_loose(number, sums)
            ptx.sync_warp()
            if c.cluster > 1:
                with ptx.when(Int(0) < turn):
                    ptx.sync_warp()
                    self.sums.finish(turn - 1, number - c.warps)
                ptx.sync_warp()
            with ptx.when(ptx.select(turn < self.turns, 1, 0) & ptx.select(is_loose, 0, 1) == 1):
                ptx.sync_warp()
                self.sums.send(turn, number, sums)
            ptx.sync_warp()
            with ptx.when(turn == 0):
                ptx.sync_warp()
                self.sums.loose_sent()
                self.sums.finish_loose()
            ptx.sync_warp()
            return state

        # one turn more than there are: the sums of a turn are added up behind the products of the next one
        ptx.loop(0, shares + self.turns + 1, 1, state, strip)

    # ---- copies

    def start_ring(self) -> list[Any]:
        """Initialises the ring's barriers and sends the first copies, and those of x.

        Returns:
          state of the ring: slot, parity, number of the next copy to send, and the second-level scales of the next
          piece, or of its whole strip.
        """
        plan = self.plan
        nested = self.params.nested(*self.locate(Int(ptx.raw(0))))
        with ptx.when(self.lane < plan.stages):
            ptx.barrier_init(self.bars + 8 * self.lane, 1)
            ptx.fence_barrier_init()
        ptx.sync_warp()
        if plan.gathered:  # x is not usable at once
            self.inputs.copy()
        self.fetch(Int(ptx.raw(0)), Int(ptx.raw(0)))
        ptx.sync_warp()
        if not plan.gathered:
            self.inputs.copy()
        ptx.sync_block()  # the rest behind x, which would otherwise be the last to arrive

        def more(i: Int, carry: list[Any]) -> list[Any]:
            self.fetch(i, i)
            ptx.sync_warp()
            return carry

        ptx.loop(1, plan.stages, 1, [], more)
        return [Int(0), Int(0), Int(plan.stages), *nested]

    def locate(self, copy: Int) -> tuple[Int, Int]:
        """Strip of the cluster, and piece of it, of this warp's copy number `copy`."""
        p, shared = self.plan.pieces, self.end - self.begin
        at, whole = self.begin + copy, copy - shared
        is_loose = copy < shared
        strip = ptx.select(is_loose, at // p, self.loose + self.warp + whole // p * self.plan.config.warps)
        return strip, ptx.select(is_loose, at % p, whole % p)

    def row_of(self, strip: Int, i: int) -> Int:
        """Tile i of a strip of the cluster."""
        return (self.first_strip + strip * self.plan.clusters) * self.plan.height + i

    def fetch(self, slot: Int, copy: Int, after: Sequence[ir.Value] = ()) -> None:
        """Sends the copies of one piece (codes, scales, zeros) into a slot of the ring, if there is such a piece.

        Args:
          after: what was loaded from the slot.
        """
        plan, form = self.plan, self.plan.form
        strip, piece = self.locate(copy)
        bar, to = self.bars + slot * 8, self.ring + slot * plan.stage_bytes
        at = self.rank * plan.pieces + piece
        copies = []
        for i in range(plan.height):
            row = self.row_of(strip, i)
            source = ptx.address(
                self.pointers["codes"], row * (plan.pieces * plan.config.cluster) + at, plan.code_bytes
            )
            copies.append((to + i * plan.code_bytes, source, plan.code_bytes, self.policy))
            group = row * form.groups(plan.k) + self.params.group_of(at)
            for name, kind, size, offset in zip(("scales", "zeros"), form.params, plan.param_bytes, plan.param_offsets):
                source = ptx.address(self.pointers[name], group, ROWS * ITEM_BYTES[kind])
                copies.append((to + offset + i * size, source, size, None))
        ptx.bulk_copies(copies, bar, copy < self.units, after)

    # ---- arithmetic

    def strip(self, number: Int, start: Int, stop: Int, state: list[Any]) -> tuple[list, list]:
        """This warp's sums over pieces start..stop of a strip; see `Sums` for their order.

        Args:
          state: of the ring.
        """
        plan = self.plan
        n_sums = 4 * plan.columns * plan.height
        (slot, parity, copy), nested = state[:3], state[3:]
        ahead = nested
        if plan.nested_by_row and not plan.single:
            ahead = self.params.nested(*self.locate(copy - plan.stages + (stop - start)))

        def piece(b: Int, carry: list[Any]) -> list[Any]:
            sums, (slot, parity, copy, *each) = carry[:n_sums], carry[n_sums:]
            ptx.barrier_wait(self.bars + slot * 8, parity)
            ptx.sync_warp()
            at = self.ring + slot * plan.stage_bytes
            following = [] if plan.nested_by_row else self.params.nested(*self.locate(copy - (plan.stages - 1)))
            whole = plan.unroll == plan.chunks

            def release(loaded: Sequence[ir.Value] = ()) -> None:
                ptx.sync_warp()
                self.fetch(slot, copy, loaded)
                ptx.sync_warp()

            def part(i: Int, sums: list[Any]) -> list[Any]:
                c0 = i * plan.unroll
                words, stored = self.load_part(at, c0)
                if whole:
                    params = [
                        value for of_tile in stored for of_group in of_tile for kind in of_group for value in kind
                    ]
                    release([first for of_tile in words for of_chunk in of_tile for first in of_chunk[::4]] + params)
                params = [
                    [self.params.convert(p, each or nested, h, g) for g, p in enumerate(of_tile)]
                    for h, of_tile in enumerate(stored)
                ]
                for c in range(plan.unroll):
                    sums = self.chunk(sums, [w[c] for w in words], params, b * plan.chunks + c0 + c, c)
                return sums

            if whole:
                sums = part(Int(0), sums)
            else:
                sums = ptx.loop(0, plan.chunks // plan.unroll, 1, sums, part)
                release()
            wrap = (slot + 1) == plan.stages
            return [*sums, ptx.select(wrap, 0, slot + 1), parity ^ ptx.select(wrap, 1, 0), copy + 1, *following]

        carried = [slot, parity, copy] if plan.nested_by_row else state
        out = ptx.loop(start, stop, 1, [*(ptx.zero() for _ in range(n_sums)), *carried], piece)
        sums, state = out[:n_sums], out[n_sums:]
        if plan.m == 1:
            sums = [s for i, s in enumerate(sums) if i % 2 == 0]  # column 1 of x does not exist
        return sums, [*state, *ahead] if plan.nested_by_row else state

    def load_part(self, at: Int, first: Int) -> tuple[list[Any], list[Any]]:
        """Codes and stored parameters of `unroll` chunks of a slot, from chunk `first` on; for each tile of the strip."""
        plan, form = self.plan, self.plan.form
        lane = at + self.lane * 16 + first * form.chunk_bytes
        group = Int(0)
        if form.group:
            group = first // (form.group // CHUNK) if form.group > CHUNK else first * (CHUNK // form.group)
        words, params = [], []
        for h in range(plan.height):
            here = lane + h * plan.code_bytes
            words.append([tile_words(form, here + c * form.chunk_bytes) for c in range(plan.unroll)])
            params.append([self.params.load(at, h, group + g) for g in range(plan.part_groups)])
        return words, params

    def chunk(self, sums: list[Any], words: list[Any], params: list[Any], k_chunk: Int, c: int) -> list[Any]:
        """Adds the product of `height` tiles of 16 x 64 with the rows of x; k_chunk counts from the block's first one."""
        plan, form = self.plan, self.plan.form
        x = [self.inputs.fragments(k_chunk, column) for column in range(plan.columns)]
        table = plan.pairs(self.tables, self.lane)
        steps = 4 if not form.group or form.group >= CHUNK else form.group // 16
        none = [ptx.zero()] * 4
        for first in range(0, 4, steps):
            group = min((c * CHUNK + first * 16) // form.group if form.group else 0, plan.part_groups - 1)
            totals = [none] * plan.columns  # sums of x
            for column in range(plan.columns):
                for s in range(steps if "shift" in params[0][group] else 0):
                    totals[column] = ptx.mma(
                        [affine.ones(plan.dtype)] * 4, x[column][first + s], totals[column], plan.dtype
                    )
            for h in range(plan.height):
                p = params[h][group]
                used = words[h][first * form.bits // 4 : (first + steps) * form.bits // 4]
                a = self.decode.fragment(form, plan.dtype, used, p.get("zero"), table)
                for column in range(plan.columns):
                    part = none
                    for s in range(steps):
                        part = ptx.mma(a[4 * s : 4 * s + 4], x[column][first + s], part, plan.dtype)
                    for i in range(0, 4, 2 if plan.m == 1 else 1):  # column 1 of one row of x does not exist
                        at_sum = 4 * (h * plan.columns + column) + i
                        sums[at_sum] = ptx.fma(p["scale"][i // 2], part[i], sums[at_sum])
                        if "shift" in p:
                            sums[at_sum] = ptx.fma(p["shift"][i // 2], totals[column][i], sums[at_sum])
        return sums
