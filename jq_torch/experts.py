"""`JqExperts`: the fused experts of a mixture, packed, in place of a model's own experts module.

transformers 5 holds experts as one dense parameter [E, N, K] for each projection. Files hold them stacked (MXFP4) or,
mostly, one by one (`experts.3.w1.qweight`). Here every projection is one QTensor with a leading axis E, one operator
multiplies all tokens by their experts, and saving gives each expert its own names back. A projection that the model
merges from two stored ones (gate and up) stays two QTensors: not every format can be merged along N.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from jq.errors import FormatError, UnsupportedError
from jq.formats import table
from jq.qtensor import stack
from jq.state import module_of
from jq_torch import bridge, ops
from jq_torch.packed import Packed
from jq_torch.plan import BORROWED, Origin, Plan

Part = tuple[str, int]  # (parameter of the model's module, which of the stored weights that it merges)


class JqExperts(Packed):
    """Packed experts; the call and the gate function are those of the module that it replaces.

    Attributes:
      origins: {(parameter, part): {expert: Origin}}, expert None where the file holds all experts stacked.
      shared: {parameter name here: name in the file, below the module} of tensors that experts share (scales of fused FP8
        experts beside the weights of single ones): each expert's QTensor has its part, the whole is kept for saving.
    """

    def __init__(self, old: nn.Module, origins: dict[Part, dict[int | None, Origin]]) -> None:
        super().__init__()
        for name, value in vars(old).items():
            if not name.startswith("_") and name not in ("training",):
                setattr(self, name, value)
        self.kind = type(old)
        self.packed_parameters = tuple(dict.fromkeys(parameter for parameter, _ in origins))
        self.num_experts = int(old.num_experts)  # type: ignore[arg-type]
        self.shapes = {name: tuple(p.shape) for name, p in old.named_parameters(recurse=False)}
        for name, module in old.named_children():
            self.add_module(name, module)
        for name, parameter in old.named_parameters(recurse=False):
            if name not in self.packed_parameters:
                self.register_parameter(name, parameter)
        self.is_transposed = getattr(old, "is_transposed", False)
        self.is_concatenated = getattr(old, "is_concatenated", True)
        self.has_gate = getattr(old, "has_gate", True)
        self.origins = origins
        self.shared = {
            stored: origin.names[suffix].rpartition(".experts.")[2]
            for experts in origins.values()
            for origin in experts.values()
            for suffix, stored in origin.stored.items()
            if suffix.startswith(BORROWED)
        }
        self._shared_kinds: dict[str, bridge.Kind] = {}
        if getattr(old, "has_post_expert_norm", False):
            raise UnsupportedError(f"{type(old).__name__}: packed experts with a norm behind each expert")

    @property
    def is_packed(self) -> bool:
        return bool(self._packed)

    def num_weights(self) -> int:
        return sum(int(np.prod(self.shapes[name])) for name in self.packed_parameters)

    def packed_names(self) -> list[str]:
        known = set(self.shapes) - set(self.packed_parameters)
        return [name for name, _ in self.named_parameters(recurse=False) if name not in known]

    def pack(self) -> None:
        """Stored tensors -> one QTensor a part."""
        for part, experts in self.origins.items():
            tensors = [self._load(experts[e]) for e in _in_order(experts, self.num_experts, part)]
            names = [n for origin in experts.values() for n in origin.stored.values() if n not in self.shared]
            device = getattr(self, names[0]).device
            for name in names:
                delattr(self, name)
            self.put(_role(part), self._stacked(tensors, experts), device)
        for name in self.shared:  # from here on bits that nothing casts, as all packed tensors
            stored = getattr(self, name)
            bits, self._shared_kinds[name] = bridge.carrier_of(bridge.array_of(stored))
            self.register_parameter(name, nn.Parameter(bits.to(stored.device), requires_grad=False))
        for parameter in self.packed_parameters:
            self._check_shape(parameter)

    def _load(self, origin: Origin) -> Any:
        tensor = origin.load({s: bridge.array_of(getattr(self, n)) for s, n in origin.stored.items()})
        if tensor is None:
            raise FormatError(f"{origin.prefix}: not quantized, while other experts of the layer are")
        return tensor

    def _stacked(self, tensors: list[Any], experts: dict[int | None, Origin]) -> Any:
        if None in experts:
            return tensors[0]
        try:
            return stack(tensors)
        except ValueError as e:
            first = experts[0]
            raise UnsupportedError(
                f"{first.prefix}: the experts of this layer have different bits or groups, they cannot be held as one "
                f"tensor ({e})"
            ) from e

    def _check_shape(self, parameter: str) -> None:
        want = self.shapes[parameter]
        n, k = (want[2], want[1]) if self.is_transposed else (want[1], want[2])
        parts = [self.qtensor(_role(p)).shape for p in self.origins if p[0] == parameter]
        found = (self.num_experts, sum(s[-2] for s in parts), parts[0][-1])
        if found != (self.num_experts, n, k) or any(s[0] != self.num_experts for s in parts):
            origin = next(iter(self.origins[parameter, 0].values()))
            raise FormatError(
                f"{origin.prefix}: the stored experts have shape {found}, the model's {parameter} is "
                f"{(self.num_experts, n, k)} (experts, out, in)"
            )

    def dump(self, path: str) -> list[tuple[str, np.ndarray]]:
        """[(name, array)] as the file had them, under the module's path in the model."""
        found = []
        for part, experts in self.origins.items():
            whole = self.qtensor(_role(part)) if self.is_packed else None
            for expert, origin in experts.items():
                local = part[0] if expert is None else module_of(origin.prefix).rpartition(".experts.")[2]
                prefix = f"{path}.{local}"
                if whole is None:
                    own = {s: n for s, n in origin.stored.items() if n not in self.shared}
                    found += [(origin.moved(s, prefix), bridge.array_of(getattr(self, n))) for s, n in own.items()]
                else:
                    parts = origin.format.dump(whole if expert is None else whole[expert])
                    found += [(origin.format.join(prefix, s), np.asarray(a)) for s, a in parts.items()]
        for name, local in self.shared.items():
            kind = self._shared_kinds.get(name)
            held = getattr(self, name)
            found.append((f"{path}.{local}", bridge.array_of(held) if kind is None else bridge.numpy_leaf(held, kind)))
        return found

    def keep_dense(self) -> None:
        """Experts stay packed: the dense form of all of them is what packing is there to avoid."""

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model's own module with dequantized parameters."""
        with torch.device("meta"):
            new = self.kind(self.config)  # type: ignore[call-arg]
        for name, parameter in self.named_parameters(recurse=False):
            if name in self.shapes:
                setattr(new, name, parameter)
        for parameter in self.packed_parameters:
            parts = [self.dequantize(p, dtype) for p in self.origins if p[0] == parameter]
            dense = torch.cat(parts, dim=1)
            new_weight = dense.transpose(1, 2).contiguous() if self.is_transposed else dense
            setattr(new, parameter, nn.Parameter(new_weight))
        return new.train(self.training)

    def dequantize(self, part: Part, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dense weights [E, N, K] of one part."""
        packed, spec = self.operands(_role(part))
        return ops.dense(packed, spec, dtype or bridge.torch_dtype(ops.own_dtype(spec)))

    def project(self, x: torch.Tensor, expert: torch.Tensor, parameter: str) -> torch.Tensor:
        """Rows of x times the weights of their experts, the model's bias included: [S, N]."""
        outputs = []
        for part in self.origins:
            if part[0] == parameter:
                packed, spec = self.operands(_role(part))
                rows = self._rows[_role(part)]
                outputs.append(ops.experts(x, expert, packed, spec, rows))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        bias = self._parameters.get(f"{parameter}_bias")
        if bias is None:
            return y
        return y + bias[expert.clamp(max=self.num_experts - 1)].to(y.dtype)

    def put(self, role: str, tensor: Any, device: Any = "cpu") -> None:
        super().put(role, tensor, device)
        self.__dict__.setdefault("_rows", {})[role] = int(tensor.shape[-2])

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        *,
        router_indices: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        index = top_k_index if top_k_index is not None else router_indices
        weights = top_k_weights if top_k_weights is not None else routing_weights
        assert index is not None and weights is not None
        tokens, chosen = index.shape
        x = hidden_states.repeat_interleave(chosen, dim=0)  # [tokens * chosen, K]
        expert = index.reshape(-1)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        h = self.project(x, expert, first)
        h = self.kind._apply_gate(self, h) if self.has_gate else self.act_fn(h)  # type: ignore[attr-defined]
        y = self.project(h, expert, "down_proj") * weights.reshape(-1, 1)
        y = torch.where((expert < self.num_experts)[:, None], y, torch.zeros_like(y))  # E: an expert elsewhere
        return y.reshape(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{role}: {text}" for role, text in self._described.items()) or "not packed"


def _role(part: Part) -> str:
    return f"{part[0]}_{part[1]}"


def _in_order(experts: dict[int | None, Origin], count: int, part: Part) -> list[int | None]:
    if None in experts:
        return [None]
    missing = [e for e in range(count) if e not in experts]
    if missing or len(experts) != count:
        name = next(iter(experts.values())).prefix
        raise FormatError(
            f"{name}: {part[0]}: experts {missing or sorted(map(str, experts))} do not fit {count} experts"
        )
    return list(range(count))


def replace(model: Any, plan: Plan) -> None:
    """Puts a `JqExperts` with room for the stored tensors in place of every experts module of the plan."""
    for path, origins in plan.experts.items():
        old = model.get_submodule(path)
        for parameter, _ in origins:
            if parameter not in ("gate_up_proj", "up_proj", "down_proj"):
                raise UnsupportedError(f"{plan.label}: {path}.{parameter}: packed, but not a projection that jq knows")
        if not hasattr(type(old), "_apply_gate") or "config" not in inspect.signature(type(old).__init__).parameters:
            raise UnsupportedError(f"{plan.label}: {path}: experts of the class {type(old).__name__} cannot be packed")
        for part, experts in origins.items():
            _in_order(experts, int(old.num_experts), part)
        module = JqExperts(old, origins)
        for experts in origins.values():
            for origin in experts.values():
                for suffix, name in origin.stored.items():
                    module.reserve(name, *plan.entry(origin.names[suffix]))
        model.set_submodule(path, module)


def makeable(model: Any) -> dict[str, dict[str, list[str]]]:
    """Experts that can be quantized while loading: {path: {parameter: names of an expert's stored projections}}.

    The names are those that the model's converters merge, so that the saved file is what other loaders expect. Experts
    that their files hold stacked and transposed (gpt-oss) are left out: no format but their own holds them.
    """
    known: dict[str, list[str]] = {}
    for converter in get_model_conversion_mapping(model):
        target = converter.target_patterns[0].rpartition(".experts.")[2]
        names = [re.search(r"\.experts\.\*\.([\w.]+)\.weight$", s) for s in converter.source_patterns]
        if isinstance(converter, WeightConverter) and target and all(names):
            known[target] = [m[1] for m in names if m]
    found = {}
    for path, module in model.named_modules():
        parameters = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and n in known]
        if path.endswith(".experts") and parameters and hasattr(type(module), "_apply_gate"):
            if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
                continue
            found[path] = {name: known[name] for name in parameters}
    return found


def quantize(model: Any, name: str, weight: torch.Tensor, method: Any) -> None:
    """Packs one parameter [E, N, K] of an experts module, expert by expert."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(module, JqExperts):
        known = makeable(model)[path]
        origins: dict[Part, dict[int | None, Origin]] = {}
        fmt = table()[method.format]
        for target, names in known.items():
            for index, leaf in enumerate(names):
                origins[target, index] = {
                    e: Origin(fmt, f"{path}.{e}.{leaf}", {}, {}) for e in range(int(module.num_experts))
                }
        module = JqExperts(module, origins)
        model.set_submodule(path, module)
    parts = [part for part in module.origins if part[0] == parameter]
    for part, dense in zip(parts, weight.chunk(len(parts), dim=1), strict=True):
        made = [method.quantize(bridge.array_of(w), name=f"{name}.{e}") for e, w in enumerate(dense)]
        module.put(_role(part), stack(made), weight.device)
