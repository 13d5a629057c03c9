"""Words of PTX (`pallas_kernels.ptx`) computed with NumPy, all threads of a cluster in lockstep.

A kernel that is written in these words alone runs on any machine when this module stands in for `ptx`: every value is an
array with one element a thread, so barriers have nothing to do. It holds indices, masks, fragments and the exchange
between blocks; races and timing it cannot see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
f32 = np.float32


class State:
    """Of the cluster that runs now."""

    memory: np.ndarray  # global, uint8
    shared: np.ndarray  # [blocks, bytes], uint8
    rank: np.ndarray
    special: dict[str, np.ndarray]
    masks: list[np.ndarray]
    sent: dict[int, int]  # bytes of remote stores a block
    expected: dict[int, int]


def start(memory: np.ndarray, shared_bytes: int, threads: int, blocks: int, unit: int) -> None:
    """Begins the cluster (or block) number `unit`."""
    count = threads * blocks
    State.memory, State.shared = memory, np.zeros((blocks, shared_bytes), np.uint8)
    State.rank = np.repeat(np.arange(blocks), threads)
    State.special = {
        "tid.x": np.tile(np.arange(threads), blocks),
        "cluster_ctarank": State.rank,
        "clusterid.x": np.full(count, unit),
        "ctaid.x": np.full(count, unit),
    }
    State.masks, State.sent, State.expected = [np.ones(count, bool)], {}, {}


def filled(value: Any, kind: Any = np.int64) -> np.ndarray:
    return np.full(len(State.rank), value, kind)


def raw(x: Any) -> np.ndarray:
    return x.value if isinstance(x, Int) else filled(x) if isinstance(x, int) else x


def _unsigned(x: Any) -> np.ndarray:
    return raw(x) % 2**32


class Int:
    def __init__(self, value: Any):
        self.value = (raw(value).astype(np.int64) + 2**31) % 2**32 - 2**31

    def __add__(self, other: Any) -> Int:
        return Int(self.value + raw(other))

    def __sub__(self, other: Any) -> Int:
        return Int(self.value - raw(other))

    def __rsub__(self, other: Any) -> Int:
        return Int(raw(other) - self.value)

    def __mul__(self, other: Any) -> Int:
        return Int(self.value * raw(other))

    def __floordiv__(self, other: Any) -> Int:
        return Int(_unsigned(self) // _unsigned(other))

    def __mod__(self, other: Any) -> Int:
        return Int(_unsigned(self) % _unsigned(other))

    def __and__(self, other: Any) -> Int:
        return Int(self.value & raw(other))

    def __or__(self, other: Any) -> Int:
        return Int(self.value | raw(other))

    def __xor__(self, other: Any) -> Int:
        return Int(self.value ^ raw(other))

    def __lshift__(self, other: Any) -> Int:
        return Int(self.value << raw(other))

    def __rshift__(self, other: Any) -> Int:
        return Int(_unsigned(self) >> raw(other))

    def __lt__(self, other: Any) -> np.ndarray:
        return self.value < raw(other)

    def __eq__(self, other: Any) -> np.ndarray:  # type: ignore[override]
        return self.value == raw(other)

    __radd__, __rmul__, __hash__ = __add__, __mul__, None  # type: ignore[assignment]


class Remote(Int):
    """An address in the shared memory of another block."""

    def __init__(self, address: Any, rank: Any):
        self.value, self.rank = raw(address), raw(rank)

    def __add__(self, other: Any) -> Remote:
        return Remote(self.value + raw(other), self.rank)


def select(condition: np.ndarray, yes: Any, no: Any) -> Int:
    return Int(np.where(condition, raw(yes), raw(no)))


def select_float(condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(condition, yes, no)


def special(name: str) -> Int:
    return Int(State.special[name])


@contextlib.contextmanager
def when(condition: np.ndarray) -> Iterator[None]:
    State.masks.append(State.masks[-1] & condition)
    yield
    State.masks.pop()


def loop(start: Any, stop: Any, step: Any, carry: Sequence[Any], body: Any) -> list[Any]:
    i, stop, step, carry = raw(start).copy(), raw(stop), raw(step), list(carry)
    while (active := State.masks[-1] & (i < stop)).any():
        State.masks.append(active)
        new = body(Int(i), carry)
        State.masks.pop()
        carry = [
            Int(np.where(active, raw(n), raw(o))) if isinstance(o, Int) else np.where(active, n, o)
            for n, o in zip(new, carry, strict=True)
        ]
        i = np.where(active, i + step, i)
    return carry


# ---- float32


def constant(value: float) -> np.ndarray:
    return filled(value, f32)


def zero() -> np.ndarray:
    return constant(0.0)


def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + b


def mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a * b


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(f32)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(a, b)


def exp2(a: np.ndarray) -> np.ndarray:
    return np.exp2(a)


def tanh(a: np.ndarray) -> np.ndarray:
    return np.tanh(a)


def reciprocal(a: np.ndarray) -> np.ndarray:
    return 1 / a


def rsqrt(a: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(a)


def as_float(bits: Any) -> np.ndarray:
    return _unsigned(bits).astype(np.uint32).view(f32)


def _bits(x: Any) -> np.ndarray:
    value = raw(x)
    return value.view(np.uint32) if value.dtype == f32 else (value % 2**32).astype(np.uint32)


def unpack_pair(pair: Any, dtype: str) -> list[np.ndarray]:
    both = _bits(pair).view(np.uint16).reshape(-1, 2).view(TYPES[dtype]).astype(f32)
    return [both[:, 0].copy(), both[:, 1].copy()]


def pack_pair(low: np.ndarray, high: np.ndarray, dtype: str) -> np.ndarray:
    both = np.stack([low.astype(TYPES[dtype]), high.astype(TYPES[dtype])], -1)
    return both.view(np.uint32)[:, 0].astype(np.int64)


def shuffle_xor(value: np.ndarray, mask: int) -> np.ndarray:
    return value[np.arange(len(value)) ^ mask]


def shuffle(value: Any, lane: Any) -> Int:
    threads = np.arange(len(filled(0)))
    return Int((raw(value) + filled(0))[(threads & ~31) + (raw(lane) + filled(0))])


def i32() -> str:
    return "i32"


def asm(results: Sequence[Any], text: str, *operands: Any, pure: bool = False) -> list[np.ndarray]:
    """Byte permutes alone."""
    assert text.startswith("prmt.b32"), text
    return [permute(operands[0], operands[1], int(text.rstrip(" ;").split(",")[-1]))]


def permute(a: Any, b: Any, pick: Any) -> np.ndarray:
    """Bytes of two registers, or with the upper bit of a pick the sign of one."""
    word = _bits(a).astype(np.uint64) | _bits(b).astype(np.uint64) << np.uint64(32)
    picks, out = _unsigned(pick).astype(np.uint64), np.zeros_like(word)
    for i in range(4):
        one = picks >> np.uint64(4 * i) & np.uint64(15)
        byte = word >> np.uint64(8) * (one & np.uint64(7)) & np.uint64(255)
        byte = np.where(one > 7, byte // np.uint64(128) * np.uint64(255), byte)
        out |= byte << np.uint64(8 * i)
    return out.astype(np.int64)


def transpose_pairs(pairs: np.ndarray) -> np.ndarray:
    squares = _bits(pairs).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
    return np.ascontiguousarray(squares).view(np.uint32).reshape(-1).astype(np.int64)


def mma(a: Sequence[Any], b: Sequence[Any], c: Sequence[Any], dtype: str) -> list[np.ndarray]:
    def square(register: Any) -> np.ndarray:  # [warps, row g, columns 2t and 2t + 1]
        return np.stack(unpack_pair(register, dtype), -1).reshape(-1, 8, 8).astype(np.float64)

    left = np.block([[square(a[0]), square(a[2])], [square(a[1]), square(a[3])]])
    right = np.concatenate([square(b[0]), square(b[1])], -1).swapaxes(1, 2)
    out = left @ right
    parts = [out[:, row : row + 8, column::2].reshape(-1) for row in (0, 8) for column in (0, 1)]
    return [(part + old).astype(f32) for part, old in zip(parts, c, strict=True)]


# ---- memory


def address(pointer: np.ndarray, offset: Any = 0, scale: int = 1) -> np.ndarray:
    return pointer + _unsigned(offset) * scale


def _read(rows: Any, at: np.ndarray, count: int) -> list[np.ndarray]:
    out = [filled(0) for _ in range(count)]
    for i in np.flatnonzero(State.masks[-1]):
        assert at[i] % (4 * count) == 0 and 0 <= at[i] <= rows(i).size - 4 * count
        for k, word in enumerate(rows(i)[at[i] : at[i] + 4 * count].view(np.uint32)):
            out[k][i] = word
    return out


def _write(rows: Any, at: np.ndarray, values: Sequence[Any]) -> None:
    words = [_bits(v) for v in values]
    for i in np.flatnonzero(State.masks[-1]):
        assert at[i] % (4 * len(words)) == 0 and 0 <= at[i] <= rows(i).size - 4 * len(words)
        rows(i)[at[i] : at[i] + 4 * len(words)].view(np.uint32)[:] = [w[i] for w in words]


def load_words(pointer: np.ndarray, count: int = 4) -> list[np.ndarray]:
    return _read(lambda i: State.memory, pointer, count)


load_stream = load_words


def load_where(exists: Int, pointer: np.ndarray, offset: int = 0, policy: Any = None) -> list[np.ndarray]:
    with when(raw(exists) == 1):
        return load_words(pointer + offset, 4)


def load_kept(pointer: np.ndarray) -> np.ndarray:
    return load_words(pointer, 1)[0]


def load_global(pointer: np.ndarray, kind: str) -> np.ndarray:
    word = load_words(pointer, 1)[0]
    return as_float(word) if kind == "f32" else word


def store_words(pointer: np.ndarray, values: Sequence[Any]) -> None:
    _write(lambda i: State.memory, pointer, values)


def store_rounded(pointer: np.ndarray, value: np.ndarray, dtype: str) -> None:
    halves = value.astype(TYPES[dtype]).view(np.uint16)
    for i in np.flatnonzero(State.masks[-1]):
        State.memory[pointer[i] : pointer[i] + 2].view(np.uint16)[0] = halves[i]


def load_shared(at: Int, kinds: str, count: int = 1) -> list[np.ndarray]:
    words = _read(lambda i: State.shared[State.rank[i]], raw(at), count)
    return [as_float(w) for w in words] if kinds == "f32" else words


def look_up(at: Int, here: bool = False) -> np.ndarray:
    return load_shared(at, "u32")[0]


def load_matrices(at: Int) -> list[np.ndarray]:
    rows = np.stack(_read(lambda i: State.shared[State.rank[i]], raw(at), 4), -1).astype(np.uint32)
    return [rows.reshape(-1, 4, 32)[:, matrix].reshape(-1).astype(np.int64) for matrix in range(4)]


def copy_box(target: Int, source: tuple[int, int, int], at: Sequence[Any], barrier: Int) -> None:
    """The copy engine: [rows, 64] 16-bit values of an array [rows, width] at an offset of global memory. Several rows are
    swizzled: 16 bytes of row r lie at their place xor r % 8. Zeros lie outside of the array.
    """
    offset, rows, width = source
    array = State.memory[offset : offset + rows * width * 2].view(np.uint16).reshape(rows, width)
    for i in np.flatnonzero(State.masks[-1]):
        k, place = int(raw(at[0])[i]), int(raw(target)[i])
        box = np.zeros((rows, 64), np.uint16)
        box[:, : max(0, min(64, width - k))] = array[:, k : k + 64]
        for row in range(rows):
            for part in range(8):
                to = place + row * 128 + 16 * (part ^ (row % 8 if rows > 1 else 0))
                State.shared[State.rank[i]][to : to + 16].view(np.uint16)[:] = box[row, 8 * part : 8 * part + 8]


def store_shared(at: Int, values: Sequence[Any]) -> None:
    _write(lambda i: State.shared[State.rank[i]], raw(at), values)


def remote(at: Int, rank: Any) -> Remote:
    return Remote(at, rank)


def store_remote(at: Remote, values: Sequence[Any], barrier: Remote) -> None:
    _write(lambda i: State.shared[at.rank[i]], at.value, values)
    assert np.array_equal(at.rank[State.masks[-1]], barrier.rank[State.masks[-1]])
    for block in at.rank[State.masks[-1]]:
        State.sent[block] = State.sent.get(block, 0) + 4 * len(values)


def barrier_expect(barrier: Int, nbytes: Any) -> None:
    for i in np.flatnonzero(State.masks[-1]):
        State.expected[State.rank[i]] = int(raw(nbytes)[i])


def barrier_wait(barrier: Int, parity: Any, scope: str = "cta") -> None:
    assert State.sent == State.expected


def nothing(*_: Any, **__: Any) -> None:
    pass


barrier_init = fence_barrier_init = sync_warp = sync_block = cluster_arrive = cluster_wait = prefetch = nothing
evict_first = nothing
