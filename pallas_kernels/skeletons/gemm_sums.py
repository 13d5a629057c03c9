"""The main loop of a warpgroup: packed codes -> scaled 16-bit floats in registers -> wgmma with x in shared memory."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import hopper, ptx
from pallas_kernels.decode.scaled import scaled_fragment
from pallas_kernels.form import CHUNK, ITEM_BYTES, ROWS
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.gemm_block import Block
from pallas_kernels.skeletons.gemm_plan import UNIT
from pallas_kernels.skeletons.plan import tile_words


class Sums(Block):
    """Accumulates y^T of one unit of 64 rows."""

    def skip(self, slot: Int, parity: Int, count: Int) -> list[Int]:
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

        return ptx.loop(0, count, 1, [slot, parity], step)

    def words(self, slot: Int, chunk: int, unit: Int) -> list[ir.Value]:
        """This thread's codes of a tile of 64 along K, from shared memory."""
        plan, form = self.plan, self.plan.form
        at = self.at["codes"] + slot * plan.code_bytes + self.lane * 16
        tile = unit * (UNIT // ROWS) + (self.warp & 3)
        return tile_words(form, at + (tile * plan.config.chunks + chunk) * form.chunk_bytes)

    def params(self, slot: Int, unit: Int) -> list[Any]:
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
        return params

    def magic(self) -> Any:
        """The constant of the decode, read anew: see `multiply`."""
        pinned = self.plan.config.ahead and self.plan.form.kind == "affine"
        return hopper.load_shared_here(self.at["magic"]) if pinned else None

    def fragment(self, i: int, words: list[Any], params: list[Any], magic: Any = None) -> list[ir.Value]:
        """Weights of k16 step i of a step of the ring, whose codes are `words`."""
        plan, form = self.plan, self.plan.form
        group = i * 16 // form.group if form.group and form.group < plan.span else 0
        table = self.at["tables"] + self.lane * 4
        return scaled_fragment(form, plan.dtype, words, params[group], table, magic)

    def fetch(self, slot: Int, parity: Int) -> dict[str, list[Any]]:
        """This thread's codes and parameters of a step, once they are there."""
        ptx.barrier_wait(self.full + slot * 8, parity)
        ptx.sync_warp()
        words = ptx.chain(*(self.words(slot, i, self.unit) for i in range(self.plan.config.chunks)))
        return {"words": words, "params": self.params(slot, self.unit)}

    def first_fragment(self, ready: dict[str, list[Any]]) -> list[ir.Value]:
        return self.fragment(0, ready["words"][: self.plan.form.bits // 4], ready["params"], self.magic())

    def step(
        self, sums: list[Any], ready: dict[str, list[Any]], slot: Int, before: Int | None = None, after: Any = None
    ) -> tuple[list[Any], Any]:
        """Issues the wgmmas of a step.

        Args:
          ready: codes and parameters, and "a", the weights of the first wgmma, if they are decoded already.
          before: the slot of the step before it, to release once the tensor core has read it.
          after: slot and parity of the next step.

        Returns:
          The sums, and the codes and parameters of the next step if the plan wants them before the last wgmma.
        """
        plan = self.plan
        count = 4 * plan.config.chunks
        part = min(count // 2, 4)
        x = self.at["x"] + slot * plan.x_bytes
        words, params = ready["words"], ready["params"]
        per = plan.form.bits // 4  # words of a k16 step
        a = ready.get("a") or self.first_fragment(ready)
        magic, following = [None, self.magic()], None
        for i in range(count):
            if after is not None and i == count - 1 and plan.fetch_early:
                following = self.fetch(*after)
            if i:
                a = self.fragment(i, words[i * per : (i + 1) * per], params, magic[i])
            if i % 4 == 0:
                b = hopper.matrix_descriptor(x + (i // 4) * (plan.config.tile_m * CHUNK * 2))
            hopper.wgmma_fence()
            sums = hopper.wgmma(sums, a, hopper.advance(b, 32 * (i % 4)) if i % 4 else b, plan.dtype)
            magic.append(self.magic() if i + 2 < count else None)
            if plan.config.ahead and (i + 1) % part == 0 and i + 1 < count:
                hopper.wgmma_commit()
                hopper.wgmma_wait(1)
                if before is not None and i + 1 == part:
                    self.release(before)
                    ptx.sync_warp()
        hopper.wgmma_commit()
        return sums, following

    def step_in_turn(self, sums: list[Any], slot: Int, height: int) -> list[Any]:
        """As `step`, for `height` units and with fewer registers: each chunk is read while the one before is multiplied.

        Args:
          sums: those of all units, one after the other.
        """
        plan, c = self.plan, self.plan.config
        x, per = self.at["x"] + slot * plan.x_bytes, plan.form.bits // 4
        order = [(u, chunk) for u in range(height) for chunk in range(c.chunks)]
        parts = [sums[u * plan.sums : (u + 1) * plan.sums] for u in range(height)]
        words, params = self.words(slot, 0, self.unit), self.params(slot, self.unit)
        for at, (u, chunk) in enumerate(order):
            now = words, params
            if at + 1 < len(order):
                v, following = order[at + 1]
                words = self.words(slot, following, self.unit + v * c.wn)
                params = self.params(slot, self.unit + v * c.wn) if v != u else params
            b = hopper.matrix_descriptor(x + chunk * (c.tile_m * CHUNK * 2))
            for i in range(4):
                a = self.fragment(4 * chunk + i, now[0][i * per : (i + 1) * per], now[1])
                hopper.wgmma_fence()
                parts[u] = hopper.wgmma(parts[u], a, hopper.advance(b, 32 * i) if i else b, plan.dtype)
                if (i + 1) % plan.burst == 0:
                    hopper.wgmma_commit()
                    if i < 3 or at + 1 < len(order):
                        hopper.wgmma_wait(1)
        return ptx.chain(*parts)

    def multiply(self, slot: Int, parity: Int, steps: Int, height: int = 1) -> tuple[list[Any], list[Int]]:
        """y^T of `height` units: sums over `steps` steps from this slot on, each `depth` slots behind the one before it;
        and the slot behind them.
        """
        count, depth = height * self.plan.sums, self.plan.depth
        zero = [ptx.zero()] * count
        if not self.plan.config.ahead:

            def alone(_: Int, carry: list[Any]) -> list[Any]:
                sums, (slot, parity) = carry[:count], carry[count:]
                if self.plan.in_turn:
                    ptx.barrier_wait(self.full + slot * 8, parity)
                    ptx.sync_warp()
                    sums = self.step_in_turn(sums, slot, height)
                else:
                    sums, _ = self.step(sums, self.fetch(slot, parity), slot)
                hopper.wgmma_wait(0)
                self.release(slot)
                ptx.sync_warp()
                return [*sums, *self.after(slot, parity, depth)]

            out = ptx.loop(0, steps, 1, [*zero, slot, parity], alone)
            return out[:count], out[count:]

        # Each step is committed in two halves, and the tensor core always has one of them left to do while the first
        # weights of the next step are decoded.
        def flat(ready: dict[str, list[Any]]) -> list[Any]:
            return [*ready["a"], *ready["words"], *ptx.chain(*ptx.chain(*ready["params"]))]

        def turn(sums: list[Any], ready: Any, slot: Int, parity: Int, before: Int | None) -> list[Any]:
            following = self.after(slot, parity, depth)
            sums, fetched = self.step(sums, ready, slot, before, following)
            hopper.wgmma_wait(1)
            fetched = fetched or self.fetch(*following)
            first = self.first_fragment(fetched)
            return [*sums, *flat({"a": first, **fetched}), *following, slot]

        ready = self.fetch(slot, parity)
        ready["a"] = self.first_fragment(ready)

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
        sums, _ = self.step(values[:count], unflat(values[count:-3]), slot, before)
        hopper.wgmma_wait(0)
        self.release(slot)
        ptx.sync_warp()
        return sums, list(self.after(slot, parity, depth))
