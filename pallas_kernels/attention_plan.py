"""Attention of one new token: what is static about a layer and about one launch, and what the kernel does not take."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

CHUNK = 16  # output dimensions that one lane holds next to each other
DTYPES = {"bfloat16": "bf16", "float16": "f16"}
LOG2E = math.log2(math.e)
NONE = -1e30  # maximum of no logits: finite, for the difference of two


@dataclasses.dataclass(frozen=True)
class Heads:
    """What is static about the attention of a layer.

    Fields:
      heads, kv_heads, head_dim: of the model; heads is a multiple of kv_heads.
      scale: factor of q . k.
      window: keys i - window < j <= i are seen; None: all j <= i.
      softcap: c * tanh(score / c); None: none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def at_once(self) -> int:
        """Query heads of a key/value head that one block takes: at most 8, the rows of a product that are used."""
        group = self.heads // self.kv_heads
        return max(n for n in range(1, 9) if group % n == 0)

    @property
    def chunks(self) -> int:
        return self.heads // self.kv_heads // self.at_once


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    spec: Heads
    batch: int
    slots: int
    dtype: str
    widths: tuple[int, ...]  # of the projected arrays: one for q, k and v together, or three
    rope: bool
    warps: int = 4

    @property
    def units(self) -> int:
        return self.batch * self.spec.kv_heads * self.spec.chunks

    @property
    def cluster(self) -> int:
        """Blocks that share the keys: as many as keep about two on each multiprocessor."""
        most = min(8, self.spec.head_dim // CHUNK)
        return max(c for c in (1, 2, 4, 8) if c <= most and (c == 1 or c * self.units <= 264))

    @property
    def parts(self) -> int:
        return self.warps * self.cluster

    @property
    def held(self) -> int:
        """Chunks of a head's output that one block adds up."""
        return self.spec.head_dim // CHUNK // self.cluster

    @property
    def pitch(self) -> int:
        """Bytes from query to query in shared memory: 16 over a multiple of 128, for different banks."""
        return self.spec.head_dim * 2 + 16

    @functools.cached_property
    def layout(self) -> dict[str, int]:
        """Offsets in shared memory; "bytes" is the whole."""
        heads, at, out = self.spec.at_once, 0, {}
        sizes = {
            "queries": heads * self.pitch,
            "key": self.spec.head_dim * 2,
            "sums": self.parts * heads * self.held * CHUNK * 4,
            "softmax": self.parts * heads * 8,
            "weights": self.parts * heads * 4,
            "barrier": 8,
        }
        for name, size in sizes.items():
            out[name] = at
            at += -(-size // 128) * 128
        out["bytes"] = at
        return out


def refusal(spec: Heads, dtype: Any, cache_dtype: Any, rotated: int | None) -> str | None:
    """Why the kernel does not take this attention, or None; `rotated`: dimensions of the rope, None without one."""
    if str(dtype) not in DTYPES or str(cache_dtype) != str(dtype):
        return f"queries of {dtype} with a cache of {cache_dtype}; the kernel takes one 16-bit type"
    if spec.head_dim not in (64, 128, 256):
        return f"heads of {spec.head_dim} dimensions; the kernel takes 64, 128 and 256"
    if rotated not in (None, spec.head_dim):
        return f"a rope of {rotated} of {spec.head_dim} dimensions"
    return None
