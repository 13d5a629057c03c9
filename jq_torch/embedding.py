"""`JqEmbedding`: an embedding over a QTensor, in place of `nn.Embedding` or a model's own subclass of it.

A call dequantizes the rows that it is asked for. What a model's subclass does beside the look-up (Gemma scales the rows)
is kept: `embedding_class` puts `JqEmbedding` behind that subclass in the order in which methods are looked up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from jq.errors import UnsupportedError
from jq_torch import rows
from jq_torch.packed import Packed
from jq_torch.weight import PackedWeight

_OWN = ("origin", "kernels", "quantize_activations", "float_dtype")  # attributes that a float table does not have


class JqEmbedding(PackedWeight, nn.Embedding):
    """A table of rows [num_embeddings, embedding_dim] held as a QTensor.

    It is an `nn.Embedding` to `isinstance`; `weight` is the dequantized table in `float_dtype`, made where its numbers are
    used. It cannot be assigned. Rows come in `float_dtype`, as those of a float table would.

    Attributes:
      num_embeddings, embedding_dim, padding_idx: as in nn.Embedding.
      stands_for: the class of the float table.
    """

    stands_for: type[nn.Embedding] = nn.Embedding

    @classmethod
    def in_place_of(cls, old: nn.Embedding, *, scale_in_float32: bool = False) -> JqEmbedding:
        """An empty table with the size and all other state of an `nn.Embedding`.

        Args:
          scale_in_float32: where the model scales its rows, by the factor itself, as transformers' QuantizedEmbedding for
            Gemma's files does, not by one that is rounded to the rows' dtype.

        Raises:
          UnsupportedError: a table whose rows change when they are looked up (`max_norm`).
        """
        if old.max_norm is not None:
            raise UnsupportedError(f"{type(old).__name__}(max_norm={old.max_norm}) writes into rows, which stay packed")
        new = _empty(type(old), scale_in_float32 and hasattr(old, "scalar_embed_scale"))
        Packed.__init__(new)
        _take_state(new, old, without=("weight",))
        new.begin(old.weight.dtype)
        new._is_hf_initialized = False  # buffers of a model's subclass get their values from its _init_weights
        return new

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.seen_weight(self.float_dtype)

    def takes_kernels(self, role: str) -> bool:
        """Never: in the kernels' order there are no rows to look up."""
        return False

    def packed_names(self) -> list[str]:
        """Parameters that hold packed bits; a model's subclass may have float ones of its own."""
        stored = () if self.is_packed or self.origin is None else self.origin.stored.values()
        return [*self._packed.get("q", ()), *stored]

    def to_float(self, weight: torch.Tensor) -> nn.Embedding:
        """The model's own embedding with the given dense table."""
        kind: Any = type(self).stands_for
        new = kind.__new__(kind)
        nn.Module.__init__(new)
        _take_state(new, self, without=(*self.packed_names(), *_OWN))
        new.weight = nn.Parameter(weight.contiguous())
        new._is_hf_initialized = True  # type: ignore[assignment]
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.float_dtype
        assert dtype is not None
        if input.is_meta:  # shapes alone: estimates of memory, models loaded on the meta device
            return torch.empty((*input.shape, self.embedding_dim), dtype=dtype, device="meta")
        if self._keep_dense:
            return nn.functional.embedding(input, self._dense_weight(dtype))
        packed, spec = self.operands_at(input.device)
        return rows.embedding(input, packed, spec, self.num_embeddings, self.embedding_dim, dtype)

    def looks_up_rows(self) -> bool:
        """Whether a look-up dequantizes its rows alone, not the whole table."""
        return not self.is_packed or rows.apart(*self.operands())

    def __reduce__(self) -> Any:
        kind = type(self)
        return _empty, (kind.stands_for, issubclass(kind, _Scaled)), self.__getstate__()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._described.get('q', 'not packed')}"


class _Scaled(JqEmbedding):
    """A table whose rows are multiplied by the model's `scalar_embed_scale` in float32 and rounded once."""

    scalar_embed_scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return JqEmbedding.forward(self, input) * self.scalar_embed_scale


@functools.cache  # one class for each, by which pickled tables are found again
def _packed_class(kind: type[nn.Embedding], scaled: bool) -> type[JqEmbedding]:
    """`JqEmbedding`, or a subclass that looks its rows up and does with them what `kind` does."""
    if kind is nn.Embedding:
        return JqEmbedding
    bases = (_Scaled, kind) if scaled else (kind, JqEmbedding)
    own = {"weight": JqEmbedding.weight, "stands_for": kind, "__doc__": kind.__doc__}
    return type(f"Jq{kind.__name__}", bases, own)


def _empty(kind: Any, scaled: bool) -> Any:
    made: Any = _packed_class(kind, scaled)
    return made.__new__(made)


def _take_state(new: nn.Module, old: nn.Module, without: tuple[str, ...]) -> None:
    """Gives `new` what `old` has beside its table: sizes, options, buffers (persistent or not), modules inside."""
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in without and name != "forward":  # put there by offload hooks
            setattr(new, name, value)
    for name, parameter in old._parameters.items():
        if name not in without:
            new.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, module in old._modules.items():
        new.add_module(name, module)
