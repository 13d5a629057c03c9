"""Vectors that a kernel makes for itself: residual + RMS norm, activation(gate) * up, or a copy.

Mixins of kernels: a class that has them says which threads work (`thread`, `threads`, `lane`, `warp`, `leader`), where
the inputs are (`pointers`), what is static (`m`, `k`, `dtype`, `warps`), and takes the results (`put`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.ptx import Int

VECTOR = 8  # elements of one load


@dataclasses.dataclass(frozen=True)
class Norm:
    """x = rms_norm(a + b) * (weight + offset), rounded as `jq.nn.RMSNorm` rounds; the sum a + b is a second result."""

    eps: float
    offset: float = 0.0
    adds: bool = True


@dataclasses.dataclass(frozen=True)
class Gate:
    """x = activation(gate) * up of an array [gate | up]; activation: "silu" or "gelu_tanh"."""

    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class Plain:
    """x as it comes."""


def worthwhile(prologue: Norm | Gate | Plain, m: int, k: int, share: int = 1) -> bool:
    """Whether each block should make x [m, k] for itself; `share`: blocks that split K between them.

    Measured on an H100: the norm of 4096 values costs 0.7 us behind the weight's first copies, the gate of 14336 values
    1.3 us; kernels of their own cost 2 us each, with the launch.
    """
    if isinstance(prologue, Plain):
        return m * k <= 65536
    return m * k // (1 if isinstance(prologue, Norm) else share) <= 16384


def activate(gate: Gate, x: ir.Value) -> ir.Value:
    """x * sigmoid(x), or gelu's tanh form, which is x * sigmoid(1.5957691 x + 0.0713548 x^3)."""
    half = ptx.mul(x, ptx.constant(0.5))
    inner = half
    if gate.activation == "gelu_tanh":
        inner = ptx.mul(x, ptx.fma(ptx.mul(x, x), ptx.constant(0.03567740814), ptx.constant(0.7978845608)))
    return ptx.fma(half, ptx.tanh(inner), half)  # sigmoid(2 y) = (1 + tanh(y)) / 2


class Made:
    """What all share. `first` and `stop`: the range of K that is wanted (all of it is read for a norm)."""

    prologue: Any
    pointers: dict[str, ir.Value]
    thread: Int
    warp: Int
    leader: ir.Value
    threads: int
    warps: int
    m: int
    k: int
    dtype: str
    scratch: Int  # shared memory for a float of each warp and row, free while the vector is made
    first: Int
    stop: Int
    most: int  # of stop - first
    writes_total: Int  # 1 in the threads that write the sum a + b

    @property
    def rounds(self) -> int:
        """Vectors of a thread."""
        raise NotImplementedError

    def load(self, rounds: Iterable[int]) -> list[Any]:
        """The inputs of these vectors."""
        raise NotImplementedError

    def make(self, loaded: list[Any]) -> None:
        """All vectors, given to `put`."""
        raise NotImplementedError

    def put(self, row: int, element: Int, values: list[ir.Value]) -> None:
        """Takes eight values, float32; may come twice with the same."""
        raise NotImplementedError

    def words(self, name: str, element: Int, row: int = 0, width: int = 0) -> list[ir.Value]:
        """Eight elements of an input."""
        return ptx.load_words(ptx.address(self.pointers[name], element + row * width, 2))

    def floats(self, words: list[ir.Value]) -> list[ir.Value]:
        return [x for word in words for x in ptx.unpack_pair(word, self.dtype)]

    def rounded(self, values: list[ir.Value]) -> list[ir.Value]:
        """float32 values as words of two."""
        pairs = zip(values[::2], values[1::2], strict=True)
        return [ptx.pack_pair(low, high, self.dtype) for low, high in pairs]

    def round(self, values: list[ir.Value]) -> list[ir.Value]:
        return self.floats(self.rounded(values))


class Normed(Made):
    @property
    def rounds(self) -> int:
        return -(-self.k // (VECTOR * self.threads))

    def element(self, i: int) -> Int:
        """First element of this thread's vector i; beyond the end the last one again."""
        at = (self.thread + i * self.threads) * VECTOR
        return ptx.select(at < self.k, at, self.k - VECTOR)

    def load(self, rounds: Iterable[int]) -> list[Any]:
        out: list[Any] = []
        for i in rounds:
            at = self.element(i)
            names = ("a", "b") if self.prologue.adds else ("a",)
            rows = [[self.words(name, at, row, self.k) for name in names] for row in range(self.m)]
            out.append((i, rows, self.words("norm", at)))
        return out

    def make(self, loaded: list[Any]) -> None:
        sums: list[list[ir.Value]] = []  # a row's vectors, rounded, one after the other
        for row in range(self.m):
            vectors = []
            for _, rows, _ in loaded:
                parts = [self.floats(words) for words in rows[row]]
                total = [ptx.add(*pair) for pair in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]
                vectors.append(self.round(total))
            sums.append(vectors)
        factors = [self.factor(row, sums[row]) for row in range(self.m)]
        for v, (i, _, norm) in enumerate(loaded):
            at, gain = self.element(i), self.floats(norm)
            exists = ptx.select((self.thread + i * self.threads) * VECTOR < self.k, 1, 0)
            for row in range(self.m):
                scaled = [ptx.mul(x, factors[row]) for x in sums[row][v]]
                if self.prologue.offset:
                    gains = [ptx.add(g, ptx.constant(self.prologue.offset)) for g in gain]
                else:
                    scaled, gains = self.round(scaled), gain
                self.put(row, at, [ptx.mul(x, g) for x, g in zip(scaled, gains, strict=True)])
                if self.prologue.adds:
                    with ptx.when((self.writes_total & exists) == 1):
                        to = ptx.address(self.pointers["total"], at + row * self.k, 2)
                        ptx.store_words(to, self.rounded(sums[row][v]))

    def factor(self, row: int, vectors: list[list[ir.Value]]) -> ir.Value:
        """1 / sqrt(mean of squares + eps) of a row, by all threads."""
        total = ptx.zero()
        for i, vector in enumerate(vectors):
            exists = (self.thread + i * self.threads) * VECTOR < self.k
            for x in vector:
                total = ptx.select_float(exists, ptx.fma(x, x, total), total)
        for mask in (1, 2, 4, 8, 16):
            total = ptx.add(total, ptx.shuffle_xor(total, mask))
        warps, at = self.warps, self.scratch + row * (self.warps * 4)
        with ptx.when(self.leader):
            ptx.store_shared(at + self.warp * 4, [total])
        ptx.sync_warp()
        ptx.sync_block()
        whole = ptx.zero()
        for first in range(0, warps, 4):
            for part in ptx.load_shared(at + first * 4, "f32", 4):
                whole = ptx.add(whole, part)
        return ptx.rsqrt(ptx.fma(whole, ptx.constant(1.0 / self.k), ptx.constant(self.prologue.eps)))


class Ranged(Made):
    """Vectors of the wanted range alone."""

    @property
    def rounds(self) -> int:
        return -(-self.most // (VECTOR * self.threads))

    def element(self, i: int) -> Int:
        """First element of this thread's vector i; beyond the end the last one again."""
        at = self.first + (self.thread + i * self.threads) * VECTOR
        return ptx.select(at < self.stop, at, self.stop - VECTOR)


class Copied(Ranged):
    def load(self, rounds: Iterable[int]) -> list[Any]:
        return [(i, [self.words("a", self.element(i), row, self.k) for row in range(self.m)]) for i in rounds]

    def make(self, loaded: list[Any]) -> None:
        for i, rows in loaded:
            for row, words in enumerate(rows):
                self.put(row, self.element(i), self.floats(words))


class Gated(Ranged):
    def load(self, rounds: Iterable[int]) -> list[Any]:
        k = self.k
        out: list[Any] = []
        for i in rounds:
            at = self.element(i)
            rows = range(self.m)
            out.append((i, [(self.words("a", at, r, 2 * k), self.words("a", at + k, r, 2 * k)) for r in rows]))
        return out

    def make(self, loaded: list[Any]) -> None:
        for i, rows in loaded:
            for row, (gate, up) in enumerate(rows):
                active = self.round([activate(self.prologue, x) for x in self.floats(gate)])
                self.put(row, self.element(i), [ptx.mul(x, y) for x, y in zip(active, self.floats(up), strict=True)])
