"""Few rows of x (M <= 16) and an even K: codes go from memory straight into registers.

A block multiplies one tile of 16 rows of the weight after the other. Its warps share K evenly, each keeps to its part in
every pass, and a lane's 16 bytes of a 16 x 64 tile are four steps of `mma.sync`: there is no ring, no barrier and no
copy engine between the memory and the arithmetic. As soon as a chunk is decoded, the same chunk of the next pass is asked
for. (More on their way, in registers, in shared memory or asked for in L2, is slower: measured.) x stays in shared memory
from the first pass on, and every warp fetches its own part of it: through registers where that is little, which saves
the copy engine's way by a descriptor and a barrier.

At the end of a pass the warps meet once, and a few of them add up what all have summed, in a fixed order, while the
others go on. With many rows of x a block would load more of it than of the weight: then two blocks share K, and add up
half of the outputs each (distributed shared memory).

Compared with `stream`: the first products come earlier and the tail is shorter, the work of a block is coarser.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode import DECODES, affine
from pallas_kernels.decode.scaled import as_floats, shifts
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS, Packed
from pallas_kernels.launch import arguments, launch, pointers
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons import direct_params
from pallas_kernels.skeletons.direct_plan import MAX_ROWS, Config, Plan
from pallas_kernels.skeletons.nested import Nested, one_of
from pallas_kernels.skeletons.output import Writer

__all__ = ["MAX_ROWS", "Config", "Plan", "matmul"]


def matmul(x: jax.Array, w: Packed, config: Config, bias: jax.Array | None = None, layer: jax.Array | None = None):
    """y = x @ w.T (+ bias); arguments and result as `stream.matmul`."""
    (m, k), (n, _) = x.shape, w.shape
    dtype = {"bfloat16": "bf16", "float16": "f16"}[str(x.dtype)]
    plan = Plan(m, n, k, w.form, config, dtype)
    if reason := plan.reason():
        raise ValueError(f"direct.matmul: {reason}")
    if w.perm is not None:
        raise ValueError("direct.matmul: x must be in the order of the codes already")
    arrays = arguments(x, w, bias, layer)

    def emit(ctx: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        ptx.skip_preamble()
        at = pointers(refs, arrays)
        x_map = None if plan.x_in_registers else hopper.tensor_map(ctx, refs["x"], (m, CHUNK), 128)
        _Kernel(plan, x_map, at, shared).run()

    out = {"y": jax.ShapeDtypeStruct((m, n), x.dtype)}
    size = {"clusters": plan.clusters, "cluster": config.cluster, "warps": config.warps}
    return launch(emit, "direct_matmul", arrays, out, shared_bytes=plan.layout["bytes"], **size)[0]


class _Kernel(Writer):
    """Emits the kernel."""

    def __init__(self, plan: Plan, x_map: ir.Value | None, pointers: dict[str, ir.Value], shared: Int):
        self.plan, self.x_map, self.pointers = plan, x_map, pointers
        c, at = plan.config, plan.layout
        self.decode = DECODES[plan.form.decode]
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, hopper.uniform(self.thread >> 5)
        self.rank = ptx.special("cluster_ctarank") if c.cluster > 1 else Int(0)
        self.first_tile = ptx.special("clusterid.x") if c.cluster > 1 else ptx.special("ctaid.x")
        self.x, self.sums, self.mail = shared + at["x"], shared + at["sums"], shared + at["mail"]
        self.tables = shared + at["tables"]
        self.bars = shared + at["barriers"]
        self.mail_bars = self.bars + 8 * c.warps
        self.pairs = plan.pairs(self.tables, self.lane)
        self.nested = Nested(plan, pointers, None, self.thread, c.warps * 32) if plan.form.scale == "u8" else None
        self.policy = ptx.evict_first()
        self.local = self.warp * plan.chunks  # first chunk of the warp, in the block and along the whole K
        self.first = self.local + self.rank * plan.block_chunks
        self.passes = (plan.tiles + plan.clusters - 1 - self.first_tile) // plan.clusters

    def run(self) -> None:
        plan, c = self.plan, self.plan.config
        entries = []
        if plan.table_bytes:
            entries = self.decode.read(plan.form, self.pointers.get("table"), self.thread, c.warps * 32)
        if self.nested:
            self.nested.prefetch()
        self.begin_barriers()
        if plan.x_first:
            x = self.fetch_x()
        at, always = self.codes_of(Int(0)), Int(1)
        codes = [self.fetch_chunk(at, chunk, always) for chunk in range(plan.chunks)]
        params = self.fetch_params(Int(0))
        if not plan.x_first:
            x = self.fetch_x()
        if entries:
            if plan.x_in_registers:
                ptx.sync_block()  # or the assembler puts loads of codes behind the writes, and these are many
            self.decode.write(plan.form, plan.dtype, self.tables, entries, plan.wide_table)
        for place, words, exists in x:
            with ptx.when(exists):
                ptx.store_shared(place, words)
        ptx.sync_warp()
        if entries:
            ptx.sync_block()
        if not plan.x_in_registers:
            ptx.barrier_wait(self.bars + self.warp * 8, 0)
            ptx.sync_warp()
        if c.cluster > 1:
            ptx.cluster_wait()  # the other block's barriers are there
        self.held: list[Any] = []
        self.held = [self.x_of(chunk) for chunk in range(c.held)]
        leaves, tree = jax.tree.flatten((codes, *params))

        def one(t: Int, carry: list[Any]) -> list[Any]:
            return jax.tree.leaves(self.one_pass(t, *jax.tree.unflatten(tree, carry)))

        ptx.loop(0, self.passes, 1, leaves, one)

    # ---- loads

    def begin_barriers(self) -> None:
        """One for each warp's x, and two, taken in turn, for the sums that the other block sends."""
        plan, c = self.plan, self.plan.config
        with ptx.when(self.lane == 0):
            if not plan.x_in_registers:
                ptx.barrier_init(self.bars + self.warp * 8, 1)
            if c.cluster > 1:
                with ptx.when(self.warp < 2):
                    ptx.barrier_init(self.mail_bars + self.warp * 8, 1)
                with ptx.when(self.warp == 0):
                    ptx.barrier_expect(self.mail_bars, plan.part_bytes // 2)
            ptx.fence_barrier_init()
            if not plan.x_in_registers:
                ptx.barrier_expect(self.bars + self.warp * 8, plan.chunks * plan.m * CHUNK * 2)
        ptx.sync_warp()
        if c.cluster > 1:
            ptx.cluster_arrive(relaxed=True)

    def fetch_x(self) -> list[tuple[Int, list[ir.Value], ir.Value]]:
        """Each warp asks for its own part of x: the copy engine, or where that is little each lane for pieces of 16 bytes.

        Returns:
          Of each of the lane's pieces where it goes, the words, and whether it exists.
        """
        plan = self.plan
        if not plan.x_in_registers:
            with ptx.when(self.lane == 0):
                for i in range(plan.chunks):
                    target = self.x + (self.local + i) * plan.chunk_bytes
                    hopper.tensor_copy(target, self.x_map, [(self.first + i) * CHUNK, 0], self.bars + self.warp * 8)
            ptx.sync_warp()
            return []
        source = ptx.address(self.pointers["x"], self.first * CHUNK, 2)
        out = []
        for begin in range(0, plan.m * plan.chunks * 8, 32):
            row, piece = (self.lane + begin) // (plan.chunks * 8), (self.lane + begin) % (plan.chunks * 8)
            exists = row < plan.m
            inside = ptx.select(exists, 1, 0)
            if plan.k % CHUNK:
                inside = inside & ptx.select(self.first * CHUNK + piece * 8 < plan.k, 1, 0)
            words = ptx.load_where(inside, ptx.address(source, row * plan.k + piece * 8, 2))
            chunk = self.x + (self.local + (piece >> 3)) * plan.chunk_bytes
            # swizzled as the copy engine does
            out.append((chunk + row * (CHUNK * 2) + (((piece ^ row) & 7) << 4), words, exists))
        return out

    def row(self, t: Int) -> Int:
        """The tile of pass t, or the last one."""
        last = self.plan.tiles - 1
        tile = self.first_tile + t * self.plan.clusters
        return ptx.select(tile < last, tile, last)

    def codes_of(self, t: Int) -> ir.Value:
        chunk = self.row(t) * self.plan.k_chunks + self.first
        return ptx.address(ptx.address(self.pointers["codes"], chunk, 512), self.lane, 16)

    def fetch_chunk(self, at: ir.Value, chunk: int, exists: Int) -> list[ir.Value]:
        return ptx.load_where(exists, at, chunk * self.plan.form.chunk_bytes, self.policy)

    def fetch_params(self, t: Int) -> tuple[list[list[ir.Value]], list[list[ir.Value]]]:
        """Stored parameters of each array, see `direct_params`; and where scales are nested those of the second level over
        these groups, of rows g and g + 8.
        """
        plan, form = self.plan, self.plan.form
        span, part = plan.chunks * CHUNK, self.rank * plan.config.warps + self.warp
        row, first = self.row(t), Int(0)
        if form.group:
            first = part * (span // form.group) if span >= form.group else part // (form.group // span)
        group = row * form.groups(plan.k) + first
        out: list[list[ir.Value]] = []
        seconds = []
        for name, kind in zip(("scales", "zeros"), form.params):
            at = ptx.address(self.pointers[name], group, ROWS * ITEM_BYTES[kind])
            out.append(direct_params.fetch(at, kind, len(plan.segments), self.lane))
        if self.nested:
            blocks = 1 if plan.nested_by_row else 2
            for half in (0, 8):
                code = (row * ROWS + (self.lane >> 2) + half) * form.groups(plan.k) + first
                seconds.append(self.nested.over(code, len(plan.segments), blocks))
        return out, seconds

    # ---- arithmetic

    def fragments(self, chunk: int, column: int) -> list[list[ir.Value]]:
        """B fragments of the four steps of a chunk; rows of x that do not exist are whatever lies there."""
        r = self.lane & 7 if self.plan.m > 1 else Int(0)
        base = self.x + (self.local + chunk) * self.plan.chunk_bytes + column * 1024 + r * 128
        out = []
        for half in (0, 4):
            words = ptx.load_matrices(base + ((((self.lane >> 3) + half) ^ r) << 4))
            out += [words[:2], words[2:]]
        return out

    def look_up(self, word: ir.Value) -> list[ir.Value]:
        return self.decode.fragment(self.plan.form, self.plan.dtype, [word], None, self.pairs, here=True)

    def plain(self, word: ir.Value, zero: Any) -> list[ir.Value]:
        return self.decode.fragment(self.plan.form, self.plan.dtype, [word], zero)

    def x_of(self, chunk: int) -> list[list[list[ir.Value]]]:
        """`fragments` of all columns of a chunk."""
        if chunk < len(self.held):
            return self.held[chunk]
        return [self.fragments(chunk, column) for column in range(self.plan.columns)]

    def convert(self, g: int, fetched: list[list[ir.Value]], seconds: list[Any]) -> dict[str, Any]:
        """Scales of group g of rows g and g + 8, and what the zeros need."""
        form = self.plan.form
        stored = [direct_params.of_group(some, kind, g, self.lane) for some, kind in zip(fetched, form.params)]
        if self.nested:
            scales = self.nested.floats(Int(stored[0][0]), [one_of(found, g) for found in seconds])
        else:
            scales = as_floats(form.scale, stored[0])
        out: dict[str, Any] = {"scale": scales}
        if form.zero == "u8" and form.zero_form == "code":
            out["zero"] = self.decode.integer_zeros(self.plan.dtype, stored[1][0])
        elif form.zero:
            out["shift"] = shifts(form, scales, as_floats(form.zero, stored[1]))
        return out

    def one_pass(self, t: Int, codes: list[Any], stored: list[Any], seconds: list[Any]) -> tuple[Any, ...]:
        """Multiplies the tile of pass t, and asks for what follows.

        Args:
          codes: those of its chunks.
          stored, seconds: see `fetch_params`.

        Returns:
          The same for the next pass.
        """
        plan = self.plan
        exists, at = ptx.select(t + 1 < self.passes, 1, 0), self.codes_of(t + 1)
        sums = [ptx.zero()] * (4 * plan.columns)
        following: list[Any] = []
        for g, (begin, end) in enumerate(plan.segments):
            p = self.convert(g, stored, seconds)
            parts = [[ptx.zero()] * 4 for _ in range(plan.columns)]
            totals = [[ptx.zero()] * 4 for _ in range(plan.columns)]  # sums of x
            for s in range(begin, end):
                chunk, step = divmod(s, 4)
                if step == 0 or s == begin:
                    x = self.x_of(chunk)
                if self.pairs and (step == 0 or s == begin):
                    values = {i: self.look_up(codes[chunk][i]) for i in range(step, min(4, step + end - s))}
                a = values[step] if self.pairs else self.plain(codes[chunk][step], p.get("zero"))
                for column in range(plan.columns):
                    parts[column] = ptx.mma(a, x[column][step], parts[column], plan.dtype)
                    if "shift" in p:
                        ones = [affine.ones(plan.dtype)] * 4
                        totals[column] = ptx.mma(ones, x[column][step], totals[column], plan.dtype)
                if step == 3:
                    following.append(self.fetch_chunk(at, chunk, exists))
            for i in range(len(sums)):
                sums[i] = ptx.fma(p["scale"][i // 2 % 2], parts[i // 4][i % 4], sums[i])
                if "shift" in p:
                    sums[i] = ptx.fma(p["shift"][i // 2 % 2], totals[i // 4][i % 4], sums[i])
        params = self.fetch_params(t + 1)
        self.finish(t, sums)
        return following, *params

    # ---- sums

    def finish(self, t: Int, sums: list[ir.Value]) -> None:
        """All warps: adds up the block's sums of pass t, and those of the other block of a cluster."""
        plan, c = self.plan, self.plan.config
        # two sets: a warp writes the next one while others still read this one
        parts = self.sums + (t & 1) * plan.sums_turn + self.lane * 8
        for i in range(plan.squares):
            ptx.store_shared(parts + self.warp * plan.sums_pitch + i * 256, sums[2 * i : 2 * i + 2])
        ptx.sync_warp()
        ptx.sync_block()
        tile = self.first_tile + t * plan.clusters
        # Two places for what is sent: a block gets here again after all of its warps have read what came a pass ago, and
        # then the other one has read what came to it two passes ago.
        mail, bar = self.mail + (t & 1) * plan.part_bytes + self.lane * 8, self.mail_bars + (t & 1) * 8

        def square(i: Int, carry: list[Any]) -> list[Any]:
            values = [ptx.load_shared(parts + i * 256 + w * plan.sums_pitch, "f32", 2) for w in range(c.warps)]
            total = values[0]
            for v in values[1:]:
                total = [ptx.add(a, b) for a, b in zip(total, v)]
            half, column = i & 1, i >> 1
            n, m = tile * ROWS + half * 8, column * 8
            if c.cluster == 1:
                self.put_pairs(n, m, total)
                return carry
            place = mail + i * 256
            mine = half == self.rank
            with ptx.when(ptx.select(mine, 0, 1) == 1):
                ptx.store_remote(ptx.remote(place, half), total, ptx.remote(bar, half))
            ptx.sync_warp()
            with ptx.when(mine):
                ptx.sync_warp()
                ptx.barrier_wait(bar, t >> 1 & 1, "cluster")
                ptx.sync_warp()
                self.put_pairs(n, m, [ptx.add(a, b) for a, b in zip(total, ptx.load_shared(place, "f32", 2))])
            ptx.sync_warp()
            return carry

        ptx.loop((self.warp + t * 5) % c.warps, plan.squares, c.warps, [], square)
        ptx.sync_warp()
        if c.cluster > 1:  # what was sent a pass ago has been read: the same place is for what comes in the next one
            with ptx.when(self.thread == 0):
                ptx.barrier_expect(self.mail_bars + (t + 1 & 1) * 8, plan.part_bytes // 2)
            ptx.sync_warp()
