"""Words of PTX as Python functions: what Mosaic GPU's dialects do not offer, or offer only for whole warpgroups.

Everything here runs while a kernel is traced (inside `plgpu.inline_mgpu`) and emits MLIR at the current insertion
point. Scalars are `Int` (32 bits, with operators) or plain `ir.Value`. Addresses of shared memory are 32-bit `Int`s,
addresses of global memory are 64-bit `ir.Value`s.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import nvvm as _nvvm
from jaxlib.mlir.dialects import scf as _scf

# the generated type stubs know only half of the builders
arith: Any = _arith
llvm: Any = _llvm
nvvm: Any = _nvvm
scf: Any = _scf

_CONSTRAINTS = {"i16": "h", "i32": "r", "i64": "l", "f32": "f"}


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    return ir.F32Type.get()


def raw(value: Any) -> ir.Value:
    """The MLIR value behind an `Int`, a Python integer (as i32) or an MLIR value."""
    if isinstance(value, Int):
        return value.value
    if isinstance(value, int):
        return arith.constant(i32(), ir.IntegerAttr.get(i32(), value if value < 2**31 else value - 2**32))
    return value


class Int:
    """A 32-bit integer of the kernel with Python's operators. Division and remainder are unsigned."""

    def __init__(self, value: Any):
        self.value = raw(value)

    def __add__(self, other: Any) -> Int:
        return Int(arith.addi(self.value, raw(other)))

    def __sub__(self, other: Any) -> Int:
        return Int(arith.subi(self.value, raw(other)))

    def __mul__(self, other: Any) -> Int:
        return Int(arith.muli(self.value, raw(other)))

    def __floordiv__(self, other: Any) -> Int:
        return Int(arith.divui(self.value, raw(other)))

    def __mod__(self, other: Any) -> Int:
        return Int(arith.remui(self.value, raw(other)))

    def __and__(self, other: Any) -> Int:
        return Int(arith.andi(self.value, raw(other)))

    def __xor__(self, other: Any) -> Int:
        return Int(arith.xori(self.value, raw(other)))

    def __lshift__(self, other: Any) -> Int:
        return Int(arith.shli(self.value, raw(other)))

    def __rshift__(self, other: Any) -> Int:
        return Int(arith.shrui(self.value, raw(other)))

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> Int:
        return Int(arith.subi(raw(other), self.value))

    def __lt__(self, other: Any) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.slt, self.value, raw(other))

    def __eq__(self, other: Any) -> ir.Value:  # type: ignore[override]
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, raw(other))

    __hash__ = None  # type: ignore[assignment]


def select(condition: ir.Value, yes: Any, no: Any) -> Int:
    return Int(arith.select(condition, raw(yes), raw(no)))


def select_float(condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    return arith.select(condition, yes, no)


def asm(results: Sequence[ir.Type], text: str, *operands: Any, pure: bool = False) -> list[ir.Value]:
    """Inline PTX. Operands are numbered after the results: `$0` is the first result.

    Args:
      results: types of the results (none, one or several).
      text: PTX; braces make registers and labels local.
      operands: `Int`, integers or MLIR values; their constraint follows from their type.
      pure: the instruction may be moved, merged or removed.
    """
    values = [raw(o) for o in operands]
    constraints = ["=" + _CONSTRAINTS[str(t)] for t in results] + [_CONSTRAINTS[str(v.type)] for v in values]
    if not results:
        out_type = ir.Type.parse("!llvm.void")
    elif len(results) == 1:
        out_type = results[0]
    else:
        out_type = llvm.StructType.get_literal(list(results))
    out = llvm.inline_asm(out_type, values, text, ",".join(constraints), has_side_effects=not pure)
    if len(results) <= 1:
        return [out] if results else []
    return [llvm.extractvalue(t, out, [i]) for i, t in enumerate(results)]


def special(name: str) -> Int:
    """A special register, e.g. "tid.x" or "cluster_ctarank"."""
    return Int(asm([i32()], f"mov.u32 $0, %{name};", pure=True)[0])


@contextlib.contextmanager
def when(condition: ir.Value) -> Iterator[None]:
    """Code under a condition."""
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def loop(start: Any, stop: Any, step: Any, carry: Sequence[Any], body: Any) -> list[Any]:
    """`for i in range(start, stop, step)`: `body(i, carry) -> carry`; carried values are `Int` or MLIR values."""
    kinds = [isinstance(c, Int) for c in carry]

    def wrap(values: Sequence[ir.Value]) -> list[Any]:
        return [Int(v) if k else v for v, k in zip(values, kinds, strict=True)]

    op = scf.ForOp(raw(start), raw(stop), raw(step), [raw(c) for c in carry])
    with ir.InsertionPoint(op.body):
        out = body(Int(op.induction_variable), wrap(op.inner_iter_args))
        scf.yield_([raw(v) for v in out])
    return wrap(op.results)


def fix_name(name: str) -> None:
    """Names the kernel that is being traced, for Mosaic's dumps.

    Mosaic would name it by the number of kernels that the process has lowered before, and that name is part of the key
    of JAX's persistent compilation cache.
    """
    op = ir.InsertionPoint.current.block.owner
    while op.parent is not None:
        op = op.parent
    op.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)


def skip_preamble() -> None:
    """Takes back the barriers (of the cluster, and of the block) that Mosaic put in front of the kernel that is being
    traced, for its own barriers' sake. A kernel without such need not wait until all blocks of a cluster run.
    """
    for op in list(ir.InsertionPoint.current.block.operations):
        text = str(op.attributes["asm_string"]) if op.name == "llvm.inline_asm" else ""
        if op.name == "gpu.barrier" or "barrier.cluster." in text or "fence.mbarrier_init" in text:
            op.erase()


def constant(value: float) -> ir.Value:
    return arith.constant(f32(), ir.FloatAttr.get(f32(), float(value)))


def zero() -> ir.Value:
    return constant(0.0)


def add(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.addf(a, b)


def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return asm([f32()], "fma.rn.f32 $0, $1, $2, $3;", a, b, c, pure=True)[0]


def mul(a: ir.Value, b: ir.Value) -> ir.Value:
    return asm([f32()], "mul.rn.f32 $0, $1, $2;", a, b, pure=True)[0]


def maximum(a: ir.Value, b: ir.Value) -> ir.Value:
    return asm([f32()], "max.f32 $0, $1, $2;", a, b, pure=True)[0]


def exp2(a: ir.Value) -> ir.Value:
    """2 ** a with a relative error of 2**-22; 0 for -inf."""
    return asm([f32()], "ex2.approx.ftz.f32 $0, $1;", a, pure=True)[0]


def tanh(a: ir.Value) -> ir.Value:
    """Relative error of 2**-11: a quarter of bfloat16's rounding. One instruction where a quotient of powers is ten."""
    return asm([f32()], "tanh.approx.f32 $0, $1;", a, pure=True)[0]


def reciprocal(a: ir.Value) -> ir.Value:
    return asm([f32()], "rcp.rn.f32 $0, $1;", a, pure=True)[0]


def rsqrt(a: ir.Value) -> ir.Value:
    """1 / sqrt(a) with a relative error of 2**-22."""
    return asm([f32()], "rsqrt.approx.f32 $0, $1;", a, pure=True)[0]


def shuffle_xor(value: ir.Value, mask: int) -> ir.Value:
    """The value of lane `lane ^ mask` (float32); for whole warps."""
    return asm([f32()], f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, 0xffffffff;", value)[0]


def unpack_pair(pair: Any, dtype: str) -> list[ir.Value]:
    """The two 16-bit floats of a register as float32."""
    if dtype == "bf16":
        return [as_float(Int(pair) << 16), as_float(Int(pair) & 0xFFFF0000)]
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    return asm([f32()] * 2, text, pair, pure=True)


def as_float(bits: Any) -> ir.Value:
    return arith.bitcast(f32(), raw(bits))


def address(pointer: ir.Value, offset: Any = 0, scale: int = 1) -> ir.Value:
    """64-bit address `pointer + offset * scale`, offset an unsigned 32-bit `Int`; the product has 64 bits."""
    if isinstance(offset, int) and offset == 0:
        return pointer
    return asm([i64()], "mad.wide.u32 $0, $1, $2, $3;", offset, scale, pointer, pure=True)[0]


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


def mma(a: Sequence[Any], b: Sequence[Any], c: Sequence[Any], dtype: str) -> list[ir.Value]:
    """m16n8k16 product of 16-bit floats (`dtype` "bf16" or "f16") with float32 accumulation."""
    return asm(
        [f32()] * 4,
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *a,
        *b,
        *c,
        pure=True,
    )


def barrier_init(address: Int, count: int) -> None:
    asm([], "mbarrier.init.shared::cta.b64 [$0], $1;", address, count)


def barrier_expect(address: Int, nbytes: Any) -> None:
    """One arrival, and `nbytes` more to come."""
    asm([], "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", address, nbytes)


def barrier_arrive(address: Int) -> None:
    asm([], "mbarrier.arrive.shared::cta.b64 _, [$0];", address)


def barrier_wait(address: Int, parity: Any, scope: str = "cta") -> None:
    """Waits until the phase of this parity has completed.

    Args:
      scope: "cluster" where stores of other blocks must be visible after it. That invalidates the L1 cache, which
        costs hundreds of cycles, so the barriers of copies are waited for at scope "cta".
    """
    acquire = ".acquire.cluster" if scope == "cluster" else ""
    asm(
        [],
        f"{{ .reg .pred done; WAIT: mbarrier.try_wait.parity{acquire}.shared::cta.b64 done, [$0], $1; "
        "@done bra DONE; bra WAIT; DONE: }",
        address,
        parity,
    )


def fence_barrier_init() -> None:
    asm([], "fence.mbarrier_init.release.cluster;")


def fence_async() -> None:
    """Shared memory written by ordinary stores becomes visible to the copy engine and the tensor cores."""
    asm([], "fence.proxy.async.shared::cta;")


def sync_warp() -> None:
    """Joins the lanes of a warp. Belongs behind every branch on a thread's number in front of an instruction for whole
    warps (mma, ldmatrix, wgmma, barriers): LLVM does not know that inline PTX must not be copied into both sides of a
    branch (seen: a wgmma loop that hung, because thread 0 had got a copy of its own). It knows it of this operation.
    """
    nvvm.bar_warp_sync(raw(0xFFFFFFFF))


def sync_block() -> None:
    asm([], "barrier.sync 0;")


def cluster_arrive(relaxed: bool = False) -> None:
    """relaxed: without the fence (a global one, slow), where no data but only progress is announced."""
    asm([], f"barrier.cluster.arrive.{'relaxed' if relaxed else 'release'};")


def cluster_wait() -> None:
    asm([], "barrier.cluster.wait.acquire;")


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


def chain(*parts: Sequence[Any]) -> list[Any]:
    return list(itertools.chain(*parts))


def transpose_pairs(pairs: ir.Value) -> ir.Value:
    """An 8x8 matrix of 16-bit values, two neighbours of row lane / 4 a lane, transposed over the lanes of a warp."""
    return asm([i32()], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pairs)[0]


def pack_pair(low: ir.Value, high: ir.Value, dtype: str) -> ir.Value:
    """Two float32 as one 32-bit register of two 16-bit floats."""
    return asm([i32()], f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", high, low, pure=True)[0]
