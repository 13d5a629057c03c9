"""One to eight rows of x times a dense 16-bit weight [N, K] as it is stored, at the speed of the memory.

Weights go from global memory straight to the registers of `mma.sync`: the order of K inside a product is free, so a
lane's 16 bytes of a row are its share of two steps. A block keeps x in shared memory and walks over tiles of 16 rows of
the weight; its warps share K, and while a warp multiplies one piece the next is on its way, across tiles. x can be made
in the kernel (`prologue`). XLA's own kernels for such products split K and add the parts in a second launch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.launch import launch, pointers
from pallas_kernels.prologue import VECTOR, Copied, Gate, Gated, Made, Norm, Normed, Plain, worthwhile
from pallas_kernels.ptx import Int

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
ROWS = 16  # of the weight, in a tile
MAX_ROWS = 8  # of x
SMEM_BYTES = 100 * 1024  # two blocks fit on a multiprocessor


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch: a piece is 32 * `steps` inputs of a tile's 16 rows."""

    m: int
    n: int
    k: int
    dtype: str
    warps: int = 8
    steps: int = 4
    blocks: int = 264

    @property
    def tiles(self) -> int:
        return self.n // ROWS

    @property
    def pieces(self) -> int:
        """Of a warp, in one tile."""
        return self.k // (32 * self.steps * self.warps)

    @property
    def x_pitch(self) -> int:
        """Bytes from row to row of x: 16 over a multiple of 128, for different banks."""
        return self.k * 2 + 16

    @property
    def sums_at(self) -> int:
        return -(-self.m * self.x_pitch // 128) * 128

    @property
    def sum_bytes(self) -> int:
        """Partial sums of a tile by all warps; there are two of them."""
        return self.warps * ROWS * self.m * 4

    @property
    def bytes(self) -> int:
        return self.sums_at + 2 * self.sum_bytes

    def reason(self) -> str | None:
        """Why this launch is not possible, or None."""
        if self.m > MAX_ROWS:
            return f"{self.m} rows of x, at most {MAX_ROWS}"
        if self.n % ROWS or self.k % (32 * self.steps * self.warps):
            return f"a weight of {self.n}x{self.k}"
        if self.bytes > SMEM_BYTES:
            return f"{self.bytes} bytes of shared memory"
        return None


def plan_for(prologue: Norm | Gate | Plain, m: int, n: int, k: int, dtype: Any) -> Plan | None:
    """The launch for x [m, k] and a weight [n, k], None where none fits or pays."""
    if str(dtype) not in DTYPES or not worthwhile(prologue, m, k):
        return None
    multiprocessors = getattr(jax.devices()[0], "core_count", None) or 132
    # One large block on each multiprocessor, 128 KiB on their way; for few tiles more and smaller ones (measured: 4096x4096
    # 13.9 us against 15.2, 28672x4096 78.1 against 80.1).
    few = n // ROWS <= 2 * multiprocessors
    for warps, steps in ((4, 4), (4, 2), (4, 1)) if few else ((8, 8), (8, 4), (8, 2), (4, 4), (8, 1), (4, 2), (4, 1)):
        blocks = multiprocessors * (4 if warps == 4 else 1 if steps == 8 else 2)
        plan = Plan(m, n, k, DTYPES[str(dtype)], warps, steps, blocks)
        if plan.reason() is None:
            return plan
    return None


@functools.partial(jax.jit, static_argnames=("prologue", "plan"))
def matmul(
    a: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    norm: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    prologue: Norm | Gate | Plain,
    plan: Plan,
) -> tuple[jax.Array, ...]:
    """(x @ w.T (+ bias),), and a + b behind it where `prologue` is a `Norm` that adds.

    Args:
      a: [M, K], or [M, 2 K] for a `Gate`.
      w: [N, K] of a's dtype.
      b, norm: [M, K] and [K] for a `Norm`.
      bias: [N] float32.
    """
    arrays = {"a": a, "w": w, "b": b, "norm": norm, "bias": bias}
    given = {name: value for name, value in arrays.items() if value is not None}
    out = {"y": jax.ShapeDtypeStruct((plan.m, plan.n), a.dtype)}
    if isinstance(prologue, Norm) and prologue.adds:
        out["total"] = jax.ShapeDtypeStruct((plan.m, plan.k), a.dtype)
    maker = {Norm: _NormedProduct, Gate: _GatedProduct, Plain: _PlainProduct}[type(prologue)]

    def emit(_: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        maker(plan, pointers(refs), shared, prologue).run()

    blocks = min(plan.blocks, plan.tiles)
    return launch(emit, "dense_matmul", given, out, clusters=blocks, warps=plan.warps, shared_bytes=plan.bytes)


class _Dense(Made):
    """Emits the kernel. Methods run while tracing; attributes are values of one thread of the kernel."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int, prologue: Any):
        self.plan, self.pointers, self.prologue = plan, pointers, prologue
        self.m, self.k, self.dtype, self.warps, self.threads = plan.m, plan.k, plan.dtype, plan.warps, plan.warps * 32
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.leader = self.lane == 0
        self.g, self.t = self.lane >> 2, self.lane & 3
        self.block, self.count = ptx.special("ctaid.x"), min(plan.blocks, plan.tiles)
        self.x, self.sums = shared, shared + plan.sums_at
        self.scratch, self.first, self.stop, self.most = self.sums, Int(0), Int(plan.k), plan.k
        self.writes_total = ptx.select(self.block == 0, 1, 0)
        self.begin = self.warp * (plan.pieces * plan.steps * 32)  # first input of this warp

    def run(self) -> None:
        plan = self.plan
        words = self.piece(self.block, Int(0))
        self.make(self.load(range(self.rounds)))
        ptx.sync_block()
        tiles = (Int(plan.tiles + self.count - 1) - self.block) // self.count
        n_sums = 4 if plan.m > 1 else 2

        def tile(i: Int, words: list[Any]) -> list[Any]:
            row = self.block + i * self.count

            def step(p: Int, carry: list[Any]) -> list[Any]:
                sums, now = carry[:n_sums], carry[n_sums:]
                ptx.sync_warp()
                last = (p + 1) == plan.pieces
                after = self.piece(row + ptx.select(last, self.count, 0), ptx.select(last, 0, p + 1))
                return [*self.multiply(p, sums, now), *after]

            done = ptx.loop(0, plan.pieces, 1, [*([ptx.zero()] * n_sums), *words], step)
            self.reduce(i, row, done[:n_sums])
            return done[n_sums:]

        ptx.loop(0, tiles, 1, words, tile)

    def piece(self, tile: Int, p: Int) -> list[ir.Value]:
        """A lane's words of a piece: 16 bytes of each 64 of rows g and g + 8. Behind the last tile any address does."""
        plan = self.plan
        exists = tile < plan.tiles
        row = ptx.select(exists, tile * ROWS + self.g, 0)
        column = ptx.select(exists, self.begin + p * (plan.steps * 32) + self.t * VECTOR, 0)
        out = []
        for r in (0, 8):
            base = ptx.address(ptx.address(self.pointers["w"], row + r, plan.k * 2), column, 2)
            for j in range(plan.steps):
                out += ptx.load_stream(ptx.address(base, j * 64))
        return out

    def multiply(self, p: Int, sums: list[ir.Value], words: list[ir.Value]) -> list[ir.Value]:
        plan = self.plan
        quads = [words[i : i + 4] for i in range(0, len(words), 4)]
        row = ptx.select(self.g < plan.m, self.g, plan.m - 1)
        at = self.x + row * plan.x_pitch + (self.begin + p * (plan.steps * 32) + self.t * VECTOR) * 2
        four = sums if plan.m > 1 else [sums[0], ptx.zero(), sums[1], ptx.zero()]
        for j in range(plan.steps):
            x, top, low = ptx.load_shared(at + j * 64, "u32", 4), quads[j], quads[plan.steps + j]
            for s in (0, 2):
                four = ptx.mma([top[s], low[s], top[s + 1], low[s + 1]], x[s : s + 2], four, plan.dtype)
        return four if plan.m > 1 else [four[0], four[2]]

    def reduce(self, i: Int, row: Int, sums: list[ir.Value]) -> None:
        """Adds the warps' parts of a tile in order, and writes y."""
        plan = self.plan
        ptx.sync_warp()
        buffer = self.sums + (i & 1) * plan.sum_bytes
        at = buffer + self.warp * (ROWS * plan.m * 4)
        pairs = [(0, 0), (8, 0)] if plan.m == 1 else [(0, 0), (0, 1), (8, 0), (8, 1)]
        for (down, right), value in zip(pairs, sums, strict=True):
            column = self.t * 2 + right
            with ptx.when(column < plan.m):
                ptx.store_shared(at + ((self.g + down) * plan.m + column) * 4, [value])
        ptx.sync_warp()
        ptx.sync_block()
        with ptx.when(self.thread < ROWS * plan.m):
            total = ptx.zero()
            for w in range(plan.warps):
                total = ptx.add(total, ptx.load_shared(buffer + w * (ROWS * plan.m * 4) + self.thread * 4, "f32")[0])
            n, column = row * ROWS + self.thread // plan.m, self.thread % plan.m
            if "bias" in self.pointers:
                total = ptx.add(total, ptx.load_global(ptx.address(self.pointers["bias"], n, 4), "f32"))
            ptx.store_rounded(ptx.address(self.pointers["y"], column * plan.n + n, 2), total, plan.dtype)
        ptx.sync_warp()

    def put(self, row: int, element: Int, values: list[ir.Value]) -> None:
        ptx.store_shared(self.x + row * self.plan.x_pitch + element * 2, self.rounded(values))


class _NormedProduct(_Dense, Normed):
    pass


class _GatedProduct(_Dense, Gated):
    pass


class _PlainProduct(_Dense, Copied):
    pass
