"""Where a loaded model came from: what `jq.save` and the tokenizer need and no compiled function sees."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jq.models import tokenizer as _tokenizer
from jq.models.expert_names import Fused
from jq.models.generation_config import TOKENS, checked
from jq.nn import FusedLinear, quantized
from jq.safetensors_file import parse_json
from jq.state import State

FILE = "generation_config.json"


class Origin:
    """Config, files and stored dtypes of a loaded model.

    A static attribute of `CausalLM`. It takes no part in any computation, so all Origins are equal: models of equal
    structure share their compiled functions.

    Args:
      state: the checkpoint; only its files, metadata and order are kept, no tensors.
      stored: stored dtype of each dense tensor of the model.
      kept: stored arrays that the compute dtype cannot hold: name -> (stored, compute array).
      extra: stored tensors that no module took (name -> value).
      settings: arguments of `jq.load.build` that a model made from this one's State takes over.
      fused: how the checkpoint had its experts, where it fused them.
    """

    def __init__(
        self,
        state: State,
        stored: Mapping[str, np.dtype],
        kept: Mapping[str, tuple[Any, Any]],
        extra: Mapping[str, Any],
        settings: Mapping[str, Any],
        fused: Fused | None = None,
    ) -> None:
        self.config = dict(state.config)
        self.names = list(state)
        self.shell = state.with_tensors({})
        self.stored, self.kept, self.extra = dict(stored), dict(kept), dict(extra)
        self.settings, self.fused = dict(settings), fused

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        label = self.shell.path or Path("checkpoint")
        base = checked({name: self.config.get(name) for name in TOKENS}, str(label / "config.json"))
        file, raw = label / FILE, self.shell.side_files.get(FILE)
        return base if raw is None else base | checked(parse_json(raw, file, "file"), str(file))

    @cached_property
    def tokenizer(self) -> Any:
        return _tokenizer.load(self.shell.path, self.shell.side_files)

    def state_of(self, model: Any) -> State:
        """The State of a model: its tensors under the stored names, experts one by one, each in its stored dtype."""
        found = dict(self.extra)
        stored = set(self.names)
        for name, tensor in quantized(model).items():
            found[name if name in stored else f"{name}.weight"] = tensor
        joined = set()
        for path, module in nnx.iter_modules(model):
            if isinstance(module, FusedLinear):
                joined.add(".".join(map(str, (*path, "bias"))))
                for part, value in module.biases().items():
                    name = ".".join(map(str, (*path[:-1], part, "bias")))
                    found[name] = self._restored(name, value)
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            name = ".".join(map(str, path))
            if name not in found and name not in joined:
                found[name] = self._restored(name, variable.get_value())
        order = [n for n in self.names if n in found] + [n for n in found if n not in self.names]
        return self.shell.with_tensors({n: found[n] for n in order}, self.config)

    def _restored(self, name: str, array: Any) -> Any:
        """A dense tensor in its stored dtype: the stored array where the value is still the loaded one."""
        stored, compute = self.kept.get(name, (None, None))
        if stored is not None and (compute is array or np.array_equal(compute, array, equal_nan=True)):
            return stored
        dtype = self.stored.get(name)
        if dtype is None or array.dtype == dtype:
            return array
        # In numpy: XLA's CPU backend flushes denormals in casts to 16 bits' neighbours.
        return np.asarray(array).astype(dtype)
