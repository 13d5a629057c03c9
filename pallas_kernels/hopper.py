"""PTX of compute capability 9.0 beyond `ptx`: tensor copies, wgmma, register shares, transposing stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels.ptx import Int, asm, f32, i32, i64, llvm, raw


@dataclasses.dataclass(frozen=True)
class Folded:
    """The last two axes of an array as one, for Mosaic, which asks transforms of arguments for `apply`."""

    def apply(self, ref: ir.Value) -> ir.Value:
        from jax.experimental.mosaic.gpu import utils

        return utils.memref_fold(ref, ir.MemRefType(ref.type).rank - 2, 2)


def tensor_map(
    ctx: Any, ref: ir.Value, box: tuple[int, ...], swizzle: int | None = None, folded: bool = False
) -> ir.Value:
    """64-bit address of a TMA descriptor for boxes of `ref` (a whole kernel argument), made on the host at launch.

    Args:
      folded: the last two axes count as one. (A reshape would be an operation of its own beside the kernel.)
    """
    pointer = ctx._get_tma_desc(ref, (Folded(),) if folded else (), None, box, swizzle, None)
    return llvm.ptrtoint(i64(), pointer)


def tensor_copy(
    target: Int, descriptor: ir.Value, coordinates: Sequence[Any], barrier: Int, ranks: Any = None, policy: Any = None
) -> None:
    """A box from global to shared memory; coordinates from the fastest axis on.

    Args:
      ranks: bit mask of the blocks of the cluster that receive the box (and its bytes on their barrier), or None.
    """
    n = len(coordinates)
    where = ", ".join(f"${i + 3}" for i in range(n))
    text = f"cp.async.bulk.tensor.{n}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    operands: list[Any] = [target, descriptor, barrier, *coordinates]
    tail = ""
    if ranks is not None:
        text += ".multicast::cluster"
        tail += ", mask"
        operands.append(ranks)
    if policy is not None:
        text += ".L2::cache_hint"
        tail += f", ${len(operands)}"
        operands.append(policy)
    line = f"{text} [$0], [$1, {{{where}}}], [$2]{tail};"
    if ranks is not None:
        line = f"{{ .reg .b16 mask; cvt.u16.u32 mask, ${n + 3}; {line} }}"
    asm([], line, *operands)


def tensor_store(descriptor: ir.Value, coordinates: Sequence[Any], source: Int) -> None:
    """A box from shared to global memory; what lies outside the array is not written."""
    n = len(coordinates)
    where = ", ".join(f"${i + 2}" for i in range(n))
    asm(
        [],
        f"cp.async.bulk.tensor.{n}d.global.shared::cta.tile.bulk_group [$0, {{{where}}}], [$1];",
        descriptor,
        source,
        *coordinates,
    )
    asm([], "cp.async.bulk.commit_group;")


def tensor_store_wait(pending: int) -> None:
    """Waits until at most `pending` stores of this thread still read shared memory."""
    asm([], f"cp.async.bulk.wait_group.read {pending};")


def arrive_remote(address: Int, rank: Any) -> None:
    """One arrival on a barrier of block `rank` of the cluster; orders nothing but this thread's reads before it.

    The default scope (cta): at cluster scope the arrival is preceded by a fence, 600 cycles in the loop of a matmul.
    """
    asm(
        [],
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [a]; }",
        address,
        rank,
    )


def uniform(value: Int) -> Int:
    """A value that is the same in all lanes of a warp, in a form in which the assembler knows that it is: branches on
    it are no divergent ones, and what hangs on it may live in uniform registers (descriptors of wgmma).
    """
    return Int(asm([i32()], "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", value)[0])


def set_registers(count: int, action: str) -> None:
    asm([], f"setmaxnreg.{action}.sync.aligned.u32 {count};")


def sync_threads(barrier: Any, threads: int) -> None:
    """Named barrier for `threads` threads."""
    asm([], f"barrier.sync $0, {threads};", barrier)


def arrive_threads(barrier: Any, threads: int) -> None:
    """Counts on a named barrier for `threads` threads without waiting for it."""
    asm([], f"barrier.arrive $0, {threads};", barrier)


def wgmma_fence() -> None:
    asm([], "wgmma.fence.sync.aligned;")


def wgmma_commit() -> None:
    asm([], "wgmma.commit_group.sync.aligned;")


def wgmma_wait(pending: int) -> None:
    asm([], f"wgmma.wait_group.sync.aligned {pending};")


def matrix_descriptor(address: Int) -> ir.Value:
    """wgmma descriptor of a tile [rows][64] of 16-bit values, 128-byte swizzle, K fastest; address % 1024 == 0."""
    low = (address & 0x3FFFF) >> 4
    high = (1024 >> 4) | (1 << 30)  # stride between groups of 8 rows; 128-byte swizzle
    return asm([i64()], "mov.b64 $0, {$1, $2};", low + (1 << 16), high, pure=True)[0]


def advance(descriptor: ir.Value, nbytes: int) -> ir.Value:
    return asm([i64()], f"add.s64 $0, $1, {nbytes >> 4};", descriptor, pure=True)[0]


def wgmma(sums: Sequence[ir.Value], a: Sequence[ir.Value], b: ir.Value, dtype: str) -> list[ir.Value]:
    """sums += a @ b for m64nNk16, a from registers, N = 2 * len(sums). Asynchronous until `wgmma_wait`."""
    count = len(sums)
    outs = ", ".join(f"${i}" for i in range(count))
    regs = ", ".join(f"${2 * count + i}" for i in range(4))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{dtype}.{dtype} "
        f"{{{outs}}}, {{{regs}}}, ${2 * count + 4}, 1, 1, 1, 0;"
    )
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 4 + ["l"])
    kind = llvm.StructType.get_literal([f32()] * count)
    out = llvm.inline_asm(kind, [*sums, *(raw(x) for x in a), b], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(f32(), out, [i]) for i in range(count)]


def store_matrices_transposed(address: Int, values: Sequence[ir.Value]) -> None:
    """2 or 4 8x8 matrices of 16-bit values, each transposed: lane l gives the address of row l % 8 of matrix l // 8."""
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    asm([], f"stmatrix.sync.aligned.m8n8.x{len(values)}.trans.shared.b16 [$0], {{{names}}};", address, *values)
