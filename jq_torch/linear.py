"""`JqLinear`: a linear layer over a QTensor, in place of `nn.Linear` or GPT-2's `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.pytorch_utils import Conv1D

from jq_torch import ops
from jq_torch.packed import Packed
from jq_torch.weight import PackedWeight

_Tensor, _compiles, _autocasts = torch.Tensor, torch.compiler.is_dynamo_compiling, torch.is_autocast_enabled
_traces, _modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack  # names: each look-up of one costs
_before, _after = module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks
_before_back, _after_back = module_hooks._global_backward_pre_hooks, module_hooks._global_backward_hooks
_call = nn.Module.__call__
_Held = Callable[[dict[str, Any], torch.Tensor], torch.Tensor | None]


def _plain(x: torch.Tensor) -> bool:
    """Whether neither a graph nor a gradient is recorded: an operator that nobody has to see need not be called."""
    return (
        type(x) is _Tensor  # fake and distributed tensors have no memory to point at
        and not _autocasts()
        and not _traces()  # torch.jit.trace
        and not _modes()  # make_fx, counters, recomputation
        and not x.requires_grad
    )


class JqLinear(PackedWeight, nn.Linear):
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
        self.begin(None)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", bias)
        self._held: _Held | None = None

    @classmethod
    def in_place_of(cls, old: nn.Module) -> JqLinear:
        """An empty layer with the features and the bias of an `nn.Linear` or `Conv1D`."""
        n, k = old.weight.shape  # type: ignore[union-attr,misc]
        transposed = not isinstance(old, nn.Linear)
        n, k = (k, n) if transposed else (n, k)
        new = cls(int(k), int(n), bias=old.bias, transposed=transposed)  # type: ignore[arg-type]
        new.float_dtype = old.weight.dtype  # type: ignore[union-attr,assignment]
        return new

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def _first(self) -> str:
        """Name of the parameter that the kernel's form of the weight goes by, "" while nothing is packed."""
        names = self._operands.get("q")
        return names[0] if names else ""

    def _name_operands(self, role: str) -> None:
        super()._name_operands(role)
        self._held = None

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

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.seen_weight(None)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """None: computes in the dtype of its input."""
        return None

    def __call__(self, input: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """`nn.Module.__call__`: what it spends on looking for hooks is a fifth of the time to start a kernel."""
        if (
            not _compiles()
            and (held := (own := self.__dict__)["_held"]) is not None  # half the time of an attribute of a module
            and not (own["_forward_pre_hooks"] or own["_forward_hooks"] or _before or _after)
            and not (own["_backward_pre_hooks"] or own["_backward_hooks"] or _before_back or _after_back)
            and type(self).forward is _forward  # a subclass, or another function in its place
            and "forward" not in own  # a hook of accelerate
            and "_compiled_call_impl" not in own
            and nn.Module.__call__ is _call  # replaced by those who watch
            and not (more or named)  # a hook before `forward` may take them
            and (y := held(own["_parameters"], input)) is not None
        ):
            return y
        return super().__call__(input, *more, **named)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        if not _compiles() and (y := self._launched(x)) is not None:
            return y
        if x.is_meta:  # shapes alone: estimates of memory, models loaded on the meta device
            return x.new_empty((*x.shape[:-1], self.out_features))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._keep_dense and not ops.quantizes_activations(self._spec["q"]):
            return nn.functional.linear(x, self._dense_weight(x.dtype), bias)
        packed, spec = self.operands_at(x.device)
        return ops.linear(x, packed, spec, self.out_features, bias)

    def _launched(self, x: torch.Tensor) -> torch.Tensor | None:
        """The product by the GPU kernel, past torch's dispatcher, which costs more than it; None where that cannot be."""
        if not self.kernels:
            return None
        if (held := self._held) is not None and (y := held(self._parameters, x)) is not None:
            return y
        if not (x.is_cuda and _plain(x)):
            return None
        held = self._held = self._hold(x.dtype)
        return None if held is None else held(self._parameters, x)

    def _hold(self, dtype: torch.dtype) -> _Held | None:
        """(parameters, x) -> the product, or None where one of them is not, or no more, what this was made for."""
        name = self._first
        first = self._parameters.get(name)
        if first is None or not self._skeletons["q"].layout:
            return None
        weight = ops.cuda_weight(*self.operands(), dtype)
        if weight is None:
            return None
        kernel, lies, pointer = weight.of(dtype, _plain), first.data_ptr, first.data_ptr()

        def run(parameters: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
            # of what makes x plain, modes alone can change between tensors that are alike to the kernel
            if _modes() or parameters.get(name) is not first or lies() != pointer:
                return None
            y = kernel(x)
            if y is None or (bias := parameters["bias"]) is None:
                return y
            return y.add_(bias if bias.dtype is dtype else bias.to(dtype))

        return run

    def extra_repr(self) -> str:
        what = self._described.get("q", "not packed")
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {what}"


_forward = JqLinear.forward
