"""Flax NNX modules over quantized weights: `Linear`, `Embedding`, `RMSNorm`, and `replace_linears` for any NNX model.

Weights are [out_features, in_features] as checkpoints store them (`nnx.Linear` holds the transpose). A quantized
weight sits in a `QVar`, which no `nnx.Param` filter sees, so codes stay out of gradients and optimizers.

A `Linear` holds its weight once, or twice where that is faster: a dense copy that computes, and beside it the packed
tensor that `jq.save` and `jq.quantized` use, in a `Packed` variable. Compiled functions leave `Packed` out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jq import activations
from jq.errors import JqWarning, UnsupportedError
from jq.matmul import matmul
from jq.qtensor import Affine, Codebook, NarrowFloat, QTensor
from jq.quantize import Skip, chosen

Array = Any  # numpy.ndarray | jax.Array


class QVar(nnx.Variable):
    """A quantized tensor that computes."""


class Fixed(nnx.Variable):
    """Arrays that compute, are no parameters, and are saved from elsewhere."""


class Packed(nnx.Variable):
    """A quantized tensor that is kept for saving while a dense copy computes."""


class Linear(nnx.Module):
    """y = x @ weight.T + bias.

    Args:
      weight: QTensor or array [N, K].
      bias: array [N] or None.
      packed: the quantized tensor that a dense `weight` was made from, kept for saving.
      quantize_activations: execute the activation quantization that a QTensor describes.
    """

    def __init__(
        self,
        weight: Any,
        bias: Array | None = None,
        *,
        packed: QTensor | None = None,
        quantize_activations: bool = True,
    ) -> None:
        self.weight = QVar(weight) if isinstance(weight, QTensor) else nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.packed = None if packed is None else Packed(packed)
        self.quantize_activations = quantize_activations

    @property
    def out_features(self) -> int:
        return self.weight.get_value().shape[-2]

    @property
    def in_features(self) -> int:
        return self.weight.get_value().shape[-1]

    @property
    def quantized(self) -> QTensor | None:
        """The quantized weight, None where there is none."""
        weight = self.weight.get_value() if self.packed is None else self.packed.get_value()
        return restored(weight) if isinstance(weight, QTensor) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[..., K] -> float[..., N] in x's dtype."""
        weight = self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        if getattr(weight, "activation", None) is not None and (
            self.quantize_activations or activations.prepares(weight)
        ):
            if not self.quantize_activations:
                weight = activations.without_quantization(weight)
            return activations.matmul(x, weight, bias)  # some libraries add the bias before they scale or quantize
        y = product(x, weight, quantize_activations=self.quantize_activations)
        return y if bias is None else y + bias.astype(y.dtype)


class FusedLinear(nnx.Module):
    """Several layers of one input as one matrix, for one kernel launch; at the surface each part keeps its name.

    Args:
      weight: the parts' rows one after the other (`fuse`), in the device's order.
      bias: [sum of rows] or None.
      parts: (name, rows) of each part.
      shells: the parts without the arrays that `weight` holds.
    """

    def __init__(
        self, weight: QTensor, bias: Array | None, parts: tuple[tuple[str, int], ...], shells: tuple[QTensor, ...]
    ) -> None:
        self.weight = QVar(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.parts = parts
        self.shells = Packed(shells)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.weight.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)

    def quantized(self) -> dict[str, QTensor]:
        """The parts' own tensors by name."""
        whole, found, start = restored(self.weight.get_value()), {}, 0
        for (name, rows), shell in zip(self.parts, self.shells.get_value(), strict=True):
            cut = whole[start : start + rows]
            found[name] = shell.replace(**{f: getattr(cut, f) for f in BY_ROW[type(whole)]})
            start += rows
        return found

    def biases(self) -> dict[str, Array]:
        """The parts' biases by name."""
        if self.bias is None:
            return {}
        ends = np.cumsum([rows for _, rows in self.parts])[:-1].tolist()
        values = jnp.split(self.bias.get_value(), ends)
        return {name: value for (name, _), value in zip(self.parts, values, strict=True)}


# Fields that hold one row for each row of the weight.
BY_ROW: dict[type, tuple[str, ...]] = {
    Affine: ("codes", "scales", "zeros"),
    Codebook: ("codes", "absmax"),
    NarrowFloat: ("codes", "scales"),
}


def fuse(weights: Sequence[QTensor]) -> tuple[QTensor, tuple[QTensor, ...]] | None:
    """(one tensor of all rows, what remains of each part), or None where the parts differ in more than their rows."""
    first = weights[0]
    fields = BY_ROW.get(type(first))
    if fields is None or any(type(w) is not type(first) for w in weights):
        return None
    shells = tuple(w.replace(**dict.fromkeys(fields)) for w in weights)
    if len({jax.tree.structure(s.replace(extras={}, source=None)) for s in shells}) > 1:
        return None
    if any(not _splits_by_rows(w, fields) for w in weights) or not _equal([s.replace(extras={}) for s in shells]):
        return None
    rows = {f: [getattr(w, f) for w in weights] for f in fields}
    joined = {f: None if v[0] is None else jnp.concatenate(v) for f, v in rows.items()}
    return first.replace(**joined, extras={}, source=None), shells


def _splits_by_rows(w: QTensor, fields: tuple[str, ...]) -> bool:
    values = [getattr(w, f) for f in fields]
    grouping = w.grouping  # type: ignore[attr-defined]
    plain = all(v is None or (not isinstance(v, QTensor) and v.shape[0] == w.out_features) for v in values)
    return plain and grouping.kind == "block" and grouping.rows == 1 and w.activation is None  # type: ignore[attr-defined]


def _equal(shells: list[QTensor]) -> bool:
    """Whether what the parts share (tables, g_idx) has equal values."""
    first = jax.tree.leaves(shells[0])
    others = (jax.tree.leaves(s) for s in shells[1:])
    return all(np.array_equal(a, b) for leaves in others for a, b in zip(first, leaves, strict=True))


class Embedding(nnx.Module):
    """Rows of a table [V, D]. A quantized table computes as a dense copy; `packed` keeps it for saving.

    Attributes:
      scale_in_float32: a model that scales its embeddings multiplies in float32, as Gemma's own quantized tables do
        (transformers' QuantizedEmbedding), not by a factor that is rounded to the dtype of the rows.
    """

    def __init__(self, weight: Array, *, packed: QTensor | None = None) -> None:
        self.weight = nnx.Param(weight)
        self.packed = None if packed is None else Packed(packed)
        source = None if packed is None else getattr(packed, "source", None)
        self.scale_in_float32 = source is not None and source.format == "gemma"

    @property
    def quantized(self) -> QTensor | None:
        return None if self.packed is None else self.packed.get_value()

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int[...] -> float[..., D]. Ids outside the table give NaN (JAX would clamp them silently)."""
        return jnp.take(self.weight.get_value(), ids, axis=0, mode="fill")

    def attend(self, x: jax.Array) -> jax.Array:
        """The tied output matrix: float[..., D] -> float[..., V]."""
        return product(x, self.weight.get_value())


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), computed in float32, in the order of transformers' Llama norm."""

    def __init__(self, weight: Array, eps: float, offset: float = 0.0) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight.get_value()
        if self.offset:  # Gemma multiplies in float32, Llama after the cast
            return (wide * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return weight.astype(x.dtype) * wide.astype(x.dtype)


def product(x: jax.Array, weight: Any, *, quantize_activations: bool = True) -> jax.Array:
    """x [..., K] times weight [N, K], a QTensor or an array: [..., N] in x's dtype."""
    if isinstance(weight, QTensor) and isinstance(x, jax.core.Tracer) and jax.default_backend() == "cpu":
        weight = after(weight, x)
    return matmul(x, weight, quantize_activations=quantize_activations)


def after(weight: QTensor, x: jax.Array) -> QTensor:
    """The same weight, to be unpacked not before `x` is there.

    XLA's CPU backend schedules whatever is ready: in a compiled model it would dequantize all layers first and hold
    them (428 MB for SmolLM2-135M), also before a loop, and it drops optimization barriers before it schedules. So the
    codes get a real dependency: one bit is flipped where the first activation is one certain NaN, which no
    computation gives.
    """
    first = jax.lax.bitcast_convert_type(x.reshape(-1)[:1].astype(jnp.float32), jnp.uint32)[0]
    flip = first == jnp.uint32(0x7FC0DEAD)

    def tie(a: jax.Array) -> jax.Array:
        return a ^ flip.astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.integer) else a

    if not hasattr(weight, "codes"):  # a weight made of others
        return jax.tree.map(tie, weight)
    return weight.replace(codes=jax.tree.map(tie, weight.codes))


def linear_of(
    weight: QTensor,
    bias: Array | None = None,
    *,
    dtype: Any = jnp.float32,
    packed: bool = False,
    quantize_activations: bool = True,
) -> Linear:
    """A `Linear` over a quantized weight, in the form that computes best.

    Args:
      weight: QTensor [N, K].
      bias: array [N] or None.
      dtype: compute dtype of a dense copy.
      packed: compute from the packed tensor and hold nothing else. False: dequantize once and keep the packed tensor
        for saving; a weight with activation quantization that is executed always stays packed.
      quantize_activations: execute the activation quantization that the tensor describes.
    """
    active = getattr(weight, "activation", None) is not None and (quantize_activations or activations.prepares(weight))
    if packed or active:
        weight = weight if active else prepared(weight, dtype)
        return Linear(weight, bias, quantize_activations=quantize_activations)
    dense = weight.dequantize(dtype)
    kept = weight if jax.default_backend() == "cpu" else weight.to_numpy()  # what only saving needs stays on the host
    return Linear(dense, bias, packed=kept, quantize_activations=quantize_activations)


def prepared(weight: QTensor, dtype: Any) -> QTensor:
    """The weight in the order of the GPU's kernels where they take it; else as it is, with a warning why."""
    if jax.default_backend() != "gpu":
        return weight
    from pallas_kernels import api, tensors

    if api.device_reason() is not None:  # which it has told by itself
        return weight
    reason = tensors.refusal(weight) if np.dtype(dtype).itemsize == 2 else f"activations are {np.dtype(dtype)}"
    if reason is None:
        return tensors.prepare(weight)
    warnings.warn(
        f"some weights have no GPU kernel ({reason}): they are dequantized in every product, which takes longer than "
        "dense weights do; packed=False dequantizes them once",
        JqWarning,
        stacklevel=2,
    )
    return weight


def restored(weight: QTensor) -> QTensor:
    """The weight in the canonical order: the inverse of `prepared`."""
    if not getattr(weight, "layout", ""):
        return weight
    from pallas_kernels import tensors

    return tensors.restore(weight)


def quantized(model: nnx.Module) -> dict[str, QTensor]:
    """The quantized tensors of a model by module path (by parameter name where a tensor is a parameter of its own)."""
    found: dict[str, QTensor] = {}
    inside = set()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, FusedLinear):
            inside.add(path)
            found |= {".".join(map(str, (*path[:-1], name))): q for name, q in module.quantized().items()}
    for path, variable in nnx.to_flat_state(nnx.state(model, (QVar, Packed))):
        if path[:-1] in inside:
            continue
        name = ".".join(map(str, path))
        name = name.removesuffix(".weight").removesuffix(".packed").removesuffix("_packed")
        found[name] = restored(variable.get_value())
    return found


def replace_linears(
    model: nnx.Module,
    method: Any,
    *,
    skip: Skip = (),
    packed: bool = True,
    dtype: Any = None,
) -> list[str]:
    """Quantizes every linear layer of an NNX module in place (`nnx.Linear` and dense `jq.nn.Linear`).

    Args:
      model: any NNX module; layers are found wherever they sit.
      method: what quantizes a weight: an object with `.quantize(weight [N, K], name=path) -> QTensor`, such as `jq.NF4()`.
      skip: paths that stay as they are, as in `jq.quantize`: names, ends of names, prefixes, shell patterns ("*.lm_head"),
        a function path -> bool, or None for the output matrix and MoE routers.
      packed: see `linear_of`.
      dtype: compute dtype of dense copies, None for the dtype of each layer's weight.

    Returns:
      The paths that were replaced, in order.

    Raises:
      UnsupportedError: the module itself is a linear layer (there is no parent to put the new one into).
      ValueError: a pattern of `skip` that matches nothing, weights that are not finite.
    """
    # A list first: the walk must not meet its own replacements.
    found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear | Linear)]
    skipped = chosen([".".join(map(str, path)) for path, _ in found], skip)
    names = []
    for path, layer in found:
        name = ".".join(map(str, path))
        if skipped(name) or (isinstance(layer, Linear) and layer.quantized is not None):
            continue
        if not path:
            raise UnsupportedError("replace_linears: the module is itself a linear layer; quantize its parent")
        weight, bias = _dense_parts(layer)
        q = method.quantize(np.asarray(weight), name=name).to_jax()
        new = linear_of(q, bias, dtype=dtype or weight.dtype, packed=packed)
        _set(model, path, new)
        names.append(name)
    return names


def _dense_parts(layer: Any) -> tuple[Array, Array | None]:
    """Weight [N, K] and bias of a dense layer."""
    if isinstance(layer, nnx.Linear):
        return layer.kernel.get_value().T, None if layer.bias is None else layer.bias.get_value()
    return layer.weight.get_value(), None if layer.bias is None else layer.bias.get_value()


def _set(model: Any, path: tuple[Any, ...], value: nnx.Module) -> None:
    parent = model
    for key in path[:-1]:
        parent = parent[key] if isinstance(key, int) else getattr(parent, key)
    if isinstance(path[-1], int):
        parent[path[-1]] = value
    else:
        setattr(parent, path[-1], value)


def lossless(stored: Any, compute: Any) -> bool:
    """Whether every value of dtype `stored` survives a cast to `compute` and back."""
    stored, compute = np.dtype(stored), np.dtype(compute)
    return stored == compute or (compute == np.float32 and str(stored) in ("float16", "bfloat16"))
