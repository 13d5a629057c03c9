"""`JqLinear`: a linear layer over a QTensor, in place of `nn.Linear` or GPT-2's `Conv1D`.

Two states. *Stored*: while loading, and for as long as a layer is offloaded to disk, its parameters are the tensors of
the file (named `stored_0`, `stored_1`, ...; the file's names are mapped by the quantizer). *Packed*: the parameters
are the arrays of the QTensor (`q_codes`, `q_scales`, ...). `pack` goes from the first to the second.

Packed tensors are parameters, not buffers, and always integers:
- accelerate offloads parameters, buffers only on request (`offload_buffers=True`); FSDP shards parameters alone;
- an integer parameter has no gradient, no optimizer takes it, `.to(dtype)`, autocast and peft's preparation for k-bit
  training leave it alone. Float scales are held as the integers of their bits for that reason.
`num_parameters()` counts the weights that they stand for (`jq_torch.takeover`).

On a GPU whose kernels take the weight, its arrays lie in the kernels' order, and only there: `arrange` brings them there
when the layer comes to the GPU and back when it leaves it. Their names say so (`q_mma16_codes`), so that a state dict of
one order loads into a layer of the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from jq import activations
from jq_torch import bridge, ops

ORDERED = "mma16_"  # in the names of parameters that lie in the kernels' order
_Tensor, _compiles, _autocasts = torch.Tensor, torch.compiler.is_dynamo_compiling, torch.is_autocast_enabled
_traces, _modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack  # names: each look-up of one costs


class Packed(nn.Module):
    """What packed layers and packed experts have in common: a QTensor held as integer parameters.

    Attributes:
      origin: how the QTensor is made from stored tensors and back (`jq_torch.headers.Origin`); None after on-the-fly
        quantization by a method without one.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.quantize_activations, self.kernels = True, False
        self._skeletons: dict[str, Any] = {}  # role -> QTensor with ops.Leaf in place of arrays
        self._packed: dict[str, tuple[str, ...]] = {}  # role -> parameter names, in the order of its leaves
        self._operands: dict[str, tuple[str, ...]] = {}  # role -> names of those that the arithmetic needs
        self._spec: dict[str, str] = {}
        self._described: dict[str, str] = {}
        self._is_hf_initialized = True  # transformers' initialisation must not touch it

    def put(self, role: str, tensor: Any, device: Any = "cpu") -> None:
        """Takes a QTensor in; its arrays become parameters named `<role>_<path in the tensor>`."""
        skeleton, tensors = ops.skeleton_of(tensor)  # before the old parameters go, whose memory XLA may still read
        self.remove(role)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(skeleton)[0]]
        start = f"{role}_{ORDERED}" if skeleton.layout else f"{role}_"
        names = tuple(start + _name(path) for path in paths)
        for name, value in zip(names, tensors, strict=True):
            parameter = nn.Parameter(value.to(device), requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self._skeletons[role], self._packed[role], self._described[role] = skeleton, names, repr(tensor)
        self._name_operands(role)

    def _name_operands(self, role: str) -> None:
        slim = arithmetic_part(self._skeletons[role], self.quantize_activations)
        self._operands[role] = tuple(self._packed[role][leaf.index] for leaf in jax.tree.leaves(slim))
        active = getattr(slim, "activation", None) is not None
        self._spec[role] = ops.spec_of(slim, activation=active)

    def reserve(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Room for a stored tensor, on the meta device, for the loader to fill."""
        empty = torch.empty(shape, dtype=bridge.torch_dtype(dtype), device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def remove(self, role: str) -> None:
        """Forgets a QTensor and its parameters."""
        for name in self._packed.pop(role, ()):
            delattr(self, name)
        for table in (self._skeletons, self._operands, self._spec, self._described):
            table.pop(role, None)

    def use(self, *, quantize_activations: bool, kernels: bool) -> None:
        """How to multiply: with activations quantized where the tensor says so, with GPU kernels where they fit."""
        self.quantize_activations, self.kernels = quantize_activations, kernels
        for role in list(self._skeletons):
            self._name_operands(role)
            self.arrange(role)

    def qtensor(self, role: str = "q") -> Any:
        """The QTensor in its own order, with numpy arrays that share the parameters' memory on the CPU."""
        leaves, tree = jax.tree.flatten(self._skeletons[role])
        tensors = [getattr(self, name) for name in self._packed[role]]
        arrays = [bridge.numpy_leaf(t, leaf.kind) for t, leaf in zip(tensors, leaves, strict=True)]
        tensor = jax.tree.unflatten(tree, arrays)
        if not tensor.layout:
            return tensor
        import pallas_kernels

        return pallas_kernels.restore(tensor).to_numpy()

    def takes_kernels(self, role: str) -> bool:
        """Whether GPU kernels may multiply, as far as the layer's settings and state go."""
        return self.kernels and not ops.quantizes_activations(self._spec[role])

    @bridge.device_kept()
    def arrange(self, role: str = "q", *, ordered: bool | None = None) -> None:
        """Brings the arrays into the order of the GPU kernels or back to their own.

        Args:
          ordered: which of the two; None: the kernels' where the layer is on a GPU whose kernels take it.
        """
        tensors = [getattr(self, name) for name in self._packed[role]]
        device, skeleton = tensors[0].device, self._skeletons[role]
        if device.type == "meta" or type(tensors[0].data) is not torch.Tensor:  # without numbers, or a part of them
            return
        if ordered is None:
            ordered = self.takes_kernels(role) and ops.kernels_run(device)
        if ordered and not skeleton.layout:
            found = ops.in_kernels_order(tensors, skeleton)
            if found is not None:
                self.put(role, found, device)
        elif skeleton.layout and not ordered:
            self.put(role, self.qtensor(role), device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for role in list(self._packed):
            self.arrange(role)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for role in list(self._packed):
            found = [n.removeprefix(f"{prefix}{role}_") for n in state_dict if n.startswith(f"{prefix}{role}_")]
            if found:
                self.arrange(role, ordered=found[0].startswith(ORDERED))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for role in list(self._packed):
            self.arrange(role)

    def packed_names(self) -> list[str]:
        """Parameters that hold packed bits, all but the float ones that the model itself knows."""
        return [name for name, _ in self.named_parameters(recurse=False) if name != "bias"]

    def requires_grad_packed(self, requires: bool) -> None:
        """The loader makes float parameters trainable, also stored ones that stay on disk."""
        for name in self.packed_names():
            getattr(self, name).requires_grad_(requires)

    def num_weights(self) -> int:
        """Number of weights that the packed parameters stand for."""
        raise NotImplementedError

    def operands(self, role: str = "q") -> tuple[list[torch.Tensor], str]:
        """(packed tensors, spec) for `jq_torch.ops`, without what is carried only for saving."""
        return [getattr(self, name) for name in self._operands[role]], self._spec[role]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_dense_cache": None}  # made anew where they are needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for role in self._skeletons:  # a spec is a name within one process
            self._name_operands(role)


def arithmetic_part(tensor: Any, quantize_activations: bool = True) -> Any:
    """The QTensor without what is carried only for saving, so that the layers of a model share one spec.

    Without quantization of activations, a change of the input that belongs to the layer itself stays.
    """
    if not quantize_activations and getattr(tensor, "activation", None) is not None:
        tensor = activations.without_quantization(tensor)
    slim = tensor.without_extras().replace(source=None)
    return slim.replace(extras=slim.extras | held) if (held := _halves(tensor)) else slim


def _halves(tensor: Any) -> dict[str, Any]:
    """What of a tensor in the kernels' order is arithmetic, although it lies in `extras`."""
    if not tensor.layout:
        return {}
    from pallas_kernels.tensors import LOW

    return {k: v for k, v in tensor.extras.items() if k == LOW}


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", p)))) for p in path]
    return "_".join(parts).replace(".", "_")


class _Held(NamedTuple):
    """The kernel of a layer's weight, or None where no kernel takes it, with what it was made for.

    Attributes:
      name, first, pointer: a parameter that the kernel reads, and where it lay.
    """

    kernel: Any
    dtype: torch.dtype
    name: str = ""
    first: torch.Tensor | None = None
    pointer: int = 0


class JqLinear(Packed, nn.Linear):
    """A linear layer whose weight is a QTensor.

    It is an `nn.Linear` to `isinstance` (peft's target modules, users' code); `weight` is the dequantized weight, made
    anew on each access, so that code that reads it gets right numbers. It cannot be assigned.

    Attributes:
      in_features, out_features, bias: as in nn.Linear.
      transposed: it replaces a Conv1D, whose weight is [K, N]; `weight` here is [N, K] all the same.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: nn.Parameter | None = None, transposed: bool = False
    ) -> None:
        Packed.__init__(self)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", bias)
        self.origin: Any = None
        self._keep_dense = False
        self._dense_cache: torch.Tensor | None = None
        self._held: _Held | None = None

    @classmethod
    def in_place_of(cls, old: nn.Module) -> JqLinear:
        """An empty layer with the features and the bias of an `nn.Linear` or `Conv1D`."""
        if isinstance(old, nn.Linear):
            return cls(old.in_features, old.out_features, bias=old.bias)
        k, n = old.weight.shape  # type: ignore[union-attr,misc]
        return cls(int(k), int(n), bias=old.bias, transposed=True)  # type: ignore[arg-type]

    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def is_packed(self) -> bool:
        return "q" in self._packed

    @property
    def _first(self) -> str:
        """Name of the parameter that the kernel's form of the weight goes by, "" while nothing is packed."""
        names = self._operands.get("q")
        return names[0] if names else ""

    def _name_operands(self, role: str) -> None:
        super()._name_operands(role)
        self._held = None

    def _stored_device(self) -> torch.device:
        """Where the loader, or an offload hook, has put the stored tensors."""
        return next(getattr(self, name).device for name in self.origin.stored.values())

    def _stored_parts(self) -> dict[str, np.ndarray]:
        return {suffix: bridge.array_of(getattr(self, name)) for suffix, name in self.origin.stored.items()}

    def pack(self) -> dict[str, np.ndarray] | None:
        """Stored tensors -> QTensor.

        Returns:
          None, or the stored tensors where the format says that the layer is not quantized.

        Raises:
          FormatError: stored tensors that contradict each other.
        """
        parts, device = self._stored_parts(), self._stored_device()
        tensor = self.origin.load(parts)
        if tensor is None:
            return parts
        for name in self.origin.stored.values():
            delattr(self, name)
        self.put("q", tensor, device)
        return None

    def dump(self, path: str) -> list[tuple[str, np.ndarray]]:
        """[(name, array)] as the file had them, under the layer's path in the model."""
        origin = self.origin
        if not self.is_packed:
            own = [(origin.moved(suffix, path), array) for suffix, array in self._stored_parts().items()]
            return own + origin.beside(path)
        parts = origin.format.dump(self.qtensor())
        own = [(origin.format.join(path, suffix), np.asarray(array)) for suffix, array in parts.items()]
        return own + origin.beside(path)

    def keep_dense(self) -> None:
        """Keeps the dequantized weight from the first use on (`enable(packed=False)`)."""
        self._keep_dense = True
        for role in list(self._packed):
            self.arrange(role)

    def takes_kernels(self, role: str) -> bool:
        return not self._keep_dense and super().takes_kernels(role)

    def operands(self, role: str = "q") -> tuple[list[torch.Tensor], str]:
        if self.is_packed:
            return super().operands(role)
        # on disk: hooks bring the stored tensors for the length of one call
        slim = arithmetic_part(self.origin.load(self._stored_parts()), self.quantize_activations)
        skeleton, tensors = ops.skeleton_of(slim)
        tensors = [t.to(self._stored_device()) for t in tensors]
        active = getattr(skeleton, "activation", None) is not None
        return tensors, ops.spec_of(skeleton, activation=active)  # no kernel: its order would be made at each call

    def to_float(self, weight: torch.Tensor) -> nn.Module:
        """An `nn.Linear` (or Conv1D) with the given dense weight [N, K] and this layer's bias."""
        with torch.device("meta"):
            new: Any = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        new.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight.contiguous())
        new.bias = self.bias if self.bias is None else nn.Parameter(self.bias.detach().to(weight.dtype))
        new._is_hf_initialized = True
        return new.train(self.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [out_features, in_features]; dtype None for the format's own."""
        packed, spec = self.operands()
        if dtype is None:
            dtype = bridge.torch_dtype(ops.own_dtype(spec))
        return ops.dense(packed, spec, dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.dequantize()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """None: computes in the dtype of its input."""
        return None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        if not _compiles() and (kernel := self._kernel(x)) is not None:
            y = kernel(x)
            bias = self._parameters["bias"]  # nn.Module's __getattr__ takes a microsecond
            return y if bias is None else y + bias.to(y.dtype)
        if x.is_meta:  # shapes alone: estimates of memory, models loaded on the meta device
            return x.new_empty((*x.shape[:-1], self.out_features))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._keep_dense and not ops.quantizes_activations(self._spec["q"]):
            return nn.functional.linear(x, self._dense_weight(x.dtype), bias)
        packed, spec = self.operands()
        return ops.linear(x, packed, spec, self.out_features, bias)

    def _kernel(self, x: torch.Tensor) -> Any:
        """The GPU kernel, where neither a graph nor a gradient is recorded: torch's dispatcher costs more than it does."""
        if (
            type(x) is not _Tensor  # fake and distributed tensors have no memory to point at
            or _autocasts()
            or _traces() is not None  # torch.jit.trace
            or _modes()  # make_fx, counters, recomputation: they want to see an operator
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return None
        held = self._held
        if held is not None:
            kernel, dtype, name, first, pointer = held
            lies = first is None or first.data_ptr() == pointer
            if lies and dtype is x.dtype and self._parameters.get(name) is first:  # the layer's arrays, still there
                return kernel
        if not (self.kernels and x.is_cuda):
            return None
        held = self._held = self._hold(x.dtype)
        return held.kernel

    def _hold(self, dtype: torch.dtype) -> _Held:
        first = self._parameters.get(self._first)
        if first is None or not self._skeletons["q"].layout:
            return _Held(None, dtype)
        weight = ops.cuda_weight(*self.operands(), dtype)
        kernel = None if weight is None else weight.of(dtype)
        return _Held(kernel, dtype, self._first, first, first.data_ptr())

    def _dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        held = self._dense_cache
        if held is None or held.dtype != dtype or held.device != self._parameters[self._packed["q"][0]].device:
            self._dense_cache = held = self.dequantize(dtype)
        return held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense_cache = None  # it belongs to the numbers that are replaced
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        what = self._described.get("q", "not packed")
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {what}"
