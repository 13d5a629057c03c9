"""Nested scales in the wgmma kernel: decoded where a step's parameters are read, once for all its k16 steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.decode import DECODES
from pallas_kernels.form import NESTED_BLOCK, ROWS, Form
from pallas_kernels.ptx import Int
from pallas_kernels.skeletons.nested import Nested, one_of


class NestedScales:
    """Those of a lane's rows g and g + 8 of one unit; what `Powers` is for scales inside of the decode's arithmetic."""

    def __init__(self, nested: Nested, row: Int, pairs: Any):
        """Args:
        row: row g of the weight.
        pairs: the codebook's table.
        """
        self.nested, self.plan, self.pairs = nested, nested.plan, pairs
        groups = self.plan.form.groups(self.plan.k)
        self.firsts = [(row + half) * groups for half in (0, ROWS // 2)]  # codes of the rows
        blocks = 1 if self.plan.nested_by_row else 2
        few = groups <= NESTED_BLOCK
        self.of_rows = [nested.over(first, groups, blocks) for first in self.firsts] if few else []

    def seconds(self, group: Int) -> list[ir.Value]:
        """Second-level scales of a group, in registers where a row has no more than two."""
        if self.of_rows:
            return [one_of(found, group) for found in self.of_rows]
        return [self.nested.load(self.nested.block(first + group)) for first in self.firsts]

    def of_step(self, first: Int, pairs: Sequence[Int]) -> list[list[ir.Value]]:
        """Scales of the groups of a step, each in both halves of a register.

        Args:
          first: the first of these groups.
          pairs: their codes, those of both rows in one register.
        """
        groups, count, out = self.plan.form.groups(self.plan.k), len(pairs), []
        one_block = NESTED_BLOCK % count == 0 == groups % count
        for g, pair in enumerate(pairs):
            if not (g and one_block):
                seconds = self.seconds(first + g)
            out.append([ptx.pack_pair(s, s, self.plan.dtype) for s in self.nested.floats(pair, seconds)])
        return out

    def fragment(self, form: Form, words: Sequence[ir.Value], params: Sequence) -> list[ir.Value]:
        return self.scaled(DECODES[form.decode].fragment(form, self.plan.dtype, words, None, self.pairs), params)

    def scaled(self, values: Sequence[ir.Value], params: Sequence) -> list[ir.Value]:
        return [ptx.mul_pair(v, params[0][i % 2], self.plan.dtype) for i, v in enumerate(values)]

    def whole(self, sums: list[Any]) -> list[Any]:
        return sums
