"""Error of each quantized weight against the float weight that it stands for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jq.errors import CheckpointError
from jq.qtensor import QTensor
from jq.state import load_state, module_of


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How one dequantized weight W' differs from the float weight W.

    Fields:
      module: path, e.g. "model.layers.0.mlp.up_proj".
      kind: what the weight is stored as, e.g. "nf4, block 64".
      bits_per_weight: of the stored tensor.
      relative: ||W' - W|| / ||W||, Frobenius norms.
      largest: max |W' - W|.
    """

    module: str
    kind: str
    bits_per_weight: float
    relative: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@jax.jit
def _errors(made: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array]:
    made, want = made.astype(jnp.float32), want.astype(jnp.float32)
    difference = made - want
    norm = jnp.maximum(jnp.linalg.norm(want), jnp.finfo(jnp.float32).tiny)
    return jnp.linalg.norm(difference) / norm, jnp.max(jnp.abs(difference))


def layer_errors(
    model: str | os.PathLike, against: str | os.PathLike, *, advance: Callable[[int, int, str], None] | None = None
) -> list[LayerError]:
    """The errors of every quantized weight of `model`, in stored order.

    Args:
      model: quantized checkpoint.
      against: the float checkpoint (or any other) with weights of the same names.
      advance: called with (weights done, weights, module).

    Raises:
      CheckpointError: `model` has no quantized weight, or `against` lacks one of its weights or has another shape.
    """
    state, reference = load_state(model, lazy=True), load_state(against, lazy=True)
    found = []
    names = list(state)
    for i, name in enumerate(names):
        value = state[name]
        if isinstance(value, QTensor):
            found.append(_error_of(name, value, reference, str(against)))
        if advance is not None:
            advance(i + 1, len(names), module_of(name))
    if not found:
        raise CheckpointError(
            f"{model}: has no quantized weight; the quantized checkpoint comes first, the float one second"
        )
    return found


def _error_of(name: str, value: QTensor, reference: Any, label: str) -> LayerError:
    if name not in reference:
        raise CheckpointError(f"{label}: {name}: missing, so its error cannot be taken")
    want = reference[name]
    dense = want.dequantize(jnp.float32) if isinstance(want, QTensor) else jnp.asarray(want)
    if tuple(dense.shape) != tuple(value.shape):
        raise CheckpointError(f"{label}: {name}: found shape {tuple(dense.shape)}, expected {tuple(value.shape)}")
    relative, largest = _errors(value.dequantize(jnp.float32), dense)
    return LayerError(module_of(name), value.describe(), value.bits_per_weight, float(relative), float(largest))
