"""Many rows of x (M > 16): persistent, warp-specialised, wgmma with the weight as A operand from registers.

One warp fetches (TMA), `wn` warpgroups compute. Each owns 64 rows of the weight: it reads packed codes from shared
memory, turns them into scaled 16-bit floats in registers, and multiplies with the tile of x in shared memory. Decode of
one k16 step runs while the wgmma of the one before it does. The accumulator is y^T; the epilogue transposes it on the
way through shared memory.

A cluster is used in one of two ways: `share` blocks take neighbouring rows of the weight and one copy of x serves all
of them (multicast); or `split` blocks share the K of a tile, and each adds up its part of the columns from what the
others send (distributed shared memory, in a fixed order).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode import DECODES
from pallas_kernels.decode.scaled import scaled_fragment
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS, Packed
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_plan import CONSUMER_REGISTERS, EPILOGUE_ROWS, PRODUCER_REGISTERS, Config, Plan

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
    optional = {"x": x, "codes": w.codes, "scales": w.scales, "zeros": w.zeros, "bias": bias}
    optional |= {**w.tables, "layer": layer}
    names = [name for name, array in optional.items() if array is not None]
    arrays = [optional[name] for name in names]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
        def kernel(ctx: Any, *refs: ir.Value) -> None:
            _Kernel(plan, ctx, dict(zip([*names, "y"], refs[:-1], strict=True)), ptx.shared_pointer(refs[-1])).run()

        kernel(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(plan.cluster,),
        cluster_names=("rank",),
        num_threads=config.wn + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[plgpu.SMEM((plan.layout["bytes"] // 4,), jnp.int32)],
    )(*arrays)


class _Kernel:
    """Emits the kernel; attributes are values of one thread."""

    def __init__(self, plan: Plan, ctx: Any, refs: dict[str, ir.Value], shared: Int):
        self.plan, self.refs = plan, refs
        c = plan.config
        self.decode = DECODES[plan.form.kind]
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.wg, self.t = self.thread >> 7, self.thread & 127
        clustered = plan.cluster > 1
        self.rank = ptx.special("cluster_ctarank") if clustered else Int(0)
        self.first = ptx.special("clusterid.x") if clustered else ptx.special("ctaid.x")
        self.my_tiles = (plan.tiles + plan.clusters - 1 - self.first) // plan.clusters
        at = plan.layout
        self.at = {name: shared + offset for name, offset in at.items() if name != "bytes"}
        self.full, self.empty = self.at["barriers"], self.at["barriers"] + 8 * plan.stages
        self.arrived, self.freed = self.empty + 8 * plan.stages, self.empty + 8 * (plan.stages + 1)
        self.k_begin = self.rank * plan.steps // c.split if c.split > 1 else Int(0)
        self.k_end = (self.rank + 1) * plan.steps // c.split if c.split > 1 else Int(plan.steps)
        self.k_count = self.k_end - self.k_begin
        stacked = "layer" in refs
        self.layer = [Int(ptx.load_global(ptx.global_pointer(refs["layer"]), "u32"))] if stacked else []
        lead = (1,) if stacked else ()
        # boxes are given slowest axis first, as shapes are
        self.maps = {"x": hopper.tensor_map(ctx, refs["x"], (c.tile_m // c.share, CHUNK), 128)}
        self.maps["y"] = hopper.tensor_map(ctx, refs["y"], (plan.piece, 64), 128)
        self.maps["codes"] = hopper.tensor_map(ctx, refs["codes"], (*lead, 4 * c.wn, c.chunks, plan.form.bits * 32))
        for name in ("scales", "zeros")[: len(plan.form.params)]:
            self.maps[name] = hopper.tensor_map(ctx, refs[name], (*lead, 4 * c.wn, plan.step_groups, ROWS))

    def run(self) -> None:
        plan, c = self.plan, self.plan.config
        with ptx.when(self.thread == 0):
            for i in range(plan.stages):
                ptx.barrier_init(self.full + 8 * i, 1)
                ptx.barrier_init(self.empty + 8 * i, c.wn * c.share)
            ptx.barrier_init(self.arrived, 1)
            ptx.barrier_init(self.freed, c.wn * max(1, c.split - 1))
            ptx.fence_barrier_init()
        if "table" in self.refs:
            table = ptx.global_pointer(self.refs["table"])
            if self.layer:
                table = ptx.address(table, self.layer[0], 64)
            threads = 128 * (c.wn + 1)
            self.decode.fill(plan.form, plan.dtype, self.at["tables"], table, self.thread, threads)
        ptx.sync_block()
        if plan.cluster > 1:
            ptx.cluster_arrive(relaxed=True)
            ptx.cluster_wait()
        with ptx.when(self.wg == c.wn):
            hopper.set_registers(PRODUCER_REGISTERS, "dec")
            with ptx.when(self.t == 0):
                self.produce()
            ptx.sync_warp()
        with ptx.when(self.wg < c.wn):
            hopper.set_registers(CONSUMER_REGISTERS[c.wn], "inc")
            self.consume()
        if plan.cluster > 1:  # a block may not leave while others still reach into its shared memory
            ptx.cluster_arrive(relaxed=True)
            ptx.cluster_wait()

    def where(self, t: Int) -> tuple[Int, Int]:
        """Tile of x and tile of the weight (64 * wn rows) of this block for the cluster's tile t."""
        plan, c = self.plan, self.plan.config
        u = self.first + t * plan.clusters
        group = min(c.m_group or plan.m_tiles, plan.m_tiles)
        first = u // (group * plan.n_tiles) * group  # of the group's tiles of x
        size = ptx.select(first + group < plan.m_tiles, group, plan.m_tiles - first)
        rest = u - first * plan.n_tiles
        im, it = first + rest % size, rest // size
        if c.share > 1:
            it = it * c.share + self.rank % c.share
        return im, it

    # ---- one thread: copies

    def produce(self) -> None:
        plan, c = self.plan, self.plan.config
        part = c.tile_m // c.share
        policy = ptx.evict_first() if plan.m_tiles == 1 else None

        def tile(t: Int, carry: list[Int]) -> list[Int]:
            im, it = self.where(t)

            def step(kk: Int, carry: list[Int]) -> list[Int]:
                slot, parity = carry
                ptx.barrier_wait(self.empty + slot * 8, parity ^ 1)
                bar = self.full + slot * 8
                ptx.barrier_expect(bar, plan.x_bytes + plan.code_bytes + sum(plan.param_bytes))
                x = self.at["x"] + slot * plan.x_bytes
                for i in range(c.chunks):
                    target, k = x + i * (c.tile_m * CHUNK * 2), kk * plan.span + i * CHUNK
                    if c.share > 1:
                        mine = self.rank % c.share
                        target, row = target + mine * (part * 128), im * c.tile_m + mine * part
                        hopper.tensor_copy(target, self.maps["x"], [k, row], bar, Int((1 << c.share) - 1))
                    else:
                        hopper.tensor_copy(target, self.maps["x"], [k, im * c.tile_m], bar)
                codes = self.at["codes"] + slot * plan.code_bytes
                row = it * (4 * c.wn)
                hopper.tensor_copy(codes, self.maps["codes"], [0, kk * c.chunks, row, *self.layer], bar, policy=policy)
                group = self.group_of(kk)
                for name, nbytes in zip(("scales", "zeros"), plan.param_bytes):
                    target = self.at[name] + slot * (-(-nbytes // 128) * 128)
                    hopper.tensor_copy(target, self.maps[name], [0, group, row, *self.layer], bar)
                wrap = (slot + 1) == plan.stages
                return [ptx.select(wrap, 0, slot + 1), parity ^ ptx.select(wrap, 1, 0)]

            return ptx.loop(self.k_begin, self.k_end, 1, carry, step)

        ptx.loop(0, self.my_tiles, 1, [Int(0), Int(0)], tile)

    def group_of(self, step: Int) -> Int:
        group, span = self.plan.form.group, self.plan.span
        if not group:
            return Int(0)
        return step * (span // group) if group <= span else step // (group // span)

    # ---- warpgroups: arithmetic

    def consume(self) -> None:
        def tile(t: Int, carry: list[Int]) -> list[Int]:
            im, it = self.where(t)
            sums, carry = self.multiply(carry)
            self.epilogue(t, im, it, sums)
            ptx.sync_warp()
            return carry

        ptx.loop(0, self.my_tiles, 1, [Int(0), Int(0)], tile)
        with ptx.when(self.t == 0):
            hopper.tensor_store_wait(0)
        ptx.sync_warp()

    def weights(self, slot: Int) -> Any:
        """This thread's codes and parameters of a step, from shared memory."""
        plan, form = self.plan, self.plan.form
        row_tile = self.warp  # 16 rows a warp; consumers are the first warps
        codes = self.at["codes"] + slot * plan.code_bytes + self.lane * (form.bits * 4)
        words = []
        for i in range(plan.config.chunks):
            at = codes + (row_tile * plan.config.chunks + i) * form.chunk_bytes
            words += ptx.load_shared(at, "u32", form.bits)
        params = []
        for g in range(plan.step_groups):
            one = []
            for name, kind, nbytes in zip(("scales", "zeros"), form.params, plan.param_bytes):
                size = ITEM_BYTES[kind]
                base = self.at[name] + slot * (-(-nbytes // 128) * 128)
                base = base + (row_tile * plan.step_groups + g) * (ROWS * size) + (self.lane >> 2) * (2 * size)
                if kind == "f32":
                    one.append(ptx.load_shared(base, "f32", 2))
                else:
                    one.append(ptx.load_shared(base, "u16" if kind == "u8" else "u32"))
            params.append(one)
        return words, params

    def release(self, slot: Int) -> None:
        """The slot may be filled again, here and in the blocks that share x."""
        c = self.plan.config
        if c.share == 1:
            with ptx.when(self.t == 0):
                ptx.barrier_arrive(self.empty + slot * 8)
        else:
            with ptx.when(self.t < c.share):
                rank = self.rank - self.rank % c.share + self.t
                hopper.arrive_remote(self.empty + slot * 8, rank)

    def step(self, sums: list[Any], slot: Int, parity: Int) -> list[Any]:
        """Issues the wgmmas of one step, each as soon as its k16 of weights is decoded."""
        plan, form = self.plan, self.plan.form
        ptx.barrier_wait(self.full + slot * 8, parity)
        ptx.sync_warp()
        words, params = self.weights(slot)
        table = self.at["tables"] + self.lane * 4
        x = self.at["x"] + slot * plan.x_bytes
        per_step = form.bits // 4
        for i in range(4 * plan.config.chunks):
            group = i * 16 // form.group if form.group and form.group < plan.span else 0
            used = words[i * per_step : (i + 1) * per_step]
            a = scaled_fragment(form, plan.dtype, used, params[group], table)
            if i % 4 == 0:
                b = hopper.matrix_descriptor(x + (i // 4) * (plan.config.tile_m * CHUNK * 2))
            hopper.wgmma_fence()
            sums = hopper.wgmma(sums, a, hopper.advance(b, 32 * (i % 4)) if i % 4 else b, plan.dtype)
        hopper.wgmma_commit()
        return sums

    def multiply(self, carry: list[Int]) -> tuple[list[Any], list[Int]]:
        """y^T of one tile: sums over this block's steps."""
        plan = self.plan
        count = plan.sums

        def body(kk: Int, carry: list[Any]) -> list[Any]:
            sums, (slot, parity) = carry[:count], carry[count:]
            sums = self.step(sums, slot, parity)
            hopper.wgmma_wait(0)
            self.release(slot)
            ptx.sync_warp()
            wrap = (slot + 1) == plan.stages
            return [*sums, ptx.select(wrap, 0, slot + 1), parity ^ ptx.select(wrap, 1, 0)]

        out = ptx.loop(0, self.k_count, 1, [*([ptx.zero()] * count), *carry], body)
        return out[:count], out[count:]

    # ---- epilogue

    def epilogue(self, t: Int, im: Int, it: Int, sums: list[Any]) -> None:
        plan, c = self.plan, self.plan.config
        begin, rows = Int(0), c.tile_m // c.split
        if c.split > 1:
            sums = self.exchange(t, sums)
            begin = (self.rank % c.split) * rows
        n0 = it * (64 * c.wn) + self.wg * 64
        row0 = im * c.tile_m + begin
        if "bias" in self.refs:
            sums = self.add_bias(n0, sums)
        piece = plan.piece
        buffers = self.at["y"] + self.wg * (2 * EPILOGUE_ROWS * 128)
        for i in range(rows // piece):
            buffer = buffers + (i % 2) * (EPILOGUE_ROWS * 128)
            with ptx.when(self.t == 0):
                hopper.tensor_store_wait(1)
            ptx.sync_warp()
            hopper.sync_threads(self.wg + 1, 128)
            self.transpose(buffer, sums[i * piece // 2 : (i + 1) * piece // 2])
            ptx.fence_async()
            hopper.sync_threads(self.wg + 1, 128)
            with ptx.when(self.t == 0):
                hopper.tensor_store(self.maps["y"], [n0, row0 + i * piece], buffer)
            ptx.sync_warp()

    def transpose(self, buffer: Int, sums: list[Any]) -> None:
        """Accumulators (rows of the weight x rows of x) to [rows of x][64] in shared memory, 128-byte swizzle."""
        plan = self.plan
        matrix, r = self.lane >> 3, self.lane & 7
        chunk = (self.warp & 3) * 2 + (matrix & 1)  # 16-byte column of y: 8 rows of the weight
        for j in range(0, len(sums), 8):  # 16 rows of x
            row = (matrix >> 1) * 8 + r + (j // 8) * 16
            at = buffer + row * 128 + ((chunk ^ r) << 4)
            pairs = [ptx.pack_pair(sums[j + 2 * q], sums[j + 2 * q + 1], plan.dtype) for q in range(4)]
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

    def exchange(self, t: Int, sums: list[Any]) -> list[Any]:
        """Sums of this block's columns over all blocks of the split, added in the order of their ranks."""
        plan, c = self.plan, self.plan.config
        share = len(sums) // c.split
        vectors = share // 4
        inbox_wg = vectors * 128 * 16
        inbox = c.wn * inbox_wg
        with ptx.when(self.thread == 0):
            ptx.barrier_expect(self.arrived, plan.inbox_bytes)

        @functools.partial(_when_positive, t)
        def _() -> None:
            ptx.barrier_wait(self.freed, (t + 1) & 1)

        own: list[Any] = [ptx.zero()] * share
        for r in range(c.split):
            mine = self.rank == r
            own = [ptx.select_float(mine, s, o) for s, o in zip(sums[r * share : (r + 1) * share], own)]
            # my place in the inbox of r: ranks below r keep their number, ranks above it move down by one
            place = ptx.select(self.rank < r, self.rank, self.rank - 1)
            at = self.at["inbox"] + place * inbox + self.wg * inbox_wg + self.t * 16
            with ptx.when(ptx.select(mine, 0, 1) == 1):
                target, bar = ptx.remote(at, r), ptx.remote(self.arrived, r)
                for v in range(vectors):
                    ptx.store_remote(target + v * 2048, sums[r * share + 4 * v : r * share + 4 * v + 4], bar)
        ptx.barrier_wait(self.arrived, t & 1, "cluster")
        totals: list[Any] = [ptx.zero()] * share
        received = [
            ptx.chain(
                *(
                    ptx.load_shared(
                        self.at["inbox"] + p * inbox + self.wg * inbox_wg + self.t * 16 + v * 2048, "f32", 4
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
                    ptx.select_float(self.rank < r, above[i], below[i])
                    if 0 < r < c.split - 1
                    else (above[i] if r else below[i])
                )
                totals[i] = ptx.add(totals[i], ptx.select_float(self.rank == r, own[i], other))
        with ptx.when(ptx.select(self.t < c.split, 1, 0) & ptx.select(self.t == self.rank, 0, 1) == 1):
            hopper.arrive_remote(self.freed, self.t)
        return totals


def _when_positive(t: Int, function: Any) -> None:
    with ptx.when(Int(0) < t):
        function()
