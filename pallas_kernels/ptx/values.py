"""Numbers, arithmetic and control flow of one thread."""

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

    def __or__(self, other: Any) -> Int:
        return Int(arith.ori(self.value, raw(other)))

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


def permute(a: Any, b: Any, pick: Any) -> ir.Value:
    """Byte i of the result is byte `(pick >> 4 * i) & 7` of the eight bytes of a and b, a's first."""
    return asm([i32()], "prmt.b32 $0, $1, $2, $3;", a, b, pick, pure=True)[0]


def select_float(condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    return arith.select(condition, yes, no)


def asm(
    results: Sequence[ir.Type], text: str, *operands: Any, pure: bool = False, early: bool = False
) -> list[ir.Value]:
    """Inline PTX. Operands are numbered after the results: `$0` is the first result.

    Args:
      results: types of the results (none, one or several).
      text: PTX; braces make registers and labels local.
      operands: `Int`, integers or MLIR values; their constraint follows from their type.
      pure: the instruction may be moved, merged or removed.
      early: results are written before all operands are read.
    """
    values = [raw(o) for o in operands]
    constraints = ["=" + "&" * early + _CONSTRAINTS[str(t)] for t in results] + [
        _CONSTRAINTS[str(v.type)] for v in values
    ]
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


def mul_pair(a: Any, b: Any, dtype: str) -> ir.Value:
    """Products of the two 16-bit floats of registers."""
    return asm([i32()], f"mul.rn.{dtype}x2 $0, $1, $2;", a, b, pure=True)[0]


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


def shuffle(value: Any, lane: Any) -> Int:
    """The 32 bits of another lane; for whole warps."""
    return Int(asm([i32()], "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", value, lane)[0])


def larger_halves(a: Any, b: Any) -> Int:
    """The larger of the low halves and of the high halves of two registers, as unsigned integers."""
    return Int(asm([i32()], "max.u16x2 $0, $1, $2;", a, b, pure=True)[0])


def unpack_pair(pair: Any, dtype: str) -> list[ir.Value]:
    """The two 16-bit floats of a register as float32."""
    if dtype == "bf16":
        return [as_float(Int(pair) << 16), as_float(Int(pair) & 0xFFFF0000)]
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    return asm([f32()] * 2, text, pair, pure=True)


def as_float(bits: Any) -> ir.Value:
    return arith.bitcast(f32(), raw(bits))


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


def chain(*parts: Sequence[Any]) -> list[Any]:
    return list(itertools.chain(*parts))


def transpose_pairs(pairs: ir.Value) -> ir.Value:
    """An 8x8 matrix of 16-bit values, two neighbours of row lane / 4 a lane, transposed over the lanes of a warp."""
    return asm([i32()], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pairs)[0]


def pack_pair(low: ir.Value, high: ir.Value, dtype: str) -> ir.Value:
    """Two float32 as one 32-bit register of two 16-bit floats."""
    return asm([i32()], f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", high, low, pure=True)[0]
