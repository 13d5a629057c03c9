"""Few rows of x (M <= 16): the weight is streamed once, at the speed of the memory.

Every warp is its own pipeline. It owns a ring of buffers in shared memory, fills it by the copy engine (contiguous
pieces, no tensor map) and feeds `mma.sync` from it, with weights as the A operand decoded in registers and x, resident
in shared memory, as B. No barrier joins the warps while they stream. K is split over the warps of a cluster; a warp
sends the partial sums of each tile of 16 rows to the block that owns it (distributed shared memory), which adds them
in a fixed order, so that repeated runs give equal bits.

Compared with wgmma fed by one producer (the usual design): no warpgroup waits for another one's bytes, the first copies
leave before anything is set up, and the tail after the last byte is one tile.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401  (registers the lowering)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES, affine
from pallas_kernels.decode.scaled import as_floats, shifts
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS, Packed
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.stream_plan import BUFFERS, MAX_ROWS, SMEM_BYTES, Config, Plan

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
    names, arrays = [], []
    optional = {"x": x, "codes": w.codes, "scales": w.scales, "zeros": w.zeros, "perm": w.perm, "bias": bias}
    for name, array in (*optional.items(), *w.tables.items(), ("layer", layer)):
        if array is not None:
            names.append(name)
            arrays.append(array.reshape(1) if array.ndim == 0 else array)
    stacked = {name for name in names if layer is not None and name not in ("x", "bias", "layer")}
    strides = {
        name: math.prod(a.shape[1:]) * a.dtype.itemsize
        for name, a in zip(names, arrays, strict=True)
        if name in stacked
    }

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def kernel(ctx: Any, *refs: ir.Value) -> None:
            del ctx
            pointers = {name: ptx.global_pointer(r) for name, r in zip([*names, "y"], refs[:-1], strict=True)}
            if layer is not None:
                index = Int(ptx.load_global(pointers["layer"], "u32"))
                for name, stride in strides.items():
                    wide = ptx.asm([ptx.i64()], "cvt.u64.u32 $0, $1;", index, pure=True)[0]
                    pointers[name] = ptx.asm(
                        [ptx.i64()], f"mad.lo.u64 $0, $1, {stride}, $2;", wide, pointers[name], pure=True
                    )[0]
            _Kernel(plan, pointers, ptx.shared_pointer(refs[-1])).run()

        kernel(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("rank",),
        num_threads=config.warps // 4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[plgpu.SMEM((plan.layout["bytes"] // 4,), jnp.int32)],
    )(*arrays)


class _Kernel:
    """Emits the kernel. Methods run while tracing; attributes are values of one thread of the kernel."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int):
        self.plan, self.pointers = plan, pointers
        c = plan.config
        self.decode = DECODES[plan.form.kind]
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.leader = self.lane == 0
        self.rank = ptx.special("cluster_ctarank") if c.cluster > 1 else Int(0)
        self.first_tile = ptx.special("clusterid.x") if c.cluster > 1 else ptx.special("ctaid.x")
        self.my_tiles = (plan.tiles + plan.clusters - 1 - self.first_tile) // plan.clusters
        self.part = self.rank * c.warps + self.warp
        self.begin = self.part * plan.pieces // plan.parts  # first piece of this warp along K
        self.count = (self.part + 1) * plan.pieces // plan.parts - self.begin
        at = plan.layout
        self.ring = shared + at["ring"] + self.warp * (plan.stages * plan.stage_bytes)
        self.bars = shared + at["barriers"] + self.warp * (plan.stages * 8)
        self.x_bar = shared + at["barriers"] + c.warps * plan.stages * 8
        self.sum_bars = self.x_bar + 8
        self.x, self.tables, self.table2 = shared + at["x"], shared + at["tables"], shared + at["table2"]
        self.partials, self.unordered = shared + at["partials"], shared + at["unordered"]
        self.policy = ptx.evict_first() if c.hint else None
        self.block_begin = self.rank * c.warps * plan.pieces // plan.parts  # first piece of this block
        self.block_end = (self.rank + 1) * c.warps * plan.pieces // plan.parts

    def run(self) -> None:
        plan, cluster = self.plan, self.plan.config.cluster
        warps = plan.config.warps
        with ptx.when(self.thread == 0):
            ptx.barrier_init(self.x_bar, 1)
            for i in range(BUFFERS):
                ptx.barrier_init(self.sum_bars + 8 * i, 1 if cluster > 1 else warps)
            ptx.fence_barrier_init()
        if plan.gathered:
            self.copy_unordered_x()
        else:
            self.copy_x()
        state = self.start_ring()
        self.decode.fill(plan.form, plan.dtype, self.tables, self.pointers.get("table"), self.thread, warps * 32)
        if plan.form.scale == "u8":
            self.fill_table2()
        if plan.k % CHUNK and not plan.gathered:
            self.pad_x()
        ptx.sync_block()
        if cluster > 1:
            ptx.cluster_arrive(relaxed=True)
            ptx.cluster_wait()
        ptx.barrier_wait(self.x_bar, 0)
        if plan.gathered:
            self.order_x()
            ptx.sync_warp()
            ptx.sync_block()

        size = plan.owned * cluster  # tiles of a batch
        batches = (self.my_tiles + (size - 1)) // size

        def batch(b: Int, state: list[Any]) -> list[Any]:
            first = b * size
            last = ptx.select(first + size < self.my_tiles, first + size, self.my_tiles)
            if cluster > 1:
                with ptx.when(ptx.select(self.thread == 0, 1, 0) & ptx.select(b < batches, 1, 0) == 1):
                    nbytes = self.owned_of(first) * (plan.parts * plan.partial_bytes)
                    ptx.barrier_expect(self.sum_bars + (b & (BUFFERS - 1)) * 8, nbytes)

            def tile(t: Int, carry: list[Any]) -> list[Any]:
                sums, carry = self.tile(t, carry)
                self.send(b, t - first, sums)
                return carry

            state = ptx.loop(first, last, 1, state, tile)
            if cluster == 1:
                ptx.sync_warp()
                with ptx.when(ptx.select(self.leader, 1, 0) & ptx.select(b < batches, 1, 0) == 1):
                    ptx.barrier_arrive(self.sum_bars + (b & (BUFFERS - 1)) * 8)
            with ptx.when(Int(0) < b):
                self.finish(b - 1)
            return state

        # one turn more than there are batches: sums of a batch are added while the next one streams
        ptx.loop(0, batches + 1, 1, state, batch)

    def owned_of(self, first: Int) -> Int:
        """Tiles of the batch that begins at `first` (a multiple of the cluster) that this block adds up."""
        plan, cluster = self.plan, self.plan.config.cluster
        size = plan.owned * cluster
        count = ptx.select(first + size < self.my_tiles, size, self.my_tiles - first)
        return (count + (cluster - 1) - self.rank) // cluster if cluster > 1 else count

    # ---- copies

    def start_ring(self) -> list[Int]:
        """Initialises the ring's barriers and sends the first copies, one lane a slot.

        Returns:
          state of the ring: slot, parity, and the tile and piece to fetch next.
        """
        plan = self.plan
        count = ptx.select(self.count == 0, 1, self.count)
        tile, piece = self.lane // count, self.lane % count
        with ptx.when(self.lane < plan.stages):
            ptx.barrier_init(self.bars + 8 * self.lane, 1)
            ptx.fence_barrier_init()
            self.fetch(self.lane, tile, piece, True)
        ptx.sync_warp()
        return [Int(0), Int(0), Int(plan.stages) // count, Int(plan.stages) % count]

    def advance(self, tile: Int, piece: Int) -> tuple[Int, Int]:
        last = (piece + 1) == self.count
        return tile + ptx.select(last, 1, 0), ptx.select(last, 0, piece + 1)

    def fetch(self, slot: Int, tile: Int, piece: Int, every_lane: bool = False) -> None:
        """Sends the copies of one piece (codes, scales, zeros) into a slot of the ring, if the tile exists."""
        plan, form = self.plan, self.plan.form
        exists = ptx.select(tile < self.my_tiles, 1, 0) & ptx.select(self.count == 0, 0, 1)
        if not every_lane:
            exists = exists & ptx.select(self.leader, 1, 0)
        with ptx.when(exists == 1):
            bar, to = self.bars + slot * 8, self.ring + slot * plan.stage_bytes
            row = self.first_tile + tile * plan.clusters
            at = self.begin + piece
            sizes = [plan.piece_groups * ROWS * ITEM_BYTES[p] for p in form.params]
            ptx.barrier_expect(bar, plan.code_bytes + sum(sizes))
            source = ptx.address(self.pointers["codes"], row * plan.pieces + at, plan.code_bytes)
            ptx.bulk_copy(to, source, plan.code_bytes, bar, self.policy)
            group = row * form.groups(plan.k) + self.group_of(at)
            for name, kind, size, offset in zip(("scales", "zeros"), form.params, sizes, plan.param_offsets):
                source = ptx.address(self.pointers[name], group, ROWS * ITEM_BYTES[kind])
                ptx.bulk_copy(to + offset, source, size, bar)

    def group_of(self, piece: Int) -> Int:
        """First group of a piece."""
        plan, form = self.plan, self.plan.form
        if not form.group:
            return Int(0)
        span = plan.chunks * CHUNK
        return piece * (span // form.group) if span >= form.group else piece // (form.group // span)

    def copy_x(self) -> None:
        """The block's part of every row of x, one lane of the first warp a row."""
        plan = self.plan
        begin, end = self.x_range()
        nbytes = (end - begin) * 2
        with ptx.when(self.warp == 0):
            with ptx.when(self.leader):
                ptx.barrier_expect(self.x_bar, nbytes * plan.m)
            ptx.sync_warp()
            with ptx.when(ptx.select(self.lane < plan.m, 1, 0) & ptx.select(nbytes == 0, 0, 1) == 1):
                source = ptx.address(self.pointers["x"], begin + self.lane * plan.k, 2)
                ptx.bulk_copy(self.x + self.lane * plan.x_pitch, source, nbytes, self.x_bar)

    def pad_x(self) -> None:
        """Zeros behind the last input, where K is not a multiple of 64 (the codes there are padding)."""
        plan = self.plan
        pad = plan.k_chunks * CHUNK - plan.k  # a multiple of 8
        at = (Int(plan.k) - self.block_begin * (plan.chunks * CHUNK)) * 2
        is_last = self.block_end == plan.pieces
        with ptx.when(ptx.select(is_last, 1, 0) & ptx.select(self.thread < plan.m, 1, 0) == 1):
            for i in range(0, pad * 2, 16):
                ptx.store_shared(self.x + self.thread * plan.x_pitch + at + i, [0, 0, 0, 0])

    def copy_unordered_x(self) -> None:
        """The whole row of x, and the block's part of the permutation (act-order)."""
        plan = self.plan
        begin, end = self.x_range()
        with ptx.when(self.thread == 0):
            ptx.barrier_expect(self.x_bar, plan.k * 2 + (end - begin) * 4)
            ptx.bulk_copy(self.unordered, self.pointers["x"], plan.k * 2, self.x_bar)
            source = ptx.address(self.pointers["perm"], begin, 4)
            ptx.bulk_copy(self.unordered + plan.k * 2, source, (end - begin) * 4, self.x_bar)
        ptx.sync_warp()

    def order_x(self) -> None:
        """All threads: x in the order of the codes, eight inputs at a time; zeros behind the last input."""
        plan = self.plan
        begin, end = self.x_range()
        width = (self.block_end - self.block_begin) * (plan.chunks * CHUNK)
        perm = self.unordered + plan.k * 2

        def item(i: Int, carry: list[Any]) -> list[Any]:
            inside = i * 8 < end - begin
            at = perm + ptx.select(inside, i, 0) * 32
            places = ptx.load_shared(at, "u32", 4) + ptx.load_shared(at + 16, "u32", 4)
            values = [Int(ptx.load_shared(self.unordered + Int(p) * 2, "u16")[0]) for p in places]
            pairs = [ptx.select(inside, values[j] + (values[j + 1] << 16), 0) for j in range(0, 8, 2)]
            ptx.store_shared(self.x + i * 16, pairs)
            return carry

        ptx.loop(self.thread, width >> 3, plan.config.warps * 32, [], item)

    def x_range(self) -> tuple[Int, Int]:
        """First input of this block, and the one behind its last."""
        plan = self.plan
        begin, end = self.block_begin * (plan.chunks * CHUNK), self.block_end * (plan.chunks * CHUNK)
        return begin, ptx.select(end < plan.k, end, plan.k)

    def fill_table2(self) -> None:
        def item(i: Int, carry: list[Any]) -> list[Any]:
            value = ptx.load_global(ptx.address(self.pointers["table2"], i, 4), "f32")
            ptx.store_shared(self.table2 + i * 4, [value])
            return carry

        ptx.loop(self.thread, 256, self.plan.config.warps * 32, [], item)

    # ---- arithmetic

    def tile(self, t: Int, state: list[Int]) -> tuple[list[ir.Value], list[Int]]:
        """This warp's partial sums of tile t: for each 8 rows of x the four accumulators of an m16n8 product."""
        plan = self.plan
        n_sums = 4 * plan.columns

        def piece(b: Int, carry: list[Any]) -> list[Any]:
            sums, (slot, parity, next_tile, next_piece) = carry[:n_sums], carry[n_sums:]
            nested = self.nested_scales(t, b)
            ptx.barrier_wait(self.bars + slot * 8, parity)
            ptx.sync_warp()
            at = self.ring + slot * plan.stage_bytes
            if plan.unroll < plan.chunks:

                def part(i: Int, sums: list[Any]) -> list[Any]:
                    c0 = i * plan.unroll
                    words, params = self.load_part(at, c0)
                    params = [self.convert_params(p, nested, g) for g, p in enumerate(params)]
                    for c in range(plan.unroll):
                        sums = self.chunk(sums, words[c], params, b * plan.chunks + c0 + c, c)
                    return sums

                sums = ptx.loop(0, plan.chunks // plan.unroll, 1, sums, part)
                ptx.sync_warp()
                self.fetch(slot, next_tile, next_piece)
                ptx.sync_warp()
            else:
                words, params = self.load_part(at, Int(0))
                ptx.sync_warp()
                self.fetch(slot, next_tile, next_piece)
                ptx.sync_warp()
                params = [self.convert_params(p, nested, g) for g, p in enumerate(params)]
                for c in range(plan.chunks):
                    sums = self.chunk(sums, words[c], params, b * plan.chunks + c, c)
            next_tile, next_piece = self.advance(next_tile, next_piece)
            wrap = (slot + 1) == plan.stages
            return [*sums, ptx.select(wrap, 0, slot + 1), parity ^ ptx.select(wrap, 1, 0), next_tile, next_piece]

        out = ptx.loop(0, self.count, 1, [*(ptx.zero() for _ in range(n_sums)), *state], piece)
        return out[:n_sums], out[n_sums:]

    def load_part(self, at: Int, first: Int) -> tuple[list[Any], list[Any]]:
        """Codes and stored parameters of `unroll` chunks of a slot, from chunk `first` on."""
        plan, form = self.plan, self.plan.form
        lane = at + self.lane * (form.bits * 4) + first * form.chunk_bytes
        words = [ptx.load_shared(lane + c * form.chunk_bytes, "u32", form.bits) for c in range(plan.unroll)]
        group = Int(0)
        if form.group:
            group = first // (form.group // CHUNK) if form.group > CHUNK else first * (CHUNK // form.group)
        return words, [self.load_params(at, group + g) for g in range(plan.part_groups)]

    def load_params(self, at: Int, group: Int) -> list[list[ir.Value]]:
        """Scales and zeros of one group for rows g and g + 8, as stored."""
        plan, out = self.plan, []
        for kind, offset in zip(plan.form.params, plan.param_offsets):
            size = ITEM_BYTES[kind]
            where = at + offset + group * (ROWS * size) + (self.lane >> 2) * (2 * size)
            if kind == "f32":
                out.append(ptx.load_shared(where, "f32", 2))
            else:
                out.append(ptx.load_shared(where, "u16" if kind == "u8" else "u32"))
        return out

    def nested_scales(self, t: Int, b: Int) -> list[list[ir.Value]]:
        """Second-level absmax of each group of a piece, for rows g and g + 8 (float32, cached by L1)."""
        plan = self.plan
        if plan.form.scale != "u8":
            return []
        row = (self.first_tile + t * plan.clusters) * ROWS + (self.lane >> 2)
        groups = plan.form.groups(plan.k)
        last = plan.n * groups - 1
        out = []
        for g in range(plan.piece_groups):
            pair = []
            for half in (0, 8):
                block = (row + half) * groups + self.group_of(self.begin + b) + g
                block = ptx.select(block < last, block, last)  # rows of padding
                pair.append(ptx.load_global(ptx.address(self.pointers["absmax2"], block >> 8, 4), "f32"))
            out.append(pair)
        return out

    def convert_params(self, stored: list[list[ir.Value]], nested: list[list[ir.Value]], group: int) -> dict[str, Any]:
        """float32 scales of rows g and g + 8, and what the zeros need."""
        form = self.plan.form
        if form.scale == "u8":
            offset = ptx.load_global(self.pointers["offset"], "f32")
            pair = Int(stored[0][0])
            scales = []
            for half, second in zip((pair & 255, pair >> 8), nested[group]):
                value = ptx.load_shared(self.table2 + half * 4, "f32")[0]
                scales.append(ptx.fma(value, second, offset))
        else:
            scales = as_floats(form.scale, stored[0])
        out: dict[str, Any] = {"scale": scales}
        if form.zero == "u8" and form.zero_form == "code":
            out["zero"] = affine.integer_zeros(self.plan.dtype, stored[1][0])
        elif form.zero:
            # (code - zero) * scale = (code - point) * scale + shift, and the like; shift meets the sum of x
            out["shift"] = shifts(form, scales, as_floats(form.zero, stored[1]))
        return out

    def chunk(self, sums: list[Any], words: list[ir.Value], params: list[dict], k_chunk: Int, c: int) -> list[Any]:
        """Adds the product of a 16 x 64 tile with the rows of x; k_chunk counts from the warp's first one."""
        plan, form = self.plan, self.plan.form
        at = ((self.begin - self.block_begin) * plan.chunks + k_chunk) * (CHUNK * 2)
        x = [self.load_x(at, column) for column in range(plan.columns)]
        table = self.tables + self.lane * 4
        steps = 4 if not form.group or form.group >= CHUNK else form.group // 16
        none = [ptx.zero()] * 4
        for first in range(0, 4, steps):
            group = (c * CHUNK + first * 16) // form.group if form.group else 0
            p = params[min(group, plan.part_groups - 1)]
            used = words[first * form.bits // 4 : (first + steps) * form.bits // 4]
            a = self.decode.fragment(form, plan.dtype, used, p.get("zero"), table)
            for column in range(plan.columns):
                part, total = none, none
                for s in range(steps):
                    b = x[column][first + s]
                    part = ptx.mma(a[4 * s : 4 * s + 4], b, part, plan.dtype)
                    if "shift" in p:
                        ones = {"bf16": 0x3F803F80, "f16": 0x3C003C00}[plan.dtype]
                        total = ptx.mma([ones] * 4, b, total, plan.dtype)
                for i in range(4):
                    if plan.m == 1 and i % 2:
                        continue  # column 1 of x does not exist
                    at_sum = 4 * column + i
                    sums[at_sum] = ptx.fma(p["scale"][i // 2], part[i], sums[at_sum])
                    if "shift" in p:
                        sums[at_sum] = ptx.fma(p["shift"][i // 2], total[i], sums[at_sum])
        return sums

    def load_x(self, at: Int, column: int) -> list[list[ir.Value]]:
        """B fragments of the four steps of a chunk; rows of x that do not exist repeat the last one."""
        plan = self.plan
        row = (self.lane & 7) + 8 * column
        row = ptx.select(row < plan.m, row, plan.m - 1)
        base = self.x + row * plan.x_pitch + (self.lane >> 3) * 16 + at
        low, high = ptx.load_matrices(base), ptx.load_matrices(base + 64)
        return [low[:2], low[2:], high[:2], high[2:]]

    # ---- exchange and output

    def send(self, b: Int, t: Int, sums: list[ir.Value]) -> None:
        """Partial sums of tile t of batch b to the block that owns it."""
        plan, cluster = self.plan, self.plan.config.cluster
        slot = t // cluster if cluster > 1 else t
        buffer = b & (BUFFERS - 1)
        at = self.partials + ((buffer * plan.owned + slot) * plan.parts + self.part) * plan.partial_bytes
        bar = self.sum_bars + buffer * 8
        if cluster > 1:
            owner = t % cluster
            at, bar = ptx.remote(at, owner), ptx.remote(bar, owner)

        def store(address: Int, values: list[ir.Value]) -> None:
            if cluster > 1:
                ptx.store_remote(address, values, bar)
            else:
                ptx.store_shared(address, values)

        if plan.m == 1:
            with ptx.when((self.lane & 3) == 0):
                store(at + (self.lane >> 2) * 8, [sums[0], sums[2]])
            return
        for column in range(plan.columns):
            store(at + column * 512 + self.lane * 16, sums[4 * column : 4 * column + 4])

    def finish(self, b: Int) -> None:
        """Adds the parts of each owned tile of batch b in order, and writes y."""
        plan, cluster = self.plan, self.plan.config.cluster
        first, buffer = b * (plan.owned * cluster), b & (BUFFERS - 1)
        scope = "cluster" if cluster > 1 else "cta"
        ptx.barrier_wait(self.sum_bars + buffer * 8, (b // BUFFERS) & 1, scope)
        # an item is what one lane holds of a tile: rows g, g + 8 (and columns 2t, 2t + 1 of 8 rows of x)
        width, per_tile = (2, 8) if plan.m == 1 else (4, 32 * plan.columns)

        def item(i: Int, carry: list[Any]) -> list[Any]:
            slot, rest = i // per_tile, i % per_tile
            at = self.partials + (buffer * plan.owned + slot) * (plan.parts * plan.partial_bytes) + rest * (4 * width)
            totals = [ptx.zero()] * width
            for p in range(plan.parts):
                part = ptx.load_shared(at + p * plan.partial_bytes, "f32", width)
                totals = [ptx.add(x, y) for x, y in zip(totals, part)]
            tile = self.first_tile + (first + slot * cluster + self.rank) * plan.clusters
            lane = rest & 31
            for e, total in enumerate(totals):
                if plan.m == 1:
                    n, column = tile * ROWS + rest + 8 * e, Int(0)
                else:
                    n = tile * ROWS + (lane >> 2) + 8 * (e // 2)
                    column = (rest >> 5) * 8 + (lane & 3) * 2 + e % 2
                inside = ptx.select(n < plan.n, 1, 0) & ptx.select(column < plan.m, 1, 0)
                with ptx.when(inside == 1):
                    if "bias" in self.pointers:
                        total = ptx.add(total, ptx.load_global(ptx.address(self.pointers["bias"], n, 4), "f32"))
                    text = f"{{ .reg .b16 h; cvt.rn.{plan.dtype}.f32 h, $1; st.global.b16 [$0], h; }}"
                    ptx.asm([], text, ptx.address(self.pointers["y"], column * plan.n + n, 2), total)
            return carry

        # the first items of each batch go to other threads than those of the batch before
        threads = plan.config.warps * 32
        start = (self.thread + b * (-plan.owned * per_tile % threads)) % threads
        ptx.loop(start, self.owned_of(first) * per_tile, threads, [], item)
