"""Nested scales in the kernels: scale = table2[code] * absmax2[block of 256 codes] + offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import NESTED_BLOCK
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.plan import Launch


class Nested:
    """Emits what a block needs of them; `entries` of the table are read ahead of `write`, for other work in between."""

    def __init__(self, plan: Launch, pointers: dict[str, Any], table: Int | None, thread: Int, threads: int):
        """Args:
        table: address in shared memory of the table of scales; None: it is looked up where it lies, through the cache.
        thread, threads: index and number of the threads that fill it.
        """
        self.plan, self.pointers, self.table = plan, pointers, table
        self.thread, self.threads = thread, threads
        self.last = plan.n * plan.form.groups(plan.k) - 1  # code: behind it are rows of padding

    def read(self) -> list[tuple[Int, ir.Value]]:
        """This thread's entries of the table of scales, for `write` when they have come."""
        self.offset = ptx.load_global(self.pointers["offset"], "f32")
        out = []
        for first in range(0, 256, self.threads):
            i = (self.thread + first) & 255
            out.append((i, ptx.load_global(ptx.address(self.pointers["table2"], i, 4), "f32")))
        return out

    def prefetch(self) -> None:
        """In place of `read` and `write`, where the table is looked up where it lies: asks for it to be brought into L2."""
        self.offset = _load(self.pointers["offset"])
        with ptx.when(self.thread < 32):
            ptx.prefetch(ptx.address(self.pointers["table2"], self.thread, 32))
        ptx.sync_warp()

    def write(self, entries: Sequence[tuple[Int, ir.Value]]) -> None:
        for i, value in entries:
            ptx.store_shared(self.table + i * 4, [value])

    def block(self, code: Int) -> Int:
        """Number of the block of a code, the last one's where there is no such code."""
        return ptx.select(code < self.last, code, self.last) // NESTED_BLOCK

    def second(self, block: Int) -> ir.Value:
        """Global address of the second-level scale of a block."""
        return ptx.address(self.pointers["absmax2"], block, 4)

    def load(self, block: Int) -> ir.Value:
        return _load(self.second(block))

    def over(self, first: Int, count: int, blocks: int) -> list[Any]:
        """Second-level scales of `count` codes from `first` on, which touch at most so many blocks, 1 or 2: the scale of
        the first code; and with 2 also that of the last one, and the number of the code from which on it holds.
        """
        block = self.block(first)
        if blocks == 1:
            return [self.load(block)]
        return [self.load(block), self.load(self.block(first + (count - 1))), (block + 1) * NESTED_BLOCK - first]

    def floats(self, pair: Int, seconds: Sequence[ir.Value]) -> list[ir.Value]:
        """Scales of rows g and g + 8 as float32.

        Args:
          pair: their codes.
          seconds: their second-level scales.
        """
        values = [self.value(code) for code in (pair & 255, pair >> 8)]
        return [ptx.fma(value, second, self.offset) for value, second in zip(values, seconds)]

    def value(self, code: Int) -> ir.Value:
        if self.table is None:
            return _load(ptx.address(self.pointers["table2"], code, 4))
        return ptx.load_shared(self.table + code * 4, "f32")[0]


def _load(pointer: ir.Value) -> ir.Value:
    # plain: as a cached read-only load it would be moved to where its value is used
    return ptx.as_float(Int(ptx.load_words(pointer, 1)[0]))


def one_of(found: Sequence[Any], i: Any) -> ir.Value:
    """The second-level scale of code i of those that `Nested.over` has found."""
    scale, *other = found
    return ptx.select_float(Int(i) < other[1], scale, other[0]) if other else scale
