"""Attention of one new token over its key/value cache, in one launch: rope, cache update, grouped-query attention.

The blocks of a cluster, and their warps, share the keys of one key/value head of one row; each warp keeps a running
softmax over its tiles of 16 keys (online softmax: Milakov and Gimelshein, arXiv 1805.02867; split over the keys:
Flash-Decoding). Keys and values go from global memory to the registers of `mma.sync` without shared memory: the order
of the head's dimensions inside a product is free, so a lane's 16 bytes of a key are its share of two steps, and values
become operands by byte permutes. The warps' sums meet in distributed shared memory and are added in a fixed order, so
repeated runs give equal bits. The new token's key and value never pass through the cache: they start the softmax of
the first warp.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir

from pallas_kernels import ptx
from pallas_kernels.attention_plan import CHUNK, DTYPES, LOG2E, NONE, Heads, Plan, refusal
from pallas_kernels.attention_sums import Sums
from pallas_kernels.launch import launch, pointers
from pallas_kernels.ptx import Int

TILE = 16  # keys of one step: the K of the second product

__all__ = ["Heads", "Plan", "decode_attention", "refusal"]


@functools.partial(jax.jit, static_argnames="spec")
def decode_attention(
    projected: tuple[jax.Array, ...],
    keys: jax.Array,
    values: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    slot: jax.Array,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    *,
    spec: Heads,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one token a row; its key (rotated) and value are written to the cache in place.

    Args:
      projected: q, k and v side by side as one [B, (heads + 2 * kv_heads) * head_dim], or as three arrays.
      keys, values: the cache, [B, kv_heads, S, head_dim].
      rope: cos and sin, float32[B, head_dim / 2], or None.
      slot: int32 scalar, where the new token goes; slots below are seen.
      starts: int32[B], first slot of each row that is no padding, at most `slot`.
      sinks: float[heads], an extra logit for each head that takes weight and gives nothing.

    Returns:
      ([B, heads * head_dim], keys, values). float32 inside; weights of the softmax are rounded to the inputs' type.
    """
    batch, _, slots, dim = keys.shape
    plan = Plan(spec, batch, slots, DTYPES[str(keys.dtype)], tuple(a.shape[-1] for a in projected), rope is not None)
    arrays: dict[str, jax.Array] = {f"p{i}": a for i, a in enumerate(projected)}
    if rope is not None:
        arrays |= {"cos": rope[0], "sin": rope[1]}
    arrays["slot"] = jnp.asarray(slot, jnp.int32).reshape(1)
    if starts is not None:
        arrays["starts"] = starts.astype(jnp.int32)
    if sinks is not None:
        arrays["sinks"] = sinks.astype(jnp.float32)
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)

    def emit(_: Any, refs: dict[str, ir.Value], shared: Int) -> None:
        _Kernel(plan, pointers(refs), shared).run()

    result = {"out": jax.ShapeDtypeStruct((batch, spec.heads * dim), keys.dtype)}
    size = {"clusters": plan.units, "cluster": plan.cluster, "warps": plan.warps, "shared_bytes": plan.layout["bytes"]}
    arrays |= {"keys": keys_ref, "values": values_ref}
    out = launch(emit, "decode_attention", arrays, result, **size)[0]
    return out, jax.freeze(keys_ref), jax.freeze(values_ref)


class _Kernel(Sums):
    """Emits the kernel. Methods run while tracing; attributes are values of one thread of the kernel."""

    def __init__(self, plan: Plan, pointers: dict[str, ir.Value], shared: Int):
        self.plan, self.spec, self.pointers = plan, plan.spec, pointers
        spec, at = plan.spec, plan.layout
        self.thread = ptx.special("tid.x")
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.g, self.t = self.lane >> 2, self.lane & 3
        self.rank = ptx.special("cluster_ctarank") if plan.cluster > 1 else Int(0)
        unit = ptx.special("clusterid.x") if plan.cluster > 1 else ptx.special("ctaid.x")
        self.chunk = unit % spec.chunks
        self.pair = unit // spec.chunks  # row and key/value head
        self.row, self.kv = self.pair // spec.kv_heads, self.pair % spec.kv_heads
        self.head = self.kv * (spec.chunks * spec.at_once) + self.chunk * spec.at_once  # first one of this block
        self.part = self.rank * plan.warps + self.warp
        self.first_warp = ptx.select(self.part == 0, 1, 0)
        self.queries, self.key = shared + at["queries"], shared + at["key"]
        self.sums, self.softmax, self.weights = shared + at["sums"], shared + at["softmax"], shared + at["weights"]
        self.barrier = shared + at["barrier"]

    def run(self) -> None:
        plan = self.plan
        if plan.cluster > 1:
            with ptx.when(self.thread == 0):
                ptx.barrier_init(self.barrier, 1)
                ptx.fence_barrier_init()
                ptx.barrier_expect(self.barrier, plan.parts * self.spec.at_once * (plan.held * CHUNK * 4 + 8))
            ptx.sync_warp()
            ptx.cluster_arrive(relaxed=True)
        slot = Int(ptx.load_words(self.pointers["slot"], 1)[0])
        new = self.load_new()
        begin = Int(0)
        if "starts" in self.pointers:
            begin = Int(ptx.load_words(ptx.address(self.pointers["starts"], self.row, 4), 1)[0])
        if self.spec.window is not None:
            low = slot - (self.spec.window - 1)
            begin = ptx.select(begin < low, low, begin)
        self.begin, self.end = begin, slot
        self.last = ptx.select(Int(0) < slot, slot - 1, 0)  # the newest row of the cache
        steps = ptx.select(begin < slot, (slot - begin + (TILE - 1)) >> 4, 0)
        tile = [*self.load_keys(self.part), *self.load_values(self.part)] if self.prefetches else []
        self.stage(new)
        ptx.sync_block()
        self.update_cache(slot)
        ptx.sync_warp()
        self.q = [
            ptx.load_shared(self.queries + self.row_of_query() * plan.pitch + j * 64 + self.t * 16, "u32", 4)
            for j in range(self.spec.head_dim // 32)
        ]

        def step(i: Int, carry: list[Any]) -> list[Any]:
            state, words = carry[: self.n_state], carry[self.n_state :]
            ptx.sync_warp()
            if not words:
                return self.attend(i, state, self.load_keys(i), self.load_values(i))
            split, behind = self.spec.head_dim // 4, i + plan.parts
            after = [*self.load_keys(behind), *self.load_values(behind)]
            return [*self.attend(i, state, words[:split], words[split:]), *after]

        state = self.first_state()
        self.n_state = len(state)
        state = ptx.loop(self.part, steps, plan.parts, [*state, *tile], step)[: self.n_state]
        ptx.sync_warp()
        self.send(state)
        self.finish()

    @property
    def prefetches(self) -> bool:
        """Whether the next tile is on its way while this one is computed; larger heads leave no registers for it."""
        return self.spec.head_dim <= 128

    def row_of_query(self) -> Int:
        """The query of this lane; rows that do not exist repeat the first, nobody looks at their results."""
        return ptx.select(self.g < self.spec.at_once, self.g, 0)

    # ---- the new token

    def source(self, which: str, head: Int) -> ir.Value:
        """Address of one head of q, k or v as projected."""
        plan, spec = self.plan, self.spec
        dim = spec.head_dim
        if len(plan.widths) == 1:
            name, width = "p0", plan.widths[0]
            begin = {"q": 0, "k": spec.heads * dim, "v": (spec.heads + spec.kv_heads) * dim}[which]
        else:
            index = "qkv".index(which)
            name, width, begin = f"p{index}", plan.widths[index], 0
        return ptx.address(ptx.address(self.pointers[name], self.row, width * 2), head * dim + begin, 2)

    def load_new(self) -> list[tuple[Any, ...]]:
        """This thread's pairs of the block's queries and of the new key: (where they go, exists, low and high half of
        the head, cos, sin)."""
        plan, spec = self.plan, self.spec
        quarter, count = spec.head_dim // 4, spec.at_once
        items, out = (count + 1) * quarter, []
        for first in range(0, items, plan.warps * 32):
            item = self.thread + first
            exists = item < items
            item = ptx.select(exists, item, items - 1)
            head, pos = item // quarter, item % quarter
            is_key = head == count
            q_from, k_from = self.source("q", self.head + ptx.select(is_key, 0, head)), self.source("k", self.kv)
            source = ptx.address(ptx.select_float(is_key, k_from, q_from), pos, 4)
            low = ptx.load_words(source, 1)[0]
            high = ptx.load_words(ptx.address(source, spec.head_dim), 1)[0]
            tables = [self.load_table(name, pos) for name in ("cos", "sin")] if plan.rope else []
            to = ptx.select(is_key, self.key, self.queries + head * plan.pitch) + pos * 4
            out.append((to, exists, low, high, *tables))
        return out

    def load_table(self, name: str, pos: Int) -> list[ir.Value]:
        table = ptx.address(self.pointers[name], self.row, self.spec.head_dim * 2)
        return [ptx.as_float(w) for w in ptx.load_words(ptx.address(table, pos, 8), 2)]

    def stage(self, new: list[tuple[Any, ...]]) -> None:
        """All threads: the block's queries and the new key, rotated and rounded, to shared memory."""
        for to, exists, low, high, *tables in new:
            if tables:
                low, high = self.rotate(low, high, *tables)
            with ptx.when(exists):
                ptx.store_shared(to, [low])
                ptx.store_shared(to + self.spec.head_dim, [high])

    def rotate(self, low: Any, high: Any, cosines: list, sines: list) -> tuple[ir.Value, ir.Value]:
        """Two neighbouring dimensions of a head and those half a head above, rotated."""
        firsts, seconds, dtype = [], [], self.plan.dtype
        for a, b, cos, sin in zip(
            ptx.unpack_pair(low, dtype), ptx.unpack_pair(high, dtype), cosines, sines, strict=True
        ):
            firsts.append(ptx.add(ptx.mul(a, cos), ptx.mul(ptx.mul(b, sin), ptx.constant(-1.0))))
            seconds.append(ptx.add(ptx.mul(b, cos), ptx.mul(a, sin)))
        return ptx.pack_pair(firsts[0], firsts[1], dtype), ptx.pack_pair(seconds[0], seconds[1], dtype)

    def update_cache(self, slot: Int) -> None:
        """One block of a key/value head writes the new row. No block reads it: `first_state` has its share."""
        lanes = self.spec.head_dim // 8
        owner = ptx.select(self.rank == 0, 1, 0) & ptx.select(self.chunk == 0, 1, 0)
        with ptx.when((owner & ptx.select(self.thread < lanes, 1, 0)) == 1):
            words = ptx.load_shared(self.key + self.thread * 16, "u32", 4)
            ptx.store_words(ptx.address(self.cache_row("keys", slot), self.thread, 16), words)
            value = ptx.address(self.source("v", self.kv), self.thread, 16)
            ptx.store_words(ptx.address(self.cache_row("values", slot), self.thread, 16), ptx.load_words(value))

    def first_state(self) -> list[ir.Value]:
        """Maximum, sum and output of the softmax: of the new token alone in the first warp, empty in the others."""
        spec = self.spec
        words = [ptx.load_shared(self.key + j * 64 + self.t * 16, "u32", 4) for j in range(spec.head_dim // 32)]
        score = self.logit(self.scores(words)[0])
        mine = self.first_warp == 1
        one = ptx.select_float(self.t == 0, ptx.constant(1.0), ptx.zero())
        state = [
            ptx.select_float(mine, score, ptx.constant(NONE)),
            ptx.select_float(mine, one, ptx.zero()),
        ]
        value = self.source("v", self.kv)
        for h in range(spec.head_dim // 64):
            at = ptx.address(value, self.t * 32 + h * 128)
            for begin in (0, 16):
                for word in ptx.load_words(ptx.address(at, begin)):
                    for x in ptx.unpack_pair(word, self.plan.dtype):
                        state.append(ptx.select_float(mine, x, ptx.zero()))
        return state

    # ---- the cache

    def cache_row(self, name: str, slot: Int) -> ir.Value:
        size = self.spec.head_dim * 2
        return ptx.address(ptx.address(self.pointers[name], self.pair, self.plan.slots * size), slot, size)

    def load_keys(self, i: Int) -> list[ir.Value]:
        """A lane's words of the keys of tile i: 16 bytes of each 64 of keys g and g + 8."""
        out = []
        for n in (0, 8):
            row = self.cache_row("keys", self.inside(self.begin + i * TILE + self.g + n))
            for j in range(self.spec.head_dim // 32):
                out += ptx.load_words(ptx.address(row, self.t * 16 + j * 64))
        return out

    def load_values(self, i: Int) -> list[ir.Value]:
        """A lane's words of the values of tile i: 16 bytes of each 128 of values 2t, 2t + 1, 2t + 8 and 2t + 9."""
        out = []
        for e in (0, 1, 8, 9):
            row = self.cache_row("values", self.inside(self.begin + i * TILE + self.t * 2 + e))
            for h in range(self.spec.head_dim // 64):
                out += ptx.load_words(ptx.address(row, self.g * 16 + h * 128))
        return out

    def inside(self, slot: Int) -> Int:
        """The slot, or the newest one: what is not written yet may be anything, and 0 times that need not be 0."""
        return ptx.select(slot < self.last, slot, self.last)

    def scores(self, words: list[list[ir.Value]]) -> list[ir.Value]:
        """q . k of eight keys; a lane gets keys 2t and 2t + 1 of query g."""
        sums = [ptx.zero()] * 4
        for q, k in zip(self.q, words, strict=True):
            for s in (0, 2):
                sums = ptx.mma([q[s], 0, q[s + 1], 0], [k[s], k[s + 1]], sums, self.plan.dtype)
        return sums[:2]

    def logit(self, score: ir.Value) -> ir.Value:
        """Scaled and capped, in powers of two."""
        cap = self.spec.softcap
        if cap is None:
            return ptx.mul(score, ptx.constant(self.spec.scale * LOG2E))
        grown = ptx.exp2(ptx.mul(score, ptx.constant(2 * LOG2E * self.spec.scale / cap)))
        small = ptx.reciprocal(ptx.add(grown, ptx.constant(1.0)))
        return ptx.fma(small, ptx.constant(-2 * cap * LOG2E), ptx.constant(cap * LOG2E))  # tanh = 1 - 2 / (e^2x + 1)

    def attend(self, i: Int, state: list[ir.Value], keys: list[ir.Value], values: list[ir.Value]) -> list[ir.Value]:
        """Adds tile i to the softmax."""
        dim, dtype = self.spec.head_dim, self.plan.dtype
        top, total, out = state[0], state[1], state[2:]
        quads = [keys[a : a + 4] for a in range(0, len(keys), 4)]
        logits = []
        for n in (0, 1):
            for e, score in enumerate(self.scores(quads[n * (dim // 32) : (n + 1) * (dim // 32)])):
                seen = self.begin + i * TILE + self.t * 2 + 8 * n + e < self.end
                logits.append(ptx.select_float(seen, self.logit(score), ptx.constant(-math.inf)))
        new_top = top
        for x in logits:
            new_top = ptx.maximum(new_top, x)
        for mask in (1, 2):
            new_top = ptx.maximum(new_top, ptx.shuffle_xor(new_top, mask))
        minus = ptx.mul(new_top, ptx.constant(-1.0))
        shrink = ptx.exp2(ptx.add(top, minus))
        weights = [ptx.exp2(ptx.add(x, minus)) for x in logits]
        total = ptx.mul(total, shrink)
        for x in weights:
            total = ptx.add(total, x)
        a = [ptx.pack_pair(weights[0], weights[1], dtype), 0, ptx.pack_pair(weights[2], weights[3], dtype), 0]
        halves, new = dim // 64, []
        for h in range(halves):
            rows = [values[4 * (e * halves + h) :][:4] for e in range(4)]
            low, high = [], []
            for d in range(8):
                pick = 0x5410 if d % 2 == 0 else 0x7632
                b = [_permute(rows[e][d // 2], rows[e + 1][d // 2], pick) for e in (0, 2)]
                c = [ptx.mul(out[16 * h + d], shrink), ptx.mul(out[16 * h + 8 + d], shrink)]
                sums = ptx.mma(a, b, [*c, ptx.zero(), ptx.zero()], dtype)
                low.append(sums[0])
                high.append(sums[1])
            new += low + high
        return [new_top, total, *new]


def _permute(a: ir.Value, b: ir.Value, pick: int) -> ir.Value:
    return ptx.asm([ptx.i32()], f"prmt.b32 $0, $1, $2, {pick};", a, b, pure=True)[0]
