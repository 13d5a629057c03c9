"""Vectors of a decode step in one launch each, for products that do not make them: residual + norm, gate * up."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.launch import launch, pointers
from pallas_kernels.prologue import VECTOR, Gate, Gated, Norm, Normed
from pallas_kernels.ptx import Int

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
SPAN = 128 * VECTOR  # elements of a block of `gate`


def refusal(dtype: Any, k: int) -> str | None:
    """Why the kernel does not take rows of k values, or None."""
    if str(dtype) not in DTYPES:
        return f"rows of {dtype}; the kernel takes bfloat16 and float16"
    return None if k % VECTOR == 0 and k <= 32768 else f"rows of {k} values"


@functools.partial(jax.jit, static_argnames="prologue")
def add_norm(a: jax.Array, b: jax.Array, weight: jax.Array, *, prologue: Norm) -> tuple[jax.Array, jax.Array]:
    """(rms_norm(a + b) * weight, a + b) of a, b [M, K] and weight [K], all of one 16-bit dtype."""
    m, k = a.shape
    warps = max(4, min(32, -(-k // (VECTOR * 32 * 4)) * 4))

    def emit(_: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        row = _Row(k, DTYPES[str(a.dtype)], warps, pointers(refs), shared, prologue)
        row.make(row.load(range(row.rounds)))

    out = jax.ShapeDtypeStruct((m, k), a.dtype)
    arrays = {"a": a, "b": b, "norm": weight}
    return launch(emit, "add_norm", arrays, {"y": out, "total": out}, clusters=m, warps=warps, shared_bytes=128)


@functools.partial(jax.jit, static_argnames="prologue")
def gate(a: jax.Array, *, prologue: Gate) -> jax.Array:
    """activation(gate) * up of a [M, 2 K], gate first, of a 16-bit dtype; K a multiple of 8."""
    m, k = a.shape[0], a.shape[1] // 2
    spans = -(-k // SPAN)

    def emit(_: Any, refs: dict[str, ir.Value], __: Int) -> None:
        span = _Span(k, spans, DTYPES[str(a.dtype)], pointers(refs), prologue)
        span.make(span.load(range(span.rounds)))

    out = {"y": jax.ShapeDtypeStruct((m, k), a.dtype)}
    return launch(emit, "gate", {"a": a}, out, clusters=m * spans, warps=4, shared_bytes=128)[0]


class _Span(Gated):
    """One block for SPAN elements of a row."""

    def __init__(self, k: int, spans: int, dtype: str, pointers: dict[str, ir.Value], prologue: Gate) -> None:
        self.m, self.k, self.dtype, self.threads, self.prologue = 1, k, dtype, 128, prologue
        self.thread, unit = ptx.special("tid.x"), ptx.special("ctaid.x")
        row, self.first, self.most = unit // spans, unit % spans * SPAN, SPAN
        stop = self.first + SPAN
        self.stop = ptx.select(stop < k, stop, k)
        self.pointers = {
            "a": ptx.address(pointers["a"], row, k * 4),
            "y": ptx.address(pointers["y"], row, k * 2),
        }

    def put(self, row: int, element: Int, values: list[ir.Value]) -> None:
        del row
        ptx.store_words(ptx.address(self.pointers["y"], element, 2), self.rounded(values))


class _Row(Normed):
    """One block a row."""

    def __init__(
        self, k: int, dtype: str, warps: int, pointers: dict[str, ir.Value], shared: Int, prologue: Norm
    ) -> None:
        self.m, self.k, self.dtype, self.warps, self.threads = 1, k, dtype, warps, warps * 32
        self.prologue, self.scratch, self.writes_total = prologue, shared, Int(1)
        self.thread, row = ptx.special("tid.x"), ptx.special("ctaid.x")
        self.warp, self.leader = self.thread >> 5, (self.thread & 31) == 0
        rows = {name: ptx.address(pointers[name], row, k * 2) for name in ("a", "b", "y", "total")}
        self.pointers = rows | {"norm": pointers["norm"]}

    def put(self, row: int, element: Int, values: list[ir.Value]) -> None:
        del row
        ptx.store_words(ptx.address(self.pointers["y"], element, 2), self.rounded(values))
