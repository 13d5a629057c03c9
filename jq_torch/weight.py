"""`PackedWeight`: a layer whose `weight` is one QTensor; what packed linear layers and packed embeddings have in common.

Two states. *Stored*: while loading, and for as long as a layer is offloaded to disk, its parameters are the tensors of
the file (named `stored_0`, `stored_1`, ...; the file's names are mapped by the quantizer). *Packed*: the parameters
are the arrays of the QTensor (`q_codes`, `q_scales`, ...). `pack` goes from the first to the second.

A layer that is tied to another (an output layer to the embedding) has no tensors of its own: it holds the other's
parameters, or borrows them at each call where these are on disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from jq_torch import bridge, ops
from jq_torch.packed import Packed, arithmetic_part


class PackedWeight(Packed):
    """A layer whose weight is a QTensor [N, K], held under the role "q".

    Attributes:
      float_dtype: what a float layer in its place would have, which follows `to`; None where there was none.
      tied: the layer whose weight this one computes with; None for its own.
      borrows: it is tied and on disk, so that it takes what the other layer has at each call.
    """

    def begin(self, dtype: torch.dtype | None) -> None:
        """Sets what all such layers have, once `Packed.__init__` has run."""
        self.origin: Any = None
        self.borrows = False
        self._keep_dense = False
        self._dense_cache: torch.Tensor | None = None
        self.float_dtype = dtype
        self.__dict__["_tied_to"] = None  # never a submodule: it has its own place in the model

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(N, K)."""
        raise NotImplementedError

    def to_float(self, weight: torch.Tensor) -> nn.Module:
        """The float layer with the given dense weight [N, K] that this one stands for."""
        raise NotImplementedError

    def num_weights(self) -> int:
        n, k = self.weight_shape
        return 0 if self.tied is not None else n * k

    @property
    def is_packed(self) -> bool:
        return "q" in self._packed

    @property
    def tied(self) -> PackedWeight | None:
        return self.__dict__["_tied_to"]

    def tie(self, other: PackedWeight) -> None:
        """Computes with another layer's weight from now on."""
        self.__dict__["_tied_to"] = other

    def link(self) -> bool:
        """Holds the parameters of the layer that this one is tied to; False where these are not in memory."""
        other = self.tied
        if other is None or not other.is_packed or any(getattr(other, name).is_meta for name in other._packed["q"]):
            return False
        self.remove("q")
        for name in other._packed["q"]:
            self.register_parameter(name, getattr(other, name))
        for ours, theirs in zip(self._tables(), other._tables(), strict=True):
            ours["q"] = theirs["q"]
        self._name_operands("q")
        self.arrange()
        return True

    def _tables(self) -> tuple[dict[str, Any], ...]:
        return self._skeletons, self._packed, self._described

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.float_dtype is not None:
            self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        other = self.tied
        if (
            other is not None
            and self.is_packed
            and not self._skeletons["q"].layout
            and self._device() == other._device()
        ):
            self.link()  # a move to the kernels' order and back has made two of them
        return self

    def _stored_device(self) -> torch.device:
        """Where the loader, or an offload hook, has put the stored tensors."""
        if self.tied is not None:
            return self.tied._device()
        return next(getattr(self, name).device for name in self.origin.stored.values())

    def _device(self) -> torch.device:
        return getattr(self, self._packed["q"][0]).device if self.is_packed else self._stored_device()

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
        if self.tied is not None:
            return []
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
        if self.tied is not None:
            with materialised(self.tied):
                return self.tied.operands(role)
        # on disk: hooks bring the stored tensors for the length of one call
        slim = arithmetic_part(self.origin.load(self._stored_parts()), self.quantize_activations)
        skeleton, tensors = ops.skeleton_of(slim)
        tensors = [t.to(self._stored_device()) for t in tensors]
        active = getattr(skeleton, "activation", None) is not None
        return tensors, ops.spec_of(skeleton, activation=active)  # no kernel: its order would be made at each call

    def operands_at(self, device: torch.device) -> tuple[list[torch.Tensor], str]:
        """`operands` for an input on `device`, to which borrowed ones are brought."""
        packed, spec = self.operands()
        if not self.is_packed and self.tied is not None:
            packed = [t.to(device) for t in packed]
        return packed, spec

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [N, K]; dtype None for the format's own."""
        packed, spec = self.operands()
        if dtype is None:
            dtype = bridge.torch_dtype(ops.own_dtype(spec))
        return ops.dense(packed, spec, dtype)

    def seen_weight(self, dtype: torch.dtype | None) -> torch.Tensor:
        """What `weight` is to those who look at it: the dense weight, computed where its numbers are used."""
        device = self._device()
        if dtype is None:
            dtype = bridge.torch_dtype(ops.own_dtype(self._spec["q"])) if self.is_packed else self.float_dtype
        assert dtype is not None
        if device.type == "meta":  # on disk
            found = torch.empty(self.weight_shape, dtype=dtype, device="meta")
        elif torch.compiler.is_compiling():
            return self.dequantize(dtype)
        else:
            found = LazyWeight(lambda: self.dequantize(dtype), self.weight_shape, dtype, device)
        found._is_hf_initialized = True  # type: ignore[attr-defined]  # for a family's _init_weights
        return found

    def _dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        held = self._dense_cache
        if held is None or held.dtype != dtype or held.device != self._device():
            self._dense_cache = held = self.dequantize(dtype)
        return held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense_cache = None  # it belongs to the numbers that are replaced
        super()._load_from_state_dict(*args, **kwargs)


def materialised(module: nn.Module) -> Any:
    """Brings the tensors of an offloaded module into memory for the length of a `with` block."""
    if getattr(module, "_hf_hook", None) is None:
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, "cpu")


class LazyWeight(torch.Tensor):
    """A weight that is dequantized at its first use in arithmetic; its shape, dtype and device are there at once.

    Models look at `layer.weight.dtype` in each forward pass, which must not cost a dequantized matrix.
    """

    _make: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls, make: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        found = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        found._make = make
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OUTSIDE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_made(args), **{k: _made(v) for k, v in (kwargs or {}).items()})

    __torch_dispatch__ = __torch_function__  # for code that calls operators past it


def _made(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value._make()
    if isinstance(value, (list, tuple)):
        return type(value)(_made(v) for v in value)
    return value


_OUTSIDE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "is_cuda", "layout")),
    *(getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "grad", "grad_fn", "is_leaf", "is_sparse", "is_quantized")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "__len__")),
}  # fmt: skip
