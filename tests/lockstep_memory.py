"""What tests of kernels in `lockstep` have in common: modules that compute in it, and their memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lockstep
import numpy as np


@contextlib.contextmanager
def stands_in(monkeypatch: Any, *modules: Any) -> Iterator[None]:
    """These modules of kernels compute in lockstep."""
    for module in modules:
        monkeypatch.setattr(module, "ptx", lockstep)
        monkeypatch.setattr(module, "Int", lockstep.Int)
    with np.errstate(all="ignore"):
        yield


class Memory:
    """Named arrays one after the other in a flat memory."""

    def __init__(self, arrays):
        self.shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
        self.at, parts, size = {}, [], 0
        for name, a in arrays.items():
            self.at[name] = size
            padded = np.zeros(-(-a.nbytes // 256) * 256, np.uint8)
            padded[: a.nbytes] = np.frombuffer(a.tobytes(), np.uint8)
            parts.append(padded)
            size += padded.size
        self.bytes = np.concatenate(parts)

    def start(self, shared_bytes, threads, blocks, unit):
        """Pointers for the threads of a cluster that begins."""
        lockstep.start(self.bytes, shared_bytes, threads, blocks, unit)
        return {name: lockstep.filled(at) for name, at in self.at.items()}, lockstep.Int(0)

    def __getitem__(self, name):
        shape, dtype = self.shapes[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[self.at[name] : self.at[name] + size].view(dtype).reshape(shape)
