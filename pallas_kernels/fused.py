"""Products of one or two rows whose input is made inside the kernel: residual + RMS norm, or activation(gate) * up.

Between the products of a decode step stand vectors of a few kilobytes; a kernel for each costs about two microseconds
of launch and latency, a tenth of the next product's time. Here every block of the streaming kernel makes the vector
again for itself, in shared memory, while the first pieces of the weight are on their way: the step's launches are its
products and its attention, nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.form import CHUNK, ROWS, Packed
from pallas_kernels.launch import launch, pointers
from pallas_kernels.prologue import Gate, Gated, Made, Norm, Normed, activate, worthwhile
from pallas_kernels.ptx import Int
from pallas_kernels.select import Choice, choose, device_key
from pallas_kernels.skeletons import stream
from pallas_kernels.skeletons.stream_inputs import Inputs
from pallas_kernels.skeletons.stream_plan import MULTIPROCESSORS, Config, Plan
from pallas_kernels.skeletons.stream_sums import Sums

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
MAX_ROWS = 2
RING = 96 * 1024  # bytes on their way to a multiprocessor
EARLY = 8  # vectors of a thread
SCRATCH = 256  # bytes behind the kernel's own: a float of each warp and row


def choice_for(prologue: Norm | Gate, m: int, w: Packed) -> Choice | None:
    """The configuration of the fused kernel, None where it does not pay or does not fit."""
    n, k = w.shape
    if w.perm is not None or w.stacked or k % CHUNK or n % 8 or m > MAX_ROWS:
        return None
    device = jax.devices()[0]
    cores = getattr(device, "core_count", None) or 132
    choice = choose(m, n, k, w.form, device_key(device.device_kind), cores, kernels=("stream", "gemm"))
    if choice.kernel != "stream":
        return None
    if not worthwhile(prologue, m, k, choice.config.cluster):
        return None
    # the weight's copies that leave ahead must last as long as x is made: more of them than where x is only copied
    per = -(-choice.config.blocks // MULTIPROCESSORS)
    config = dataclasses.replace(
        choice.config,
        chunks=max(32 // w.form.bits, choice.config.chunks),
        ring_bytes=max(RING // per, choice.config.ring_bytes),
    )
    return None if Plan(m, n, k, w.form, config, "bf16").reason() else dataclasses.replace(choice, config=config)


def gated_choice(prologue: Norm, m: int, w: Packed) -> Choice | None:
    """The configuration of a product [gate | up] with the gate behind it, None where there is none."""
    choice = choice_for(prologue, m, w)
    if choice is None or m > 1 or choice.config.cluster > 1 or w.form.scale == "u8" or w.shape[0] % (2 * ROWS):
        return None
    # strips of two tiles are long copies already: fewer and larger blocks (22.8 us at 28672x4096, 24.1 as without a gate)
    config = dataclasses.replace(
        choice.config,
        height=2,
        chunks=max(1, choice.config.chunks // 2),
        warps=8,
        blocks=choice.config.blocks // -(-choice.config.blocks // MULTIPROCESSORS),
        ring_bytes=RING,
    )
    plan = Plan(m, *w.shape, w.form, config, "bf16")
    return None if plan.reason() else dataclasses.replace(choice, config=config)


@functools.partial(jax.jit, static_argnames=("prologue", "config", "epilogue"))
def matmul(
    a: jax.Array,
    w: Packed,
    b: jax.Array | None = None,
    norm: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    prologue: Norm | Gate,
    config: Config,
    epilogue: Gate | None = None,
) -> tuple[jax.Array, ...]:
    """(x @ w.T (+ bias),), and a + b behind it where `prologue` is a `Norm` that adds.

    Args:
      a: [M, K] of a 16-bit dtype, [M, 2 K] for a `Gate`.
      b, norm: [M, K] and [K] of the same dtype, for a `Norm`.
      bias: [N] float32.
      epilogue: the product is [gate | up]; the result is activation(gate) * up, [M, N / 2]. See `gated_choice`.
    """
    inputs = {name: value for name, value in (("a", a), ("b", b), ("norm", norm)) if value is not None}
    m, k = a.shape
    return _launch(prologue, epilogue, inputs, (m, k // 2 if isinstance(prologue, Gate) else k), w, config, bias)


def _launch(
    prologue: Norm | Gate,
    epilogue: Gate | None,
    inputs: dict[str, jax.Array],
    shape: tuple[int, int],
    w: Packed,
    config: Config,
    bias: jax.Array | None,
) -> tuple[jax.Array, ...]:
    (m, k), (n, _) = shape, w.shape
    dtype = inputs["a"].dtype
    plan = Plan(m, n, k, w.form, config, DTYPES[str(dtype)])
    arrays = dict(inputs) | {"codes": w.codes, "scales": w.scales}
    optional = {"zeros": w.zeros, "bias": bias, **w.tables}
    arrays |= {name: a.reshape(1) if a.ndim == 0 else a for name, a in optional.items() if a is not None}
    out = {"y": jax.ShapeDtypeStruct((m, n if epilogue is None else n // 2), dtype)}
    if isinstance(prologue, Norm) and prologue.adds:
        out["total"] = jax.ShapeDtypeStruct((m, k), dtype)

    def emit(_: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        _Kernel(plan, pointers(refs), shared, prologue, epilogue).run()

    name = f"{type(prologue).__name__.lower()}_matmul"
    size = {"clusters": plan.clusters, "cluster": config.cluster, "warps": config.warps}
    return launch(emit, name, arrays, out, shared_bytes=plan.layout["bytes"] + SCRATCH, **size)


class _Kernel(stream._Kernel):
    """The streaming kernel with x made in place of copied, and perhaps a gate behind the product."""

    def __init__(
        self,
        plan: Plan,
        pointers: dict[str, ir.Value],
        shared: Int,
        prologue: Norm | Gate,
        epilogue: Gate | None,
    ) -> None:
        super().__init__(plan, pointers, shared)
        maker = _NormedInputs if isinstance(prologue, Norm) else _GatedInputs
        self.inputs = maker(plan, pointers, shared, self.inputs.bars, self.thread, self.rank, prologue)
        self.epilogue = epilogue
        if epilogue is not None:
            bars = shared + plan.layout["barriers"] + plan.config.warps * plan.stages * 8
            self.sums = _GatedSums(plan, pointers, shared, bars, self.thread, self.rank)
            self.sums.gate = epilogue

    def row_of(self, strip: Int, i: int) -> Int:
        """Tile i of a strip of the cluster. With a gate the two are those of the same rows of gate and up."""
        first = self.first_strip + strip * self.plan.clusters
        return first * self.plan.height + i if self.epilogue is None else first + i * self.plan.strips


class _Inputs(Inputs, Made):
    """x of a block, made by all its threads."""

    def __init__(
        self, plan: Plan, pointers: dict[str, ir.Value], shared: Int, bars: Int, thread: Int, rank: Int, prologue: Any
    ) -> None:
        super().__init__(plan, pointers, shared, bars, thread, rank)
        self.prologue, self.warps, self.threads = prologue, plan.config.warps, plan.config.warps * 32
        self.m, self.k, self.dtype, self.leader = plan.m, plan.k, plan.dtype, self.lane == 0
        self.first, self.stop, self.most = self.begin, self.end, plan.block_chunks * CHUNK
        self.scratch = shared + plan.layout["bytes"]
        cluster = ptx.special("clusterid.x") if plan.config.cluster > 1 else ptx.special("ctaid.x")
        self.writes_total = ptx.select(cluster == 0, 1, 0) & ptx.select(rank == 0, 1, 0)

    def copy(self) -> None:
        """Loads ahead of most of the weight's: behind a whole ring they would be the last to arrive."""
        self.early = self.load(range(min(EARLY, self.rounds)))

    def pad(self) -> None:
        self.make(self.early + self.load(range(len(self.early), self.rounds)))

    def wait(self) -> None:
        """The barrier of the block behind `pad` is enough."""

    def put(self, row: int, element: Int, values: list[ir.Value]) -> None:
        """Eight inputs to their place in shared memory, if this block multiplies them."""
        inside = ptx.select(element < self.first, 0, 1) & ptx.select(element < self.stop, 1, 0)
        with ptx.when(inside == 1):
            ptx.store_shared(self.x + row * self.plan.x_pitch + (element - self.first) * 2, self.rounded(values))


class _NormedInputs(_Inputs, Normed):
    pass


class _GatedInputs(_Inputs, Gated):
    pass


class _GatedSums(Sums):
    """Strips of two tiles, the same rows of gate and up: a lane has both sums of an output, for one row of x."""

    gate: Gate

    def send(self, turn: Int, strip: Int, sums: Sequence[ir.Value]) -> None:
        del turn
        self.write_gated(strip, sums)

    def finish_loose(self) -> None:
        plan, c = self.plan, self.plan.config
        ptx.barrier_wait(self.loose_bar, 0)
        ptx.sync_warp()

        def item(j: Int, carry: list[Any]) -> list[Any]:
            at = self.loose_place(j, 0, 0) + self.place * 8

            def part(p: Int, totals: list[Any]) -> list[Any]:
                here = at + p * plan.strip_bytes
                values = ptx.load_shared(here, "f32", 2) + ptx.load_shared(here + plan.lanes * 8, "f32", 2)
                return [ptx.add(t, v) for t, v in zip(totals, values, strict=True)]

            totals = ptx.loop(0, self.sharers(j), 1, [ptx.zero()] * 4, part)
            ptx.sync_warp()
            self.write_gated(j, totals)
            return carry

        ptx.loop(c.warps - 1 - self.warp, self.strips, c.warps, [], item)
        ptx.sync_warp()

    def write_gated(self, strip: Int, sums: Sequence[ir.Value]) -> None:
        """Sums of gate for rows g and g + 8, and of up."""
        plan, dtype = self.plan, self.plan.dtype
        for e in (0, 1):
            n = (self.cluster_first + strip * plan.clusters) * ROWS + (self.lane >> 2) + 8 * e
            with ptx.when(self.holds):
                pair = ptx.pack_pair(self.biased(n, sums[e]), self.biased(n + plan.n // 2, sums[2 + e]), dtype)
                gate, up = ptx.unpack_pair(pair, dtype)
                active = ptx.unpack_pair(ptx.pack_pair(activate(self.gate, gate), up, dtype), dtype)[0]
                ptx.store_rounded(ptx.address(self.pointers["y"], n, 2), ptx.mul(active, up), dtype)
        ptx.sync_warp()
