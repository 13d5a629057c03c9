"""Hands a checkpoint's tensors to modules by name, checks shapes, and keeps account of what was used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jq import activations
from jq.errors import CheckpointError
from jq.formats.compressed_tensors_attention import Attentions, Inside
from jq.models import joined
from jq.models.spec import DecoderSpec
from jq.nn import Embedding, Fixed, FusedLinear, Linear, Packed, QVar, RMSNorm, fuse, linear_of, lossless, prepared
from jq.qtensor import QTensor
from jq.state import State

# Stored by old transformers versions; recomputed from config.json.
IGNORED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


class Reader:
    """Reads modules from a State.

    Args:
      state: name -> array or QTensor.
      spec: of the decoder (norm epsilon and offset).
      dtype: compute dtype.
      packed: compute linear layers from their packed weights.
      quantize_activations: execute activation quantization.
      label: file or directory for messages.
      fuse: join packed q/k/v and gate/up into one matrix each (one kernel launch).
      join: lay dense weights of one input one behind the other (`jq.models.joined`).
      attentions: what the checkpoint does inside attention layers.
      cache_scales: `k_scale` and `v_scale` are those of the cache that the model has.

    Attributes:
      kept: stored arrays that the compute dtype cannot hold exactly: name -> (stored array, compute array).
      stored: stored dtype of each dense tensor.
    """

    def __init__(
        self,
        state: State,
        spec: DecoderSpec,
        *,
        dtype: Any,
        packed: bool,
        quantize_activations: bool,
        label: str,
        fuse: bool = False,
        join: bool = False,
        attentions: Attentions | None = None,
        cache_scales: bool = False,
    ) -> None:
        self.state, self.spec, self.label = state, spec, label
        self.dtype, self.packed, self.quantize_activations = np.dtype(dtype), packed, quantize_activations
        self.fuse, self.join = fuse and packed, join
        self.attentions, self.cache_scales = attentions, cache_scales
        self.used: set[str] = set()
        self.kept: dict[str, tuple[Any, Any]] = {}
        self.stored: dict[str, np.dtype] = {}

    def linear(self, path: str, shape: tuple[int, int], bias: bool = False) -> Linear:
        """The layer `path` with a weight of `shape`; a stored bias is used even where none is required."""
        weight = self.take(f"{path}.weight", shape)
        name = f"{path}.bias"
        offset = self.array(name, shape[:1]) if bias or name in self.state else None
        if isinstance(weight, QTensor):
            self._check_activation(path, weight)
            return linear_of(
                weight,
                offset,
                dtype=self.dtype,
                packed=self.packed,
                quantize_activations=self.quantize_activations,
            )
        return Linear(self._compute(f"{path}.weight", weight), offset)

    def linears(self, path: str, parts: dict[str, int], inputs: int, bias: bool) -> list[Linear]:
        """Layers `path`.name of one input, dense ones beside each other where that is faster; arguments as in `fused`."""
        rows, layers = None, []
        if self.join and joined.Rows.fit(tuple(parts.values()), inputs, self.dtype):
            rows = joined.Rows(tuple(parts.values()), inputs, self.dtype)
        for part, count in parts.items():
            layer = self.linear(f"{path}.{part}", (count, inputs), bias)
            layers.append(layer)
            if rows is not None:
                rows = self._moved(f"{path}.{part}.weight", layer, rows)
        if rows is not None and len({layer.bias is None for layer in layers}) == 1:
            rows.close()
        return layers

    def _moved(self, name: str, layer: Linear, rows: joined.Rows) -> joined.Rows | None:
        """Moves a dense weight to the others of its input; None where it cannot be there."""
        weight = layer.weight.get_value()
        if isinstance(weight, QTensor) or weight.dtype != rows.dtype:
            return None
        moved = rows.add(weight)
        if moved is weight:
            return None
        layer.weight.set_value(moved)
        if name in self.kept:
            self.kept[name] = (self.kept[name][0], moved)
        return rows

    def fused(self, path: str, parts: dict[str, int], inputs: int, bias: bool) -> FusedLinear | None:
        """Layers `path`.name of one input as one, where the device computes from packed weights and these fit together.

        Args:
          path: of the parent.
          parts: name -> out_features.
          inputs: in_features of all.
          bias: whether each must have a bias.
        """
        if not self.fuse:
            return None
        names = {part: f"{path}.{part}" for part in parts}
        weights = [self.state[f"{n}.weight"] for n in names.values() if f"{n}.weight" in self.state]
        with_bias = [f"{n}.bias" in self.state for n in names.values()]
        if len(weights) < len(parts) or len(set(with_bias)) > 1 or not all(isinstance(w, QTensor) for w in weights):
            return None
        joined = fuse(weights)
        if joined is None:
            return None
        for weight, (part, rows) in zip(weights, parts.items(), strict=True):
            self._check(f"{names[part]}.weight", weight, (rows, inputs))
        biases = [self.array(f"{names[p]}.bias", (rows,)) for p, rows in parts.items()] if bias or with_bias[0] else []
        whole, shells = joined
        offset = jnp.concatenate(biases) if biases else None
        return FusedLinear(prepared(whole, self.dtype), offset, tuple(parts.items()), shells)

    def embedding(self, path: str, shape: tuple[int, int]) -> Embedding:
        weight = self.take(f"{path}.weight", shape)
        if isinstance(weight, QTensor):
            return Embedding(weight.dequantize(self.dtype), packed=weight)
        return Embedding(self._compute(f"{path}.weight", weight))

    def norm(self, path: str, width: int) -> RMSNorm:
        return RMSNorm(self.array(f"{path}.weight", (width,)), self.spec.norm_eps, self.spec.norm_offset)

    def array(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A dense tensor in the compute dtype."""
        value = self.take(name, shape)
        if isinstance(value, QTensor):
            raise CheckpointError(f"{self.label}: {name}: is quantized, expected a dense tensor of {shape}")
        return self._compute(name, value)

    def inside(self, path: str) -> tuple[Inside, Fixed] | None:
        """What happens to queries, keys and values of an attention layer, and its arrays; None: nothing."""
        found = None if self.attentions is None else self.attentions.layer(path)
        return None if found is None else (found[0], Fixed({k: jnp.asarray(v) for k, v in found[1].items()}))

    def stack(self, name: str, shape: tuple[int, int, int]) -> tuple[Any, Any]:
        """A parameter of stacked matrices: (Variable that computes, `Packed` or None).

        Args:
          name: of the parameter.
          shape: [E, N, K] of a QTensor; a dense one is stored transposed, [E, K, N].
        """
        value = self.take(name, None)
        dense = (shape[0], shape[2], shape[1])
        expected = shape if isinstance(value, QTensor) else dense
        if tuple(value.shape) != expected:
            raise CheckpointError(f"{self.label}: {name}: found shape {tuple(value.shape)}, expected {expected}")
        if not isinstance(value, QTensor):
            return nnx.Param(self._compute(name, value)), None
        if value.activation is not None and not self.quantize_activations:
            value = activations.without_quantization(value)
        if value.activation is not None:  # inputs are rounded to the grid of each expert's product
            return QVar(value), None
        if self.packed:
            return QVar(prepared(value, self.dtype)), None
        return nnx.Param(jnp.swapaxes(value.dequantize(self.dtype), 1, 2)), Packed(value)

    def optional(self, name: str, shape: tuple[int, ...], *others: tuple[int, ...]) -> Any:
        """An `nnx.Param` of a tensor that may be absent (scalars may be stored as () or (1,)); else None."""
        if name not in self.state:
            return None
        value = self.take(name, None)
        if tuple(np.shape(value)) not in (shape, *others, ()):
            raise CheckpointError(f"{self.label}: {name}: found shape {tuple(np.shape(value))}, expected {shape}")
        return nnx.Param(self._compute(name, value))

    def take(self, name: str, shape: tuple[int, ...] | None) -> Any:
        """The stored tensor.

        Raises:
          CheckpointError: it is missing, or its shape is another.
        """
        if name not in self.state:
            near = sorted(k for k in self.state if k.startswith(name.rsplit(".", 2)[0] + "."))[:6]
            raise CheckpointError(
                f"{self.label}: {name}: missing, and no weight is ever made up. "
                + (f"Beside it there are {', '.join(near)}" if near else "Nothing with this prefix is stored")
            )
        value = self.state[name]
        self._check(name, value, shape)
        return value

    def _check(self, name: str, value: Any, shape: tuple[int, ...] | None) -> None:
        """Counts a tensor as used; a shape other than the config's is an error."""
        self.used.add(name)
        if shape is not None and tuple(value.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.label}: {name}: found shape {tuple(value.shape)}, expected {tuple(shape)} from config.json"
            )

    def _check_activation(self, path: str, weight: QTensor) -> None:
        """Static scales of the inputs, where they will be used: they must be numbers."""
        activation = getattr(weight, "activation", None)
        for key in activation.parameters if activation is not None and self.quantize_activations else ():
            value = np.asarray(weight.extras[key])
            if key.endswith("scale") and (not jnp.issubdtype(value.dtype, jnp.floating) or np.isnan(value).any()):
                what = "NaN" if jnp.issubdtype(value.dtype, jnp.floating) else f"of dtype {value.dtype}"
                raise CheckpointError(
                    f"{self.label}: {path}.{key}: is {what}, inputs cannot be quantized with it; the file is damaged. "
                    "quantize_activations=False computes with float inputs"
                )

    def leftovers(self, ignored: tuple[str, ...] = ()) -> list[str]:
        """Tensors that no module took and that cannot be ignored."""
        return [n for n in self.state if n not in self.used and n not in ignored and not n.endswith(IGNORED)]

    def _compute(self, name: str, value: Any) -> jax.Array:
        """The array in the compute dtype; the stored one is kept where the way back would lose bits."""
        stored = np.dtype(value.dtype)
        if stored.kind in "iubc":
            raise CheckpointError(f"{self.label}: {name}: found dtype {stored}, expected a float tensor")
        self.stored[name] = stored
        array = _cast(jnp.asarray(value), self.dtype)
        if not lossless(stored, self.dtype) or (stored != self.dtype and bool(_has_nan(array))):
            self.kept[name] = (np.asarray(value), array)
        return array


@jax.jit
def _has_nan(array: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(array))


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else array.astype(dtype)
