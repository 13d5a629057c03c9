"""The names under which a file has the experts of a mixture, where these are not those of the family's own files.

Mixtral's own files say `block_sparse_moe.experts.0.w1`. Libraries that take the fused experts of transformers 5 apart save
the names that they made: GPT-QModel `mlp.experts.0.gate_proj`, AutoRound `block_sparse_moe.experts.0.gate_proj`.

Dense experts may be fused: transformers 5 holds the experts of a layer as `mlp.experts.gate_up_proj`
[E, 2 * width, hidden] (rows of gate, then of up) and `mlp.experts.down_proj` [E, hidden, width]. Its own
`save_pretrained` writes them one by one, as files always had them; libraries that save a `state_dict` (Quanto, AQLM, ...)
write these tensors. The decoders here know single experts; saving joins them again (`Fused`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jq.errors import CheckpointError, JqError, UnsupportedError
from jq.models import spec_of
from jq.models.spec import DecoderSpec
from jq.qtensor import QTensor
from jq.state import State, _Deferred

_SINGLE = re.compile(r"\.(mlp|block_sparse_moe)\.experts\.0\.(gate_proj|w1)\.")
_PARTS = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}
_STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_FUSED = re.compile(rf"^(.*\.)mlp{_STACK.pattern}")


class Fused:
    """The names of a checkpoint with fused experts, to give a model's tensors back under them.

    Args:
      shell: the checkpoint without its tensors.
      names: all of its tensors, in their order.
    """

    def __init__(self, shell: State, names: list[str]) -> None:
        self.shell, self.names = shell, names
        self.parts: dict[str, list[list[str]]] = {}  # fused tensor -> of each expert, the tensors whose rows it joins
        self.moved: dict[str, str] = {}  # another tensor of the same modules -> its name beside single experts

    def join(self, state: State) -> State:
        """A State of single experts with the checkpoint's own tensors; as it is where experts have been quantized."""
        single = {name for rows in self.parts.values() for row in rows for name in row}
        if any(name not in state or isinstance(state[name], QTensor) for name in single):
            return state
        tensors: dict[str, Any] = {}
        for name in self.names:
            if rows := self.parts.get(name):
                tensors[name] = _Deferred(functools.partial(_joined, state, rows))
            elif (now := self.moved.get(name, name)) in state:
                tensors[name] = state[now]
        known = single | {self.moved.get(name, name) for name in self.names}
        tensors |= {name: state[name] for name in state if name not in known}
        return self.shell.with_tensors(tensors, state.config)


def as_stored(state: State, spec: DecoderSpec, label: str) -> tuple[State, DecoderSpec, Fused | None]:
    """The State with single experts, the spec with the names that they have in it, and how they were fused, if so.

    Raises:
      UnsupportedError: fused experts that are quantized.
    """
    found = next((match for name in state if (match := _SINGLE.search(name))), None)
    if spec.experts is not None and found is not None:
        names = (found[1], spec.experts.names[1], *_PARTS[found[2]])
        spec = spec.replace(experts=dataclasses.replace(spec.experts, names=names))
    state, fused = _single(state, spec, label)
    return state, spec, fused


def apart(state: State, label: str) -> tuple[State, list[str]]:
    """The State with fused experts one by one, as quantized files have them, and the stacks that are still in it: of a
    family that has no decoder here, or one whose decoder takes stacks.
    """
    stacks = [name for name in state if _STACK.search(name)]
    if stacks:
        with contextlib.suppress(JqError):  # an unknown family, or a config.json that describes none
            state = as_stored(state, spec_of(state.config, label), label)[0]
    return state, [name for name in stacks if name in state]


def _single(state: State, spec: DecoderSpec, label: str) -> tuple[State, Fused | None]:
    """The State with fused experts under the names of single ones; tensors are read at each access.

    Raises:
      UnsupportedError: fused experts that are quantized.
    """
    experts = spec.experts
    layers = {match[1] for name in state if (match := _FUSED.match(name))}
    if experts is None or experts.stacked or not layers:
        return state, None
    fused = Fused(state.with_tensors({}), list(state))
    block, _, gate, up, down = experts.names
    shapes = {
        "gate_up_proj": (experts.count, 2 * experts.width, spec.hidden_size),
        "down_proj": (experts.count, spec.hidden_size, experts.width),
    }
    tensors: dict[str, Any] = {}

    @functools.lru_cache(maxsize=2)  # both tensors of a layer: its experts are asked for one after the other
    def whole(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = state[name]
        if isinstance(value, QTensor):
            raise UnsupportedError(
                f"{label}: {name}: fused experts that are quantized have no decoder here; jq.load_state reads them"
            )
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{label}: {name}: found shape {tuple(value.shape)}, expected {shape}")
        return np.asarray(value)

    for name in state:
        match = _FUSED.match(name)
        layer, _, rest = name.partition("mlp.")
        if match is None:
            moved = f"{layer}{block}.{rest}" if layer in layers else name
            fused.moved[name] = moved
            tensors[moved] = _Deferred(functools.partial(state.__getitem__, name))
            continue
        read = functools.partial(whole, name, shapes[match[2]])
        leaves = (gate, up) if match[2] == "gate_up_proj" else (down,)
        experts_at = [f"{match[1]}{block}.experts.{i}" for i in range(experts.count)]
        fused.parts[name] = [[f"{at}.{leaf}.weight" for leaf in leaves] for at in experts_at]
        for i, at in enumerate(experts_at):
            for part, leaf in enumerate(leaves):
                rows = slice(part * experts.width, (part + 1) * experts.width) if leaf != down else slice(None)
                tensors[f"{at}.{leaf}.weight"] = _Deferred(functools.partial(_rows, read, i, rows))
    return state.replace(tensors), fused


def _joined(state: State, rows: list[list[str]]) -> np.ndarray:
    return np.stack([np.concatenate([np.asarray(state[name]) for name in row]) for row in rows])


def _rows(read: Callable[[], np.ndarray], expert: int, rows: slice) -> np.ndarray:
    return read()[expert, rows]
