"""Quantized tensors as the tensors that a file holds: each format's dump, and what a module held beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq.errors import UnsupportedError
from jq.formats import table
from jq.formats.base import Format, Parts
from jq.qtensor import QTensor

# Key in `extras`, before the stored suffix, of tensors that a format read with a module and has no use for.
STRAY = "+"


def module_of(key: str) -> str:
    """Module path of a State's key: "a.b.weight" -> "a.b"."""
    return key.removesuffix(".weight")


def dump_entry(key: str, value: Any) -> list[tuple[str, np.ndarray]]:
    """Stored tensors of one State entry: [(stored name, array)]."""
    if not isinstance(value, QTensor):
        return [(key, np.asarray(value))]
    source = value.source
    if source is None:
        raise UnsupportedError(
            f"{key}: a {type(value).__name__} that came from no format cannot be saved; use jq.convert"
        )
    fmt = table()[source.format]
    prefix = module_of(key)
    if value.layout:
        import pallas_kernels

        value = pallas_kernels.restore(value)
    carried = {k: v for k, v in value.extras.items() if k.startswith(STRAY)}
    if carried:
        value = value.replace(extras={k: v for k, v in value.extras.items() if k not in carried})
    parts = fmt.dump(value) | {k.removeprefix(STRAY): v for k, v in carried.items()}
    return [(fmt.join(prefix, suffix), np.asarray(array)) for suffix, array in parts.items()]


class Strays:
    """Finds tensors of a module that its format's dump would not give back, and lets the QTensor carry them.

    A format reads all suffixes that any of its variants has: a scale that this module's settings know nothing of, a
    leftover of an older exporter. What dump gives back is tried once for each sort of module.
    """

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.found: dict[Any, tuple[str, ...]] = {}

    def carried(self, tensor: QTensor, key: str, stored: Mapping[str, str], parts: Parts) -> QTensor:
        """The tensor with the strays among its module's tensors in its extras.

        Args:
          key: of the tensor in the State.
          stored: suffix -> stored name.
          parts: suffix -> array.
        """
        own = frozenset(suffix for suffix, name in stored.items() if name and not suffix.startswith("~"))
        sort = (own, type(tensor), tensor.source, tensor.activation)
        if sort not in self.found:
            self.found[sort] = self._strays(tensor, module_of(key), {s: stored[s] for s in own})
        strays = {STRAY + suffix: parts[suffix] for suffix in self.found[sort]}
        return tensor.replace(extras={**tensor.extras, **strays}) if strays else tensor

    def _strays(self, tensor: QTensor, prefix: str, stored: Mapping[str, str]) -> tuple[str, ...]:
        try:
            given = {self.fmt.join(prefix, suffix) for suffix in self.fmt.dump(tensor)}
        except UnsupportedError:  # of a format that is only read
            return ()
        return tuple(s for s, name in sorted(stored.items()) if name not in given and self.fmt.join(prefix, s) == name)


class DumpOnce:
    """The stored tensors of one module, dumped when the first is asked for and dropped with the last."""

    def __init__(self, state: Mapping[str, Any], key: str) -> None:
        self.state, self.key = state, key
        self.parts: dict[str, np.ndarray] = {}

    def reader(self, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if name not in self.parts:
                self.parts = dict(dump_entry(self.key, self.state[self.key]))
            return self.parts.pop(name)

        return read
