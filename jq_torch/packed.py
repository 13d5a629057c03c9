"""`Packed`: what packed layers and packed experts have in common, QTensors held as integer parameters of a module.

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

from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from jq import activations
from jq_torch import bridge, ops

ORDERED = "mma16_"  # in the names of parameters that lie in the kernels' order


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
            if self._skeletons[role].layout:  # it also says what the kernels know of the numbers, and these are new
                self.arrange(role, ordered=False)
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
        # made anew where they are needed; nn.Module's own leaves out the function of `compile`, which is the original's
        return {**super().__getstate__(), "_held": None, "_dense_cache": None}

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
