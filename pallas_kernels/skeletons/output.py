"""Sums of 8 x 8 outputs in a warp -> y: the decode's unit, bias, rounding, store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.ptx import Int


class Writer:
    """What kernels of few rows have in common. They say `plan`, `pointers` and `lane`."""

    plan: Any
    pointers: dict[str, ir.Value]
    lane: Int

    def put_pairs(self, n: Int, m: Int, totals: Sequence[ir.Value]) -> None:
        """8 rows of the weight from n by 8 rows of x from m: the warp turns the square, two neighbours in N a lane."""
        plan = self.plan
        g, t = self.lane >> 2, self.lane & 3
        totals = [self.biased(ptx.select(n < plan.n, n + g, 0), v) for v in totals]
        pair = ptx.transpose_pairs(ptx.pack_pair(totals[0], totals[1], plan.dtype))
        inside = ptx.select(n < plan.n, 1, 0) & ptx.select(m + g < plan.m, 1, 0)  # N is a multiple of 8
        with ptx.when(inside == 1):
            ptx.store_words(ptx.address(self.pointers["y"], (m + g) * plan.n + n + t * 2, 2), [pair])
        ptx.sync_warp()

    def biased(self, n: Int, total: ir.Value) -> ir.Value:
        """A sum of products with row n of the weight as the product."""
        gain = self.plan.gain
        if "bias" in self.pointers:
            bias = ptx.load_global(ptx.address(self.pointers["bias"], n, 4), "f32")
            return ptx.fma(total, ptx.constant(gain), bias)
        return total if gain == 1 else ptx.mul(total, ptx.constant(gain))
