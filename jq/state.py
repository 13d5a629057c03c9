"""`State`: a checkpoint as {name: array | QTensor} plus its config; `load_state` and `save`."""

from __future__ import annotations

import copy
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jq.checkpoint import Checkpoint, open_checkpoint
from jq.directory import replacing
from jq.dump import Strays, dump_entry, module_of
from jq.errors import FormatError, JqError, UnsupportedError
from jq.formats import detect
from jq.formats.base import Context, Format, group_by_prefix
from jq.qtensor import QTensor
from jq.safetensors_file import Entry

Array = Any

# dtypes of stored codes: a weight matrix of one of these is nothing without scales.
CODES = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


class State(Mapping[str, Any]):
    """The tensors of a checkpoint: a quantized module's weight name maps to its QTensor, all else to an array.

    Attributes:
      config: config.json as a dict (with `quantization_config` where there is one).
      path: where it came from, or None.
      files: stored tensor name -> file name, so that saving keeps the shards.
      metadata: of each file by its name: safetensors' strings, or GGUF's keys and values.
      side_files: tokenizer and other files that are written beside the weights.
      container: "safetensors", "torch" or "gguf".
      shared: names of stored tensors that quantized ones need beside their own (a scale, a rotation of several modules).
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        path: Path | None = None,
        files: Mapping[str, str] | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        side_files: Mapping[str, bytes] | None = None,
        container: str = "safetensors",
        order: list[str] | None = None,
        shared: Iterable[str] = (),
    ) -> None:
        self._tensors = dict(tensors)
        self.config: dict[str, Any] = copy.deepcopy(dict(config or {}))
        self.path = path
        self.files = dict(files or {})
        self.metadata = {k: dict(v) for k, v in (metadata or {}).items()}
        self.side_files = dict(side_files or {})
        self.container = container
        self.order = list(order or [])
        self.shared = frozenset(shared)

    def __getitem__(self, name: str) -> Any:
        value = self._tensors[name]
        return value() if isinstance(value, _Deferred) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would read the tensor

    def __len__(self) -> int:
        return len(self._tensors)

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds the tensors, also those of a lazy State."""
        return {**self.__dict__, "_tensors": dict(self.items())}

    def __copy__(self) -> State:
        made = State.__new__(State)
        made.__dict__ |= self.__dict__
        return made

    def __repr__(self) -> str:
        kind = self.config.get("model_type", "")
        return f"State({len(self)} tensors{', ' + kind if kind else ''}{', ' + str(self.path) if self.path else ''})"

    def entry(self, name: str) -> Entry | None:
        """Where a tensor lies that is read at each access, as it is stored; None of one in memory."""
        value = self._tensors[name]
        return value.entry if isinstance(value, _Deferred) else None

    def replace(self, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> State:
        """The same checkpoint with other tensors (and config); shards and metadata are planned anew.

        A GGUF file's State stays one as long as tensors have the file's names: config and vocabulary are its metadata.
        """
        config = self.config if config is None else config
        kept: dict[str, Any] = {}
        if self.container == "gguf" and self.metadata and any(name in self for name in tensors):
            kept = {"container": self.container, "metadata": self.metadata}
        return State(tensors, config, path=self.path, side_files=self.side_files, shared=self.shared, **kept)

    def with_tensors(self, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> State:
        """The same checkpoint, its shards, metadata and order included, with these tensors (and config)."""
        return State(
            tensors,
            self.config if config is None else config,
            path=self.path,
            files=self.files,
            metadata=self.metadata,
            side_files=self.side_files,
            container=self.container,
            order=self.order,
            shared=self.shared,
        )

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor as it is written: (name, numpy array), QTensors through their format's dump."""
        for name in self:
            yield from dump_entry(name, self[name])


class _Deferred:
    """A tensor of a lazy State: read again at each access, so that nothing is held.

    Args:
      load: reads it.
      entry: the one stored tensor that it is read from, where it is one.
    """

    def __init__(self, load: Callable[[], Any], entry: Entry | None = None) -> None:
        self.load, self.entry = load, entry

    def __call__(self) -> Any:
        return self.load()


def load_state(path_or_id: str | os.PathLike, *, lazy: bool = False, revision: str | None = None) -> State:
    """Loads every tensor of a checkpoint of any architecture.

    Args:
      path_or_id: directory, weight file, or Hugging Face hub id.
      lazy: read tensors at each access (memory-mapped) instead of now.
      revision: of the hub repository.

    Returns:
      A State. Arrays keep their stored dtype; 64-bit ones stay numpy arrays.

    Raises:
      CheckpointError: damaged or incomplete files.
      FormatError: tensors that do not fit the quantization config or each other.
      UnsupportedError: a quantization method or option that is not read.
    """
    return state_of(open_checkpoint(path_or_id, revision), lazy=lazy)


def state_of(ckpt: Checkpoint, *, lazy: bool = False) -> State:
    """`load_state` of an opened checkpoint."""
    found = detect(ckpt)
    tensors: dict[str, Any] = {}
    taken: set[str] = set()
    shared: set[str] = set()
    if found is not None:
        fmt, quantization = found
        context = context_of(ckpt)
        names = list(ckpt.entries)
        with format_errors(ckpt, fmt, "quantization config"):
            options = fmt.parse(quantization, context)
            groups = (
                fmt.group(names, options, context) if fmt.group else group_by_prefix(names, fmt.markers, fmt.suffixes)
            )
        untouched: set[str] = set()
        strays, once = Strays(fmt), _Once(ckpt)
        for prefix, stored in groups.items():
            load = _module_loader(ckpt, fmt, prefix, stored, options, context, strays, once)
            whole = ckpt.entry(stored[""]) if stored.keys() == {""} else None
            value = _Deferred(load, whole) if lazy and fmt.deferrable else load()
            if value is None:
                untouched.update(stored.values())
                continue
            tensors[_key_of(fmt, prefix)] = value
            taken.update(name for suffix, name in stored.items() if not suffix.startswith("~"))
            shared.update(name for suffix, name in stored.items() if suffix.startswith("~"))
        _check_leftovers(ckpt, fmt, taken | untouched)
        clash = sorted(set(tensors) & (set(ckpt.entries) - taken))
        if clash:
            raise FormatError(f"{ckpt.label}: {clash[0]}: stored both quantized and dense; the file contradicts itself")
    for name in ckpt.entries:
        if name not in taken:
            tensors[name] = _Deferred(partial(ckpt.read, name), ckpt.entry(name)) if lazy else _hold(ckpt.read(name))
    return State(
        tensors,
        ckpt.config,
        path=ckpt.path,
        files=ckpt.files if ckpt.container == "safetensors" else {},
        metadata=ckpt.metadata,
        side_files=ckpt.side_files,
        container=ckpt.container,
        order=list(ckpt.entries),
        shared=shared,
    )


def context_of(ckpt: Checkpoint) -> Context:
    """What formats may look at beside a module's own tensors."""
    entries = {name: ckpt.entry(name) for name in ckpt.entries}
    return Context(
        config=ckpt.config,
        shapes={name: e.shape for name, e in entries.items()},
        dtypes={name: e.dtype for name, e in entries.items()},
        kinds={name: e.kind for name, e in entries.items() if e.kind},
        metadata=ckpt.merged_metadata,
        objects=ckpt.objects,
        label=ckpt.label,
    )


def _key_of(fmt: Format, prefix: str) -> str:
    """A State's key of a quantized module."""
    return prefix if fmt.parameter(prefix) else f"{prefix}.weight"


def _module_loader(
    ckpt: Checkpoint,
    fmt: Format,
    prefix: str,
    stored: Mapping[str, str],
    options: Any,
    context: Context,
    strays: Strays,
    once: _Once,
) -> Callable[[], QTensor | None]:
    def load() -> QTensor | None:
        parts = {s: once.read(name) if s.startswith("~") else ckpt.read(name) for s, name in stored.items()}
        with format_errors(ckpt, fmt, prefix):
            tensor = fmt.load(prefix, parts, options, context)
        # HQQ's own torch files have settings as plain values; what is read with those is written in another form.
        if tensor is not None and (ckpt.container == "safetensors" or not ckpt.objects):
            tensor = strays.carried(tensor, _key_of(fmt, prefix), stored, parts)
        return None if tensor is None else tensor.arrays(once.hold)

    return load


class _Once:
    """Keeps what modules share (a rotation, a scale) one array, read once, held once."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.ckpt = ckpt
        self.views: dict[str, np.ndarray] = {}
        self.held: dict[int, tuple[Any, Any]] = {}  # id of an array read -> weak references to it and to the one held

    def read(self, name: str) -> np.ndarray:
        """A stored tensor that modules borrow: the same view each time."""
        if name not in self.views:
            self.views[name] = self.ckpt.read(name)
        return self.views[name]

    def hold(self, array: Array) -> Array:
        """`_hold`; of an array that is held already, that one."""
        if not isinstance(array, np.ndarray):
            return _hold(array)
        read, held = self.held.get(id(array), (lambda: None, lambda: None))
        if read() is not array or (made := held()) is None:
            made = _hold(array)
            self.held[id(array)] = weakref.ref(array), weakref.ref(made)
        return made


@contextmanager
def format_errors(ckpt: Checkpoint, fmt: Format, what: str) -> Iterator[None]:
    """Names the file in what a format raises; what it did not foresee is a FormatError too, with its cause."""
    try:
        yield
    except JqError as e:
        if str(e).startswith(ckpt.label):
            raise
        raise type(e)(f"{ckpt.label}: {e}") from e
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, re.error) as e:
        raise FormatError(
            f"{ckpt.label}: {what}: cannot be read as {fmt.name} ({type(e).__name__}: {e}); the config or the tensors "
            "are damaged or of an unknown variant"
        ) from e


def _hold(array: Array) -> Array:
    """An array of our own: JAX's where it has the dtype, else numpy (64-bit integers lose half in JAX)."""
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    if array.dtype.itemsize == 8 or array.dtype.kind == "c":
        return np.array(array)
    return jnp.asarray(np.asarray(array, order="C"))  # ascontiguousarray would give a scalar an axis


def _check_leftovers(ckpt: Checkpoint, fmt: Format, taken: set[str]) -> None:
    owned = tuple("." + s for s in fmt.suffixes if s not in ("weight", "bias", ""))
    left = [name for name in ckpt.entries if name not in taken and name.endswith(owned)]
    if left:
        raise FormatError(
            f"{ckpt.label}: {left[0]}: belongs to a {fmt.name} module, but the tensors that go with it "
            f"({', '.join(fmt.markers)}) are missing ({len(left)} such tensors); the file is incomplete"
        )
    check_dense(ckpt, [name for name in ckpt.entries if name not in taken])


def check_dense(ckpt: Checkpoint, names: Iterable[str]) -> None:
    """Raises `FormatError` for a matrix of codes among the tensors of a quantized checkpoint that stay as they are.

    Without its scales it would count as a dense weight, with numbers that mean nothing.
    """
    for name in names:
        if name.endswith(".weight") and len((entry := ckpt.entry(name)).shape) == 2 and entry.dtype.name in CODES:
            raise FormatError(
                f"{ckpt.label}: {name}: holds {entry.dtype} codes, but no scales that go with them are beside it; "
                "the file is incomplete"
            )


def quantized(model_or_state: Any) -> dict[str, QTensor]:
    """Quantized tensors by module path, e.g. "model.layers.0.self_attn.q_proj".

    Raises:
      TypeError: neither an NNX module nor a mapping of tensors.
    """
    if isinstance(model_or_state, Mapping):
        return {module_of(k): v for k in model_or_state if isinstance(v := model_or_state[k], QTensor)}
    from flax import nnx

    from jq import nn

    if not isinstance(model_or_state, nnx.Module):
        raise TypeError(f"jq.quantized takes a model or a State, got {type(model_or_state).__name__}")
    return nn.quantized(model_or_state)


def save(model_or_state: Any, path: str | os.PathLike) -> None:
    """Writes a Hugging Face directory: weights, config.json, tokenizer and other side files.

    Every stored tensor of a loaded checkpoint comes back byte for byte. The directory appears whole or not at all; of a
    checkpoint that it replaces, directories within it and hidden files stay, and what reading leaves out: adapters' and
    trainers' files (`adapter_model.safetensors`, `optimizer.pt`, ...), files of more than 64 MB that hold no weights.

    Raises:
      CheckpointError: `path` holds files but no checkpoint, is a file or the current directory, or cannot be written; a
        config or a file name of the State that cannot be.
      UnsupportedError: tensors whose format cannot be written (GGUF); the message names what can.
    """
    state = model_or_state if isinstance(model_or_state, State) else _state_of_model(model_or_state)
    _check_writable(state)
    from jq.write import write_state

    with replacing(path) as folder:
        write_state(state, folder)


def _state_of_model(model: Any) -> State:
    if isinstance(model, Mapping):
        return State(model)
    to_state = getattr(model, "to_state", None)
    if to_state is None:
        raise TypeError(
            f"jq.save takes a model of jq.load, a State or a mapping of tensors, got {type(model).__name__}"
        )
    return to_state()


def _check_writable(state: State) -> None:
    if state.container == "gguf":
        from jq.formats.gguf import INSTEAD

        raise UnsupportedError(f"{state.path}: GGUF is read, not written; {INSTEAD}")
