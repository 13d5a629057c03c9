"""Dense weights that multiply one input, one behind the other in memory, so that the CPU takes one product of them.

One product of q, k and v together, and one of gate and up, take less time than five (SmolLM2-135M: 24 ms a token
against 27). Each weight stays an array of its own under its own name, which is what saving, training and replacing
see; the whole is a second view of the same memory. It is found by the identity of its parts: where one of them is
another array by now, there is no whole, and each part is multiplied by itself.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jq.nn import Linear

ALIGNMENT = 64  # bytes: XLA copies a host array that begins elsewhere

# Identities of the parts -> (the whole, weak references whose end removes the entry).
_wholes: dict[tuple[int, ...], tuple[jax.Array, list[Any]]] = {}


class Rows:
    """Memory for the rows of several weights.

    Args:
      counts: rows of each weight.
      columns: of all.
      dtype: of all.
    """

    def __init__(self, counts: Sequence[int], columns: int, dtype: Any) -> None:
        self.counts, self.dtype = tuple(counts), np.dtype(dtype)
        # Pages of their own, real as parts are written: on the heap, what is freed between them would stay unused.
        memory = mmap.mmap(-1, sum(counts) * columns * self.dtype.itemsize)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory = np.frombuffer(memory, self.dtype).reshape(-1, columns)
        self.parts: list[jax.Array] = []

    @staticmethod
    def fit(counts: Sequence[int], columns: int, dtype: Any) -> bool:
        """Whether every part would begin where XLA takes it as it lies."""
        return all(n * columns * np.dtype(dtype).itemsize % ALIGNMENT == 0 for n in counts)

    def add(self, value: jax.Array) -> jax.Array:
        """The next part, moved here: an array of the same bytes. `value` itself where XLA would copy them."""
        start = sum(self.counts[: len(self.parts)])
        view = self.memory[start : start + self.counts[len(self.parts)]]
        view[...] = np.asarray(value)
        part = jax.device_put(view)
        if part.unsafe_buffer_pointer() != view.ctypes.data:
            return value
        self.parts.append(part)
        return part

    def close(self) -> None:
        """Remembers the whole of the parts."""
        self.memory.flags.writeable = False
        key = tuple(map(id, self.parts))
        references = [weakref.ref(part, lambda _: _wholes.pop(key, None)) for part in self.parts]
        _wholes[key] = (jax.device_put(self.memory), references)


def whole(parts: Sequence[Any]) -> jax.Array | None:
    """The array [sum of rows, K] of parts [rows, K] that lie together, None where they do not."""
    found = _wholes.get(tuple(map(id, parts)))
    return None if found is None else found[0]


def groups(model: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Path and module of each attention and MLP of a `CausalLM`."""
    for i, layer in enumerate(model.model.layers):
        place: tuple[str | int, ...] = ("model", "layers", i)
        yield (*place, "self_attn"), layer.self_attn
        mlp, place = getattr(layer, layer.mlp_name), (*place, layer.mlp_name)
        if hasattr(mlp, "joint"):
            yield place, mlp
        elif isinstance(getattr(mlp, "experts", None), nnx.List):
            yield from (((*place, "experts", k), expert) for k, expert in enumerate(mlp.experts))
            if mlp.shared_expert is not None:
                yield (*place, "shared_expert"), mlp.shared_expert


def take(model: Any, state: Any) -> tuple[Any, dict[tuple[str | int, ...], jax.Array]]:
    """(the state without the parts of wholes, the wholes by the path of their module)."""
    wholes, parts = {}, set()
    for path, module in groups(model):
        if module.fused:
            continue
        weights = [getattr(module, name).weight.get_value() for name in module.joint[1]]
        found = whole(weights)
        if found is not None:
            wholes[path] = found
            parts |= set(map(id, weights))
    return (jax.tree.map(lambda a: None if id(a) in parts else a, state) if wholes else state), wholes


def give(model: Any, wholes: dict[tuple[str | int, ...], jax.Array]) -> None:
    """Puts each whole into its module, in place of the parts."""
    for path, weight in wholes.items():
        module = model
        for key in path:
            module = module[key] if isinstance(key, int) else getattr(module, key)
        name, parts = module.joint
        biases = [getattr(module, part).bias for part in parts]
        offset = None if biases[0] is None else jnp.concatenate([b.get_value() for b in biases])
        for part in parts:
            delattr(module, part)
        setattr(module, name, Linear(weight, offset))
        module.fused = True
