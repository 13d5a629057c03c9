"""The main loop of a warpgroup: packed codes -> scaled 16-bit floats in registers -> wgmma with x in shared memory."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode.scaled import Powers, folds, scaled, scaled_fragment
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_block import Block
from pallas_kernels.skeletons.gemm_nested import NestedScales
from pallas_kernels.skeletons.gemm_plan import UNIT
from pallas_kernels.skeletons.plan import tile_words

# What makes weights of codes and parameters where that is more than a multiplication with a stored scale.
Scaling = Powers | NestedScales | None


class Sums(Block):
    """Accumulates y^T of one unit of 64 rows."""

    def skip(self, slot: Int, parity: Int, count: Int) -> tuple[Int, Int]:
        """Lets steps pass that are for other warpgroups."""

        def step(_: Int, carry: list[Int]) -> list[Int]:
            ptx.barrier_wait(self.full + carry[0] * 8, carry[1])
            ptx.sync_warp()
            hopper.sync_threads(
                self.wg + 1, 128
            )  # no warp may fall behind by a turn of the ring: it would miss a phase
            self.release(carry[0])
            ptx.sync_warp()
            return list(self.after(carry[0], carry[1]))

        slot, parity = ptx.loop(0, count, 1, [slot, parity], step)
        return slot, parity

    def words(self, slot: Int, chunk: int, unit: Int) -> list[ir.Value]:
        """This thread's codes of a tile of 64 along K, from shared memory."""
        plan, form = self.plan, self.plan.form
        at = self.at["codes"] + slot * plan.code_bytes + self.lane * 16
        tile = unit * (UNIT // ROWS) + (self.warp & 3)
        return tile_words(form, at + (tile * plan.config.chunks + chunk) * form.chunk_bytes)

    def params(self, slot: Int, unit: Int, scaling: Scaling) -> list[Any]:
        """Scales (and zeros) of a unit in a step: for each group, for each array, the registers."""
        plan, form = self.plan, self.plan.form
        params = []
        for g in range(plan.step_groups):
            one = []
            for name, kind, nbytes, pitch in zip(("scales", "zeros"), form.params, plan.param_bytes, plan.param_pitch):
                size = ITEM_BYTES[kind]
                base = self.at[name] + slot * nbytes + unit * pitch
                base = base + ((self.warp & 3) * plan.step_groups + g) * (ROWS * size) + (self.lane >> 2) * (2 * size)
                if kind == "f32":
                    one.append(ptx.load_shared(base, "f32", 2))
                else:
                    one.append(ptx.load_shared(base, "u16" if size == 1 else "u32"))
            params.append(one)
        if isinstance(scaling, NestedScales):
            place = ptx.load_shared(self.at["places"] + slot * 4, "u32")[0] if plan.place_bytes else 0
            return [[pair] for pair in scaling.of_step(Int(place), [Int(one[0][0]) for one in params])]
        return params

    def magic(self) -> Any:
        """The constant of the decode, read anew: see `multiply`."""
        pinned = self.plan.config.ahead and self.plan.form.kind == "affine" and self.plan.dtype == "f16"
        return ptx.look_up(self.at["magic"], here=True) if pinned else None

    def fragment(
        self,
        i: int,
        words: list[Any],
        params: list[Any],
        magic: Any = None,
        scaling: Scaling = None,
        values: list[ir.Value] | None = None,
    ) -> list[ir.Value]:
        """Weights of k16 step i of a step of the ring, whose codes are `words`; `values` if they are looked up already."""
        plan, params = self.plan, params[self.group_in_step(i)]
        if values is not None:
            if isinstance(scaling, NestedScales):
                return scaling.scaled(values, params)
            return scaled(plan.form, plan.dtype, values, params)
        if scaling:
            return scaling.fragment(plan.form, words, params)
        return scaled_fragment(plan.form, plan.dtype, words, params, self.pairs, magic)

    def group_in_step(self, i: int) -> int:
        """The group of k16 step i among those of a step of the ring."""
        group = self.plan.form.group
        return i * 16 // group if group and group < self.plan.span else 0

    def look_up(self, words: list[Any]) -> list[list[ir.Value]]:
        """Values of k16 steps, without their scales, all asked for at once."""
        plan = self.plan
        return [self.decode.fragment(plan.form, plan.dtype, [word], None, self.pairs, here=True) for word in words]

    def fetch(self, slot: Int, parity: Int, scaling: Scaling = None) -> dict[str, list[Any]]:
        """This thread's codes and parameters of a step, once they are there."""
        ptx.barrier_wait(self.full + slot * 8, parity)
        ptx.sync_warp()
        words = ptx.chain(*(self.words(slot, i, self.unit) for i in range(self.plan.config.chunks)))
        return {"words": words, "params": self.params(slot, self.unit, scaling)}

    def first_fragment(self, ready: dict[str, list[Any]], scaling: Scaling = None) -> list[ir.Value]:
        return self.fragment(0, ready["words"][: self.plan.form.bits // 4], ready["params"], self.magic(), scaling)

    def step(
        self,
        sums: list[Any],
        ready: dict[str, list[Any]],
        slot: Int,
        before: Int | None = None,
        after: Any = None,
        scaling: Scaling = None,
    ) -> tuple[list[Any], Any]:
        """Issues the wgmmas of a step.

        Args:
          ready: codes and parameters, and "a", the weights of the first wgmma, if they are decoded already.
          before: the slot of the step before it, to release once the tensor core has read it.
          after: slot and parity of the next step.
          scaling: where it is more than a multiplication with a stored scale.

        Returns:
          The sums, and the codes and parameters of the next step if the plan wants them before the last wgmma.
        """
        plan = self.plan
        count = 4 * plan.config.chunks
        part = plan.between_waits
        x = self.at["x"] + slot * plan.x_bytes
        words, params = ready["words"], ready["params"]
        per = plan.form.bits // 4  # words of a k16 step
        at_once = plan.looked_up
        values: list[Any] = [None] * count
        a = ready.get("a")
        magic, following = [None, self.magic()], None
        for i in range(count):
            if after is not None and i == count - 1 and plan.fetch_early:
                following = self.fetch(after[0], after[1], scaling)
            if at_once and i % at_once == 0:
                values[i : i + at_once] = self.look_up(words[i : i + at_once])
            if i or a is None:
                a = self.fragment(i, words[i * per : (i + 1) * per], params, magic[i], scaling, values[i])
            if i % 4 == 0:
                b = hopper.matrix_descriptor(x + (i // 4) * (plan.config.tile_m * CHUNK * 2))
            hopper.wgmma_fence()
            sums = hopper.wgmma(sums, a, hopper.advance(b, 32 * (i % 4)) if i % 4 else b, plan.dtype)
            magic.append(self.magic() if i + 2 < count else None)
            if (i + 1) % part == 0 and i + 1 < count:
                hopper.wgmma_commit()
                hopper.wgmma_wait(1)
                if before is not None and i + 1 == part:
                    self.release(before)
                    ptx.sync_warp()
        hopper.wgmma_commit()
        return sums, following

    def step_in_turn(self, sums: list[Any], slot: Int, height: int, scaling: list[Scaling]) -> list[Any]:
        """As `step`, for `height` units and with fewer registers: each chunk is read while the one before is multiplied.

        Args:
          sums: those of all units, one after the other.
          scaling: of each unit.
        """
        plan, c = self.plan, self.plan.config
        x, per = self.at["x"] + slot * plan.x_bytes, plan.form.bits // 4
        order = [(u, chunk) for u in range(height) for chunk in range(c.chunks)]
        size = len(sums) // height
        parts = [sums[u * size : (u + 1) * size] for u in range(height)]
        stored = [self.params(slot, self.unit + u * c.wn, scaling[u]) for u in range(height)]
        words = self.words(slot, 0, self.unit)
        for at, (u, chunk) in enumerate(order):
            now = words
            if at + 1 < len(order):
                v, following = order[at + 1]
                words = self.words(slot, following, self.unit + v * c.wn)
            b = hopper.matrix_descriptor(x + chunk * (c.tile_m * CHUNK * 2))
            values = self.look_up(now) if plan.looked_up else [None] * 4
            for i in range(4):
                own = now[i * per : (i + 1) * per]
                a = self.fragment(4 * chunk + i, own, stored[u], scaling=scaling[u], values=values[i])
                hopper.wgmma_fence()
                parts[u] = hopper.wgmma(parts[u], a, hopper.advance(b, 32 * i) if i else b, plan.dtype)
                if (i + 1) % plan.burst == 0:
                    hopper.wgmma_commit()
                    if i < 3 or at + 1 < len(order):
                        hopper.wgmma_wait(1)
        return ptx.chain(*parts)

    @property
    def folded(self) -> bool:
        """Whether the scale is part of the decode's arithmetic."""
        form = self.plan.form
        return folds(form, self.plan.dtype) and (form.small or not self.plan.config.ahead)

    @property
    def searched(self) -> bool:
        """Whether the largest scale of each row is looked for."""
        return self.folded and not self.plan.form.small

    def scaling(self, n0: Int, height: int = 1) -> list[Scaling]:
        """Of `height` units from row n0 on."""
        rows = [n0 + u * (self.plan.config.wn * UNIT) for u in range(height)]
        if self.nested:
            g = (self.warp & 3) * ROWS + (self.lane >> 2)
            return [NestedScales(self.nested, row + g, self.pairs) for row in rows]
        if not self.searched:
            return [Powers() if self.folded else None] * height
        return [Powers(self.largest_scales(row)) for row in rows]

    def scales_of(self, n0: Int) -> ir.Value:
        """Address of the scales of this warp's tile of the unit that begins at row n0."""
        plan = self.plan
        nbytes, last = plan.form.groups(plan.k) * (ROWS * 2), -(-plan.n // ROWS) - 1
        tile = (n0 >> 4) + (self.warp & 3)
        at = ptx.global_pointer(self.refs["scales"])
        if self.layer:
            at = ptx.slice_address(at, self.layer[0], (last + 1) * nbytes)
        return ptx.address(at, ptx.select(tile < last, tile, last), nbytes)

    def prefetch_scales(self) -> None:
        """Asks for what `largest_scales` reads in the first pass, before the block's threads have met."""
        groups = self.plan.form.groups(self.plan.k)
        _, first = self.work.tile(Int(0))
        at = self.scales_of(self.work.share(Int(0), first, self.unit).unit * UNIT)
        for i in range(min(-(-groups // 32), 4)):
            group = self.lane + i * 32
            ptx.prefetch(ptx.address(at, ptx.select(group < groups, group, 0), ROWS * 2))

    def largest_scales(self, n0: Int) -> list[Int]:
        """Bits of the largest absolute scales of this lane's rows g and g + 8 of the unit that begins at row n0."""
        vectors, at = 2 * self.plan.form.groups(self.plan.k), self.scales_of(n0)  # of 8 scales

        def some(i: Int, most: list[Int]) -> list[Int]:
            for j in range(4):
                v = self.lane + (i + j) * 32
                words = ptx.load_words(ptx.address(at, ptx.select(v < vectors, v, self.lane & 1), 16))
                most = [ptx.larger_halves(m, Int(w) & 0x7FFF7FFF) for m, w in zip(most, words)]
            return most

        most = [Int(0)] * 4
        most = ptx.loop(0, -(-vectors // 32), 4, most, some) if vectors > 128 else some(Int(0), most)
        for mask in (2, 4, 8, 16):
            most = [ptx.larger_halves(m, ptx.shuffle(m, self.lane ^ mask)) for m in most]
        g = self.lane >> 2
        pairs = [ptx.shuffle(m, g >> 2) for m in most]
        low, high = (ptx.select((g & 1) == 0, a, b) for a, b in (pairs[:2], pairs[2:]))
        pair = ptx.select((g & 2) == 0, low, high)
        return [pair & 0xFFFF, pair >> 16]

    def multiply(
        self, slot: Int, parity: Int, steps: Int, scaling: list[Scaling], count: int = 0
    ) -> tuple[list[Any], tuple[Int, Int]]:
        """y^T of one or more units: sums over `steps` steps from this slot on, each `depth` slots behind the one before it;
        and the slot behind them.

        Args:
          scaling: see `scaling`; of each unit.
          count: sums of a thread, all units; fewer than the plan's where only the first columns are wanted.
        """
        sums, at = self.accumulate(slot, parity, steps, scaling, count)
        return self.whole(sums, scaling), at

    def accumulate(
        self, slot: Int, parity: Int, steps: Int, scaling: list[Scaling], count: int = 0
    ) -> tuple[list[Any], tuple[Int, Int]]:
        """As `multiply`, without what `whole` does."""
        plan = self.plan
        count, depth, height = count or plan.sums, plan.depth, len(scaling)
        zero = [ptx.zero()] * count
        if not self.plan.config.ahead:

            def alone(_: Int, carry: list[Any]) -> list[Any]:
                sums, (slot, parity) = carry[:count], carry[count:]
                if plan.in_turn:
                    ptx.barrier_wait(self.full + slot * 8, parity)
                    ptx.sync_warp()
                    sums = self.step_in_turn(sums, slot, height, scaling)
                else:
                    sums, _ = self.step(sums, self.fetch(slot, parity, scaling[0]), slot, scaling=scaling[0])
                hopper.wgmma_wait(0)
                self.release(slot)
                ptx.sync_warp()
                return [*sums, *self.after(slot, parity, depth)]

            out = ptx.loop(0, steps, 1, [*zero, slot, parity], alone)
            return out[:count], (out[count], out[count + 1])

        # Each step is committed in two halves, and the tensor core always has one of them left to do while the first
        # weights of the next step are decoded.
        def flat(ready: dict[str, list[Any]]) -> list[Any]:
            return [*ready["a"], *ready["words"], *ptx.chain(*ptx.chain(*ready["params"]))]

        def turn(sums: list[Any], ready: Any, slot: Int, parity: Int, before: Int | None) -> list[Any]:
            following = self.after(slot, parity, depth)
            sums, fetched = self.step(sums, ready, slot, before, following, scaling[0])
            hopper.wgmma_wait(1)
            fetched = fetched or self.fetch(*following, scaling[0])
            first = self.first_fragment(fetched, scaling[0])
            return [*sums, *flat({"a": first, **fetched}), *following, slot]

        ready = self.fetch(slot, parity, scaling[0])
        ready["a"] = self.first_fragment(ready, scaling[0])

        def unflat(values: list[Any]) -> dict[str, list[Any]]:
            it = iter(values)
            parts = {key: [next(it) for _ in ready[key]] for key in ("a", "words")}
            parts["params"] = [[[next(it) for _ in one] for one in group] for group in ready["params"]]
            return parts

        def body(_: Int, carry: list[Any]) -> list[Any]:
            return turn(carry[:count], unflat(carry[count:-3]), *carry[-3:])

        values = turn(zero, ready, slot, parity, None)
        values = ptx.loop(1, steps - 1, 1, values, body)
        slot, parity, before = values[-3:]
        sums, _ = self.step(values[:count], unflat(values[count:-3]), slot, before, scaling=scaling[0])
        hopper.wgmma_wait(0)
        self.release(slot)
        ptx.sync_warp()
        return sums, self.after(slot, parity, depth)

    def whole(self, sums: list[Any], scaling: list[Scaling]) -> list[Any]:
        """The sums of all units, times what the decode has divided by."""
        size = len(sums) // len(scaling)
        parts = (sums[u * size : (u + 1) * size] for u in range(len(scaling)))
        gain = ptx.constant(self.plan.gain)
        scaled = (one.whole(part) if one else [ptx.mul(s, gain) for s in part] for one, part in zip(scaling, parts))
        return ptx.chain(*scaled) if self.plan.gain != 1 or scaling[0] else sums
