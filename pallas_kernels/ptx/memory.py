"""Loads, stores and copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels.ptx.values import Int, arith, asm, f32, i32, i64, llvm, raw, select, special


def address(pointer: ir.Value, offset: Any = 0, scale: int = 1) -> ir.Value:
    """64-bit address `pointer + offset * scale`, offset an unsigned 32-bit `Int`; the product has 64 bits."""
    if isinstance(offset, int) and offset == 0:
        return pointer
    return asm([i64()], "mad.wide.u32 $0, $1, $2, $3;", offset, scale, pointer, pure=True)[0]


def slice_address(pointer: ir.Value, index: Int, nbytes: int) -> ir.Value:
    """64-bit address `pointer + index * nbytes`, where slices may be larger than 4 GiB."""
    wide = asm([i64()], "cvt.u64.u32 $0, $1;", index, pure=True)[0]
    return asm([i64()], f"mad.lo.u64 $0, $1, {nbytes}, $2;", wide, pointer, pure=True)[0]


def global_pointer(ref: ir.Value) -> ir.Value:
    """64-bit address of a GMEM memref."""
    from jax.experimental.mosaic.gpu import utils

    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def shared_pointer(ref: ir.Value) -> Int:
    """32-bit shared-memory address of an SMEM memref."""
    from jax.experimental.mosaic.gpu import utils

    return Int(llvm.ptrtoint(i32(), utils.memref_ptr(ref)))


def load_shared(address: Int, kinds: str, count: int = 1) -> list[ir.Value]:
    """`count` (1, 2, 4) values from shared memory; kinds "u32", "f32" or "u16" (widened to 32 bits)."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    if kinds == "u16":
        return asm([i32()], "{ .reg .u16 h; ld.shared.u16 h, [$1]; cvt.u32.u16 $0, h; }", address)
    names = ", ".join(f"${i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    kind = {"u32": i32(), "f32": f32()}[kinds]
    return asm([kind] * count, f"ld.shared{vector}.{kinds} {names}, [${count}];", address)


def look_up(address: Int, here: bool = False) -> ir.Value:
    """A word of shared memory that does not change while it is read.

    Args:
      here: it is read at this place; else the assembler moves the load to where it likes.
    """
    return asm([i32()], f"ld{'.volatile' * here}.shared.b32 $0, [$1];", address, pure=not here)[0]


def store_shared(address: Int, values: Sequence[Any]) -> None:
    vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    names = f"{{{names}}}" if len(values) > 1 else names
    kind = str(raw(values[0]).type).replace("i", "b")
    asm([], f"st.shared{vector}.{kind} [$0], {names};", address, *values)


def load_global(pointer: ir.Value, kind: str) -> ir.Value:
    """One cached read-only value: kind "u32", "f32" or "u16" (widened)."""
    if kind == "u16":
        return asm([i32()], "{ .reg .u16 h; ld.global.nc.u16 h, [$1]; cvt.u32.u16 $0, h; }", pointer)[0]
    return asm([{"u32": i32(), "f32": f32()}[kind]], f"ld.global.nc.{kind} $0, [$1];", pointer)[0]


def load_words(pointer: ir.Value, count: int = 4) -> list[ir.Value]:
    """`count` (1, 2, 4) 32-bit words from global memory, through the cache that sees this kernel's stores."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    names = ", ".join(f"${i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    return asm([i32()] * count, f"ld.global{vector}.b32 {names}, [${count}];", pointer)


def load_stream(pointer: ir.Value) -> list[ir.Value]:
    """Four 32-bit words of data that is read once; L2 fetches the 256 bytes around them, which are wanted next."""
    text = "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];"
    return asm([i32()] * 4, text, pointer)


def load_where(exists: Any, pointer: ir.Value, offset: int = 0, policy: ir.Value | None = None) -> list[ir.Value]:
    """Four 32-bit words, zeros where `exists` is 0; with a policy of data that is read once. The loads of a kernel leave
    in their order: as cached read-only ones they would be moved behind barriers, to where they are used.
    """
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    once, hint, hints = (".L1::no_allocate.L2::cache_hint", ", $6", [policy]) if policy else ("", "", [])
    load = f"ld.weak.global{once}.v4.b32 {{$0, $1, $2, $3}}, [$5+{offset}]{hint};"
    text = f"{{ .reg .pred p; setp.ne.b32 p, $4, 0; {zeros} @p {load} }}"
    return asm([i32()] * 4, text, exists, pointer, *hints, early=True)


def load_kept(pointer: ir.Value) -> ir.Value:
    """A 32-bit word of data that is read once. Loads of this kind leave in their order."""
    return asm([i32()], "ld.relaxed.gpu.global.u32 $0, [$1];", pointer)[0]


def store_rounded(pointer: ir.Value, value: ir.Value, dtype: str) -> None:
    """A float32 value as one 16-bit float to global memory."""
    asm([], f"{{ .reg .b16 h; cvt.rn.{dtype}.f32 h, $1; st.global.b16 [$0], h; }}", pointer, value)


def store_words(pointer: ir.Value, values: Sequence[Any]) -> None:
    """1, 2 or 4 32-bit words to global memory."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    names = f"{{{names}}}" if len(values) > 1 else names
    asm([], f"st.global{vector}.b32 [$0], {names};", pointer, *values)


def prefetch(pointer: ir.Value) -> None:
    """Asks for the 32 bytes around an address of global memory to be brought into L2."""
    asm([], "prefetch.global.L2 [$0];", pointer)


def load_matrices(address: Int) -> list[ir.Value]:
    """Four 8x8 matrices of 16-bit values (`ldmatrix`): lane l gives the address of row l % 8 of matrix l // 8."""
    return asm([i32()] * 4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", address)


def remote(address: Int, rank: Any) -> Int:
    """The address of the same shared-memory location in block `rank` of the cluster."""
    return Int(asm([i32()], "mapa.shared::cluster.u32 $0, $1, $2;", address, rank, pure=True)[0])


def store_remote(address: Int, values: Sequence[ir.Value], barrier: Int) -> None:
    """Asynchronous store to a block of the cluster; its bytes count on the barrier there."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
    names = ", ".join(f"${i + 2}" for i in range(len(values)))
    names = f"{{{names}}}" if len(values) > 1 else names
    bits = [arith.bitcast(i32(), v) if str(v.type) == "f32" else v for v in values]
    asm(
        [],
        f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vector}.b32 [$0], {names}, [$1];",
        address,
        barrier,
        *bits,
    )


def evict_first() -> ir.Value:
    """Cache policy for data that is read once."""
    return asm([i64()], "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", pure=True)[0]


def bulk_copy(target: Int, source: ir.Value, nbytes: Any, barrier: Int, policy: ir.Value | None = None) -> None:
    """Global to shared memory by the copy engine; addresses and size are multiples of 16 bytes."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    if policy is None:
        asm([], f"{text} [$0], [$1], $2, [$3];", target, source, nbytes, barrier)
    else:
        asm([], f"{text}.L2::cache_hint [$0], [$1], $2, [$3], $4;", target, source, nbytes, barrier, policy)


def bulk_copies(
    copies: Sequence[tuple[Int, ir.Value, int, ir.Value | None]],
    barrier: Int,
    condition: ir.Value,
    after: Sequence[ir.Value] = (),
) -> None:
    """Several copies as `bulk_copy`, announced on the barrier, by one lane of a converged warp, if a condition holds.

    One block of PTX: `elect.sync` tells ptxas that a single lane is active. Under a comparison of the lane's number it
    makes a loop over lanes around each copy.

    Args:
      copies: (target, source, bytes, policy) each.
      after: 32-bit values loaded from the targets before. The copies leave when these have arrived. Nothing else orders
        a load that still waits in its queue and a copy that overwrites what it reads (seen: wrong products where loads
        were many and the copies found their data in L2).
    """
    go = select(condition, 1, 0)
    if after:
        zero = special("ctaid.z")  # what ptxas does not know
        bits = asm([i32()], "mov.b32 $0, $1;", after[0], pure=True)[0]
        for value in after[1:]:
            bits = asm([i32()], "or.b32 $0, $1, $2;", bits, value, pure=True)[0]
        go = Int(asm([i32()], "lop3.b32 $0, $1, $2, $3, 0xEA;", bits, zero, go, pure=True)[0])  # (bits & 0) | go
    operands: list[Any] = [barrier, sum(size for _, _, size, _ in copies), go]
    lines = ["mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"]
    for target, source, size, policy in copies:
        at = len(operands)
        operands += [target, source] if policy is None else [target, source, policy]
        hint, operand = ("", "") if policy is None else (".L2::cache_hint", f", ${at + 2}")
        text = f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{hint}"
        lines.append(f"{text} [${at}], [${at + 1}], {size}, [$0]{operand};")
    body = " ".join(f"@p {line}" for line in lines)
    text = "{ .reg .pred p, q; elect.sync _|p, 0xFFFFFFFF; setp.ne.b32 q, $2, 0; and.pred p, p, q; "
    asm([], text + body + " }", *operands)
