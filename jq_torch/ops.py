"""The torch operators: `jq::linear`, `jq::experts` and their gradients.

One operator serves every format: it takes the packed tensors of a QTensor and a short string, its *spec*, that names
the static rest (`spec_of`). torch.compile, torch.export and autograd see an operator with a shape rule; the arithmetic
is `jq`'s own, so that both frameworks compute the same numbers.

Weight-only tensors are dequantized by one compiled JAX program and multiplied by torch. Tensors whose activations are
quantized go through `jq.matmul`, with the number of tokens padded to a power of two, so that few programs are compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from jq import activations
from jq.matmul import matmul
from jq_torch import bridge

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Stands for an array in a QTensor without arrays: the index of its tensor and what that stands for."""

    index: int
    kind: bridge.Kind


@dataclasses.dataclass(frozen=True)
class Static:
    """What a spec names: the pytree of a QTensor, the kinds of its leaves, and how to multiply with it."""

    tree: Any
    kinds: tuple[bridge.Kind, ...]
    activation: bool


_specs: dict[Static, str] = {}
_statics: dict[str, Static] = {}


def spec_of(skeleton: Any, *, activation: bool) -> str:
    """The spec of a QTensor whose arrays are `Leaf`s; equal QTensors of different layers get the same one.

    Args:
      skeleton: QTensor with `Leaf` in place of arrays; only the tree and the kinds count.
      activation: quantize the activations as the tensor says.
    """
    leaves, tree = jax.tree.flatten(skeleton)
    static = Static(tree, tuple(leaf.kind for leaf in leaves), activation)
    spec = _specs.get(static)
    if spec is None:
        spec = _specs[static] = f"{type(skeleton).__name__}-{len(_specs)}"
        _statics[spec] = static
    return spec


def static_of(spec: str) -> Static:
    """What a spec names."""
    return _statics[spec]


def own_dtype(spec: str) -> str:
    """dtype of the dequantized weight of a spec."""
    static = _statics[spec]
    return jax.tree.unflatten(static.tree, [None] * len(static.kinds)).dtype


def quantizes_activations(spec: str) -> bool:
    return _statics[spec].activation


def bucket(tokens: int) -> int:
    """Number of rows that a program is compiled for: the next power of two, above 4096 the next multiple of it."""
    if tokens > 4096:
        return -(-tokens // 4096) * 4096
    return 1 << max(tokens - 1, 0).bit_length()


@functools.lru_cache(maxsize=1024)
def _dense_program(spec: str, dtype: str) -> Any:
    tree = _statics[spec].tree
    return jax.jit(lambda leaves: jax.tree.unflatten(tree, leaves).dequantize(dtype))


@functools.lru_cache(maxsize=1024)
def _matmul_program(spec: str) -> Any:
    tree = _statics[spec].tree

    def run(x: Any, leaves: Any, bias: Any) -> Any:
        return activations.matmul(x, jax.tree.unflatten(tree, leaves), bias).astype(x.dtype)

    return jax.jit(run)


def leaves_of(packed: list[torch.Tensor], spec: str) -> list[Any]:
    """The packed tensors as the arrays that they stand for."""
    return [bridge.jax_leaf(t, d) for t, d in zip(packed, _statics[spec].kinds, strict=True)]


def dense(packed: list[torch.Tensor], spec: str, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized weight [*stack, N, K], rounded as the original library rounds, then cast to `dtype`."""
    with _dense(packed, spec, dtype) as weight:
        return weight.clone() if weight.is_cuda else weight


@contextlib.contextmanager
def _dense(packed: list[torch.Tensor], spec: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """`dense` for the length of a `with` block (`bridge.borrowed`); JAX has no float64, which is made of float32."""
    name = bridge.dtype_name(torch.float32 if dtype is torch.float64 else dtype)
    with bridge.device_kept(packed[0]), bridge.borrowed(_dense_program(spec, name)(leaves_of(packed, spec))) as weight:
        yield weight.to(dtype)


_kernels: Any = WeakTensorKeyDictionary()  # first packed tensor -> (pointers, kernel)


def cuda_weight(packed: list[torch.Tensor], spec: str, dtype: torch.dtype) -> Any:
    """The GPU kernel of a weight in the kernels' order (`in_kernels_order`), None where there is none for it.

    It points at the packed tensors; where they lie elsewhere later (FSDP gathers them anew) it is made again. Kernels
    copy 16 bytes at a time: tensors that somebody assigned from the middle of others may not lie so.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not _ordered(spec):
        return None
    pointers = tuple(t.data_ptr() for t in packed)
    if any(at % 16 for at in pointers):
        return None
    found = _kernels.get(packed[0])
    if found is None or found[0] != pointers:
        found = _kernels[packed[0]] = (pointers, _cuda_weight(packed, spec))
    return found[1]


@functools.cache
def _ordered(spec: str) -> bool:
    static = _statics[spec]
    return bool(getattr(jax.tree.unflatten(static.tree, static.kinds), "layout", "")) and not static.activation


def _cuda_weight(packed: list[torch.Tensor], spec: str) -> Any:
    from pallas_kernels import torch as kernels

    static = _statics[spec]
    if kernels.available() is not None:  # brought here from another GPU
        return None
    structs = [
        jax.ShapeDtypeStruct(() if kind.scalar else tuple(t.shape), kind.dtype)
        for t, kind in zip(packed, static.kinds, strict=True)
    ]
    held = [t.detach() for t in packed]  # `packed[0]` is a weak key: its value must not keep it
    made = (jax.tree.unflatten(static.tree, leaves) for leaves in (structs, held))
    # The first use may be the warm-up of a CUDA graph, whose pool takes what this thread allocates and must end empty
    with ThreadPoolExecutor(1) as outside:
        return outside.submit(kernels.TorchWeight.over, *made).result()


def kernels_run(device: torch.device) -> bool:
    """Whether tensors on this device can be multiplied by the GPU kernels."""
    if device.type != "cuda":
        return False
    from pallas_kernels import torch as kernels

    return kernels.available() is None


def in_kernels_order(packed: list[torch.Tensor], skeleton: Any) -> Any:
    """A QTensor with its arrays in the order of the GPU kernels, as JAX arrays; None where no kernel takes it.

    Args:
      packed: the integer tensors of `skeleton`'s leaves.
    """
    from pallas_kernels import torch as kernels

    leaves, tree = jax.tree.flatten(skeleton)
    there = packed[0].device.type == "cuda" and jax.default_backend() == "gpu"
    convert = bridge.jax_leaf if there else bridge.numpy_leaf
    tensor = jax.tree.unflatten(tree, [convert(t, leaf.kind) for t, leaf in zip(packed, leaves, strict=True)])
    reason = kernels.refusal(tensor)
    if reason is None:
        return kernels.prepare(tensor, packed[0].device)
    _log.info("%r: no kernel: %s; dequantized at each call", tensor, reason)
    return None


def _linear(
    x: torch.Tensor, packed: list[torch.Tensor], spec: str, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """The bias belongs in here: libraries add it before they round the product, or before they quantize the output."""
    if not _statics[spec].activation:
        kernel = cuda_weight(packed, spec, x.dtype) if x.is_cuda else None
        if kernel is not None:
            return kernel(x) if bias is None else kernel(x) + bias
        with _dense(packed, spec, x.dtype) as weight:
            return torch.nn.functional.linear(x, weight, bias)
    if x.dtype is torch.float64:
        return _linear(x.float(), packed, spec, out_features, None if bias is None else bias.float()).double()
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    padded = torch.nn.functional.pad(rows, (0, 0, 0, bucket(tokens) - tokens))
    with bridge.device_kept(x):
        added = None if bias is None else bridge.to_jax(bias)
        y = bridge.from_jax(_matmul_program(spec)(bridge.to_jax(padded), leaves_of(packed, spec), added))
    return y[:tokens].reshape(*x.shape[:-1], out_features)


def _linear_dx(dy: torch.Tensor, packed: list[torch.Tensor], spec: str, in_features: int) -> torch.Tensor:
    with _dense(packed, spec, dy.dtype) as weight:
        return torch.matmul(dy, weight)


@functools.lru_cache(maxsize=1024)
def _expert_program(spec: str, dtype: str) -> Any:
    tree = _statics[spec].tree
    return jax.jit(lambda leaves, expert: jax.tree.unflatten(tree, leaves)[expert].dequantize(dtype))


@functools.lru_cache(maxsize=1024)
def _expert_matmul_program(spec: str) -> Any:
    tree = _statics[spec].tree
    return jax.jit(lambda x, leaves, expert: matmul(x, jax.tree.unflatten(tree, leaves)[expert]).astype(x.dtype))


@bridge.device_kept()
def _experts(
    x: torch.Tensor, expert: torch.Tensor, packed: list[torch.Tensor], spec: str, out_features: int
) -> torch.Tensor:
    """Row s of the result is x[s] times the weight of expert[s]; rows of an expert that is not there are zero."""
    if x.dtype is torch.float64:
        return _experts(x.float(), expert, packed, spec, out_features).double()
    kernel = cuda_weight(packed, spec, x.dtype) if x.is_cuda else None
    if kernel is not None:
        from pallas_kernels import torch_stack

        return torch_stack.matmul(kernel, x, expert)
    y = x.new_zeros((x.shape[0], out_features))
    leaves = leaves_of(packed, spec)
    active, name = _statics[spec].activation, bridge.dtype_name(x.dtype)
    for e in torch.unique(expert).tolist():
        if not 0 <= e < packed[0].shape[0]:
            continue
        rows = torch.nonzero(expert == e).flatten()
        if active:
            padded = torch.nn.functional.pad(x[rows], (0, 0, 0, bucket(len(rows)) - len(rows)))
            y[rows] = bridge.from_jax(_expert_matmul_program(spec)(bridge.to_jax(padded), leaves, e))[: len(rows)]
        else:
            with bridge.borrowed(_expert_program(spec, name)(leaves, e)) as weight:
                y[rows] = torch.nn.functional.linear(x[rows], weight)
    return y


@bridge.device_kept()
def _experts_dx(
    dy: torch.Tensor, expert: torch.Tensor, packed: list[torch.Tensor], spec: str, in_features: int
) -> torch.Tensor:
    if dy.dtype is torch.float64:
        return _experts_dx(dy.float(), expert, packed, spec, in_features).double()
    dx = dy.new_zeros((dy.shape[0], in_features))
    leaves, name = leaves_of(packed, spec), bridge.dtype_name(dy.dtype)
    for e in torch.unique(expert).tolist():
        if 0 <= e < packed[0].shape[0]:
            rows = torch.nonzero(expert == e).flatten()
            with bridge.borrowed(_expert_program(spec, name)(leaves, e)) as weight:
                dx[rows] = dy[rows] @ weight
    return dx


library = torch.library.Library("jq", "DEF")  # define + impl costs 2 us a call, torch.library.custom_op 10
library.define("linear(Tensor x, Tensor[] packed, str spec, int out_features, Tensor? bias) -> Tensor")
library.define("linear_dx(Tensor dy, Tensor[] packed, str spec, int in_features) -> Tensor")
library.define("experts(Tensor x, Tensor expert, Tensor[] packed, str spec, int out_features) -> Tensor")
library.define("experts_dx(Tensor dy, Tensor expert, Tensor[] packed, str spec, int in_features) -> Tensor")
for _key in ("CPU", "CUDA"):
    library.impl("experts", _experts, _key)
    library.impl("experts_dx", _experts_dx, _key)
    library.impl("linear", _linear, _key)
    library.impl("linear_dx", _linear_dx, _key)


@torch.library.register_fake("jq::linear", lib=library)
def _(
    x: torch.Tensor, packed: list[torch.Tensor], spec: str, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("jq::linear_dx", lib=library)
def _(dy: torch.Tensor, packed: list[torch.Tensor], spec: str, in_features: int) -> torch.Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


@torch.library.register_fake("jq::experts", lib=library)
def _(x: torch.Tensor, expert: torch.Tensor, packed: list[torch.Tensor], spec: str, out_features: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("jq::experts_dx", lib=library)
def _(dy: torch.Tensor, expert: torch.Tensor, packed: list[torch.Tensor], spec: str, in_features: int) -> torch.Tensor:
    return dy.new_empty((dy.shape[0], in_features))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, packed, spec, _, _ = inputs
    ctx.save_for_backward(*packed)
    ctx.spec, ctx.in_features = spec, x.shape[-1]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    """Gradients for x, through the dequantized weight, and the bias: rounding of activations counts as the identity."""
    packed = list(ctx.saved_tensors)
    dx = torch.ops.jq.linear_dx(dy.contiguous(), packed, ctx.spec, ctx.in_features)
    db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return dx, [None] * len(packed), None, None, db


torch.library.register_autograd("jq::linear", _backward, setup_context=_setup, lib=library)


def _setup_experts(ctx: Any, inputs: Any, output: Any) -> None:
    x, expert, packed, spec, _ = inputs
    ctx.save_for_backward(expert, *packed)
    ctx.spec, ctx.in_features = spec, x.shape[-1]


def _backward_experts(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    expert, *packed = ctx.saved_tensors
    dx = torch.ops.jq.experts_dx(dy.contiguous(), expert, packed, ctx.spec, ctx.in_features)
    return dx, None, [None] * len(packed), None, None


torch.library.register_autograd("jq::experts", _backward_experts, setup_context=_setup_experts, lib=library)

linear = torch.ops.jq.linear.default
experts = torch.ops.jq.experts.default


def skeleton_of(tensor: Any) -> tuple[Any, list[torch.Tensor]]:
    """Splits a QTensor into its static part (with `Leaf`s) and the integer tensors that hold its bits."""
    leaves, tree = jax.tree.flatten(tensor)
    carried = [bridge.carrier_of(a) for a in leaves]
    infos = [Leaf(i, kind) for i, (_, kind) in enumerate(carried)]
    return jax.tree.unflatten(tree, infos), [tensor for tensor, _ in carried]
