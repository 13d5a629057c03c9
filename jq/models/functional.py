"""A model as (graph definition, state), the form in which compiled functions take it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jq.models import joined
from jq.nn import Packed


class Graph:
    """A graph definition that is hashed once.

    `jax.jit` hashes its static arguments at every call, and NNX walks the whole model for that: 3 ms for 30 layers, as
    much as a token takes on a GPU.
    """

    def __init__(self, definition: Any) -> None:
        self.definition, self._hash = definition, hash(definition)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self is other or (self._hash == other._hash and self.definition == other.definition)


def split(model: nnx.Module) -> tuple[Graph, Any]:
    """(graph definition, state) of a model as it computes; `join` is the inverse.

    Without what is kept for saving only, and with one weight in place of those that lie together (`joined`).
    """
    graph, (hollow, rest) = light(model)
    rest, wholes = joined.take(model, rest)
    return Graph(graph), (hollow, rest, wholes)


def join(graph: Graph, state: Any) -> Any:
    hollow, rest, wholes = state
    model = nnx.merge(graph.definition, hollow, rest)
    joined.give(model, wholes)
    return model


def light(module: nnx.Module) -> tuple[Any, Any]:
    """`nnx.split` of a module without the arrays that are kept for saving only; `nnx.merge` is the inverse."""
    graph, packed, rest = nnx.split(module, Packed, ...)
    return graph, (jax.tree.map(lambda _: None, packed), rest)
