"""What of a checkpoint goes where in a transformers model, decided from the headers before any tensor is read.

transformers only reports tensors without a module and initialises modules without tensors at random. `Plan` finds
both from names and shapes alone and raises, naming the tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from jq import checkpoint as jq_checkpoint
from jq import state, torch_file
from jq.checkpoint import Checkpoint
from jq.errors import CheckpointError, JqError, UnsupportedError
from jq.formats import by_method, table
from jq.formats.base import Context, Format, group_by_prefix

# Scales of a quantized KV cache and of quantized attention: kept beside the attention module and written back.
CARRIED = re.compile(r"\.([qkv]_(scale|zero_point|global_scale)|prob_scale)$")


# One expert under the names of most models, also where the model's own files have others (GPT-QModel's Mixtral).
_SINGLE_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)$")
_PROJECTIONS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
# Suffixes of tensors that several modules share (`jq.formats.base`).
BORROWED = "~"


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """How a module's QTensor is made from the tensors of the file, and back.

    Fields:
      format: the storage format.
      prefix: name of the module in the file.
      names: {suffix: stored name}.
      stored: {suffix: parameter name in the module while it holds the stored tensors}.
      options, context: what `format.load` takes; None after pickling, when only `dump` is needed.
      shared: {suffix: array} of tensors of several modules, which are read once and stay in numpy.
    """

    format: Format
    prefix: str
    names: Mapping[str, str]
    stored: Mapping[str, str]
    options: Any = None
    context: Context | None = None
    shared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def load(self, parts: Mapping[str, np.ndarray]) -> Any:
        """The QTensor of the module, None where the format says that it is not quantized after all."""
        if self.context is None:
            raise RuntimeError(f"{self.prefix}: unpickled while it held stored tensors; load the model again")
        try:
            return self.format.load(self.prefix, {**parts, **self.shared}, self.options, self.context)
        except JqError as e:
            raise type(e)(f"{self.context.label}: {e}") from e

    def moved(self, suffix: str, prefix: str) -> str:
        """A stored name, with the prefix that the module has in the model in place of the file's."""
        return prefix + self.names[suffix][len(state.module_of(self.prefix)) :]

    def beside(self, prefix: str) -> list[tuple[str, np.ndarray]]:
        """(stored name, array) of the shared tensors that lie on this module in the file."""
        own = {s: a for s, a in self.shared.items() if self.names[s].startswith(f"{self.prefix}.")}
        return [(self.moved(suffix, prefix), array) for suffix, array in own.items()]

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def __reduce__(self) -> Any:
        return _unpickle, (self.format.name, self.prefix, dict(self.names), dict(self.stored), dict(self.shared))


def _unpickle(
    name: str, prefix: str, names: dict[str, str], stored: dict[str, str], shared: dict[str, np.ndarray]
) -> Origin:
    return Origin(table()[name], prefix, names, stored, shared=shared)


class JqRenaming(WeightRenaming):
    """Maps stored names to parameters by a table, instead of by patterns. Saving does not go through it."""

    __slots__ = ("table",)

    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__("jq_never_in_a_name", "jq_never_in_a_name")
        self.table = dict(table)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self.table.get(source_key)
        return (source_key, None) if found is None else (found, "jq")

    def reverse_transform(self) -> JqRenaming:
        return JqRenaming({})

    def was_used(self) -> bool:
        return False

    def __deepcopy__(self, memo: Any) -> JqRenaming:
        return self


def open_files(files: Iterable[str]) -> Checkpoint:
    """The checkpoint that transformers resolved to these files, with the config and side files of their directory."""
    paths = [Path(f) for f in files]
    folder = paths[0].parent
    config_file = folder / "config.json"
    config = jq_checkpoint.parse_json(config_file.read_bytes(), config_file, "file") if config_file.is_file() else {}
    sides = jq_checkpoint._side_files(folder)
    if paths[0].suffix == ".safetensors":
        entries, names, metadata = jq_checkpoint._read_safetensors(folder, paths)
        return Checkpoint(folder, config, entries, names, metadata, sides, {}, "safetensors")
    tensors: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for path in paths:
        part, values = torch_file.flatten(torch_file.read(path))
        tensors.update(part)
        objects.update(values)
    return Checkpoint(folder, config, tensors, dict.fromkeys(tensors, paths[0].name), {}, sides, objects, "torch")


class Plan:
    """Which module takes which tensors of a checkpoint.

    Attributes:
      modules: {module path: Origin} of linear layers.
      experts: {path of fused experts: {(parameter, part): {expert: Origin}}}; expert None for tensors stored stacked.
      table: {stored name: parameter path} for the loader.
      carried: {module path: {name: stored name}} of tensors that are only kept.
      shared: {stored name: array} of tensors that linear layers share; no parameter takes them.
      biases: {module path: stored name} of biases for layers that the model builds without one.
      metadata: safetensors metadata of the file.
    """

    def __init__(self, model: Any, ckpt: Checkpoint, quantization: Mapping[str, Any], method: str) -> None:
        self.model, self.ckpt, self.label = model, ckpt, ckpt.label
        self.format = by_method(method, f"{ckpt.label}: quantization_config")
        self.context = dataclasses.replace(
            state.context_of(ckpt),
            config={**(ckpt.config or model.config.to_dict()), "quantization_config": quantization},
        )
        self.options = self._parse(quantization)
        self.metadata = {k: v for k, v in ckpt.merged_metadata.items() if k != "format"}
        self.modules: dict[str, Origin] = {}
        self.experts: dict[str, dict[tuple[str, int], dict[int | None, Origin]]] = {}
        self.table: dict[str, str] = {}
        self.carried: dict[str, dict[str, str]] = {}
        self.biases: dict[str, str] = {}
        self.shared: dict[str, np.ndarray] = {}
        self._meta = model.state_dict()
        self._paths = dict(model.named_modules())
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        names = list(ckpt.entries)
        groups = (
            self.format.group(names, self.options, self.context)
            if self.format.group
            else group_by_prefix(names, self.format.markers, self.format.suffixes)
        )
        self.groups = groups
        grouped = {name for stored in groups.values() for name in stored.values()}
        self.loose = [name for name in names if name not in grouped]  # everything that is an ordinary tensor
        state.check_dense(ckpt, self.loose)
        transforms = getattr(self.options, "transforms", None)
        self._turning = set() if transforms is None else transforms.tensors  # matrices, some of queries and keys
        for prefix, stored in groups.items():
            self._place(prefix, stored)
        self._place_loose()

    def _parse(self, quantization: Mapping[str, Any]) -> Any:
        try:
            return self.format.parse(quantization, self.context)
        except JqError as e:
            named = str(e).startswith(self.label)
            raise type(e)(str(e) if named else f"{self.label}: {e}") from e

    def resolve(self, key: str) -> tuple[str, str | None]:
        """A stored name as the model's own, and the pattern of the model's converter that takes it, if one does."""
        return rename_source_key(key, self._renamings, self._converters, self.model.base_model_prefix, self._meta)

    def _place(self, prefix: str, stored: Mapping[str, str]) -> None:
        if self._ignored(next(iter(stored.values()))):
            return
        origin = Origin(
            self.format,
            prefix,
            dict(stored),
            {s: "stored_" + (re.sub(r"\W", "_", s) or "tensor") for s in stored},
            self.options,
            self.context,
        )
        key = prefix if self.format.parameter(prefix) else f"{prefix}.weight"
        target, pattern = self.resolve(key)
        path, _, _parameter = target.rpartition(".")
        if pattern is not None or self._is_experts(path):
            self._place_expert(origin, key, target, pattern)
            return
        single = _SINGLE_EXPERT.match(path)
        if path not in self._paths and single and self._is_experts(single[1]):
            parameter, part = _PROJECTIONS[single[3]]
            self._put_expert(origin, single[1], parameter, part, int(single[2]))
            return
        if path not in self._paths:
            raise CheckpointError(
                f"{self.label}: {next(iter(stored.values()))}: the model ({type(self.model).__name__}) has no module "
                f"{path!r} to take it; config.json and the weights disagree"
            )
        shared = {suffix: name for suffix, name in stored.items() if suffix.startswith(BORROWED)}
        for name in shared.values():
            if name not in self.shared:
                self.shared[name] = np.asarray(self.ckpt.read(name))
        own = {suffix: parameter for suffix, parameter in origin.stored.items() if suffix not in shared}
        arrays = {suffix: self.shared[name] for suffix, name in shared.items()}
        self.modules[path] = origin = dataclasses.replace(origin, stored=own, shared=arrays)
        for suffix, parameter in own.items():
            self.table[stored[suffix]] = f"{path}.{parameter}"

    def _is_experts(self, path: str) -> bool:
        module = self._paths.get(path)
        return module is not None and hasattr(module, "num_experts") and not hasattr(module, "in_features")

    def _place_expert(self, origin: Origin, key: str, target: str, pattern: str | None) -> None:
        """Experts: one QTensor for each (parameter, part of it); the model's own converter says which part."""
        path, _, parameter = target.rpartition(".")
        if not self._is_experts(path):
            raise UnsupportedError(
                f"{self.label}: {key}: the model merges this weight with others into {target}, which packed tensors "
                "cannot be; only experts of a mixture are kept apart"
            )
        number = re.search(r"\.experts\.(\d+)\.", key)
        expert = int(number.group(1)) if number and pattern is not None else None
        part = 0
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                part = converter.source_patterns.index(pattern)
                plain = {type(op).__name__ for op in converter.operations} <= {"MergeModulelist", "Concatenate"}
                if not plain:
                    raise UnsupportedError(f"{self.label}: {key}: experts that the model rearranges while loading")
        self._put_expert(origin, path, parameter, part, expert)

    def _put_expert(self, origin: Origin, path: str, parameter: str, part: int, expert: int | None) -> None:
        slot = f"{parameter}_{part}" + ("" if expert is None else f"_{expert}")
        stored = {suffix: f"{slot}_{name}" for suffix, name in origin.stored.items()}
        for suffix, name in origin.names.items():  # a tensor of all experts, which each of them looks at
            if suffix.startswith(BORROWED):
                stored[suffix] = "shared_" + name.rpartition(".")[2]
        placed = dataclasses.replace(origin, stored=stored)
        self.experts.setdefault(path, {}).setdefault((parameter, part), {})[expert] = placed
        for suffix, name in origin.names.items():
            self.table[name] = f"{path}.{stored[suffix]}"

    def _place_loose(self) -> None:
        """Biases that the model lacks, tensors that are only carried; packed tensors without a module raise."""
        owned = tuple("." + s for s in self.format.suffixes if s not in ("weight", "bias", ""))
        for name in self.loose:
            target, pattern = self.resolve(name)
            if self._ignored(name):
                continue
            self._check_float(name, target)
            if target in self._meta or pattern is not None:
                continue
            path, _, last = target.rpartition(".")
            path = self._in_model(path, matrix=name in self._turning)
            if last == "bias" and path in self.modules:
                self.biases[path] = name
                self.table[name] = f"{path}.bias"
            elif self._is_carried(name, path, last):
                self.carried.setdefault(path, {})[last] = name
                self.table[name] = f"{path}.{last}"
            elif name.endswith(owned):
                raise CheckpointError(
                    f"{self.label}: {name}: belongs to a {self.format.name} module, but no module of the model takes "
                    f"it, or the tensors that go with it ({', '.join(self.format.markers)}) are missing"
                )
            elif path in self.modules:
                raise UnsupportedError(
                    f"{self.label}: {name}: lies beside a packed layer, and {self.format.name} has no such tensor; the "
                    "layer's numbers would be others without it"
                )

    def _check_float(self, name: str, target: str) -> None:
        """Codes in place of a float tensor: the loader would take them for its numbers."""
        meta, stored = self._meta.get(target), self.entry(name)[1]
        if stored.kind in "iu" and (meta.is_floating_point() if meta is not None else target.endswith(".bias")):
            raise CheckpointError(f"{self.label}: {name}: found dtype {stored}, expected a float tensor")

    def _in_model(self, path: str, *, matrix: bool) -> str:
        """A module of the file as the model names it, which may be the base model alone, or more than it; a matrix of
        queries or keys is a module that the model does not have, inside one that it has."""
        base = self.model.base_model_prefix
        for found in (path, f"{base}.{path}", path.removeprefix(f"{base}.")):
            if (found.rpartition(".")[0] if matrix else found) in self._paths:
                return found
        return path

    def _is_carried(self, name: str, path: str, last: str) -> bool:
        if name in self._turning:  # a matrix of queries or keys, in a module of its own
            return path.rpartition(".")[0] in self._paths
        return path in self._paths and bool(
            CARRIED.search(name) or self._scales_of_activation(path, last) or self._left_beside(path, last)
        )

    def _scales_of_activation(self, path: str, last: str) -> bool:
        """AWQ's `act.scales`: the input of the layer after an activation function is divided by them."""
        return last == "scales" and path.endswith(".act") and self.format.name == "awq"

    def _left_beside(self, path: str, last: str) -> bool:
        """What a format leaves beside weights that it did not quantize: scales of layers that FP8 skipped."""
        return last in self.format.beside and path not in self.modules and f"{path}.weight" in self._meta

    @functools.cached_property
    def _unexpected(self) -> re.Pattern[str] | None:
        patterns = list(self.model._keys_to_ignore_on_load_unexpected or [])
        return re.compile("|".join(f"({p})" for p in patterns)) if patterns else None

    def _ignored(self, name: str) -> bool:
        """Tensors that the model class itself says it does not use (multi-token prediction layers, ...)."""
        return self._unexpected is not None and self._unexpected.search(name) is not None

    def is_activation(self, path: str) -> bool:
        """Whether a carried tensor is AWQ's scales of an activation function."""
        return "scales" in self.carried.get(path, {}) and path.endswith(".act")

    def renamed_table(self) -> dict[str, str]:
        """`table` by the names that the model's own renamings make of the stored ones: ours comes after them."""
        found = {}
        for name, target in self.table.items():
            for renaming in self._renamings:
                name, _ = renaming.rename_source_key(name)
            found[name] = target
        return found

    def renamed_dtypes(self) -> dict[str, Any]:
        """{parameter: its dtype in the model} of float tensors that the file holds whole under another name."""
        found = {}
        for name in self.loose:
            target, pattern = self.resolve(name)
            dtype = self._meta[target].dtype if target in self._meta and target != name and pattern is None else None
            if dtype is not None and dtype.is_floating_point:
                found[target] = dtype
        return found

    @functools.cached_property
    def loose_targets(self) -> set[str]:
        """Parameters of the model that ordinary tensors of the file go to."""
        return {self.resolve(name)[0] for name in self.loose}

    @functools.cached_property
    def kept_dtypes(self) -> set[str]:
        """Parameters that keep the stored dtype."""
        return set(self.table.values())

    def entry(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of a stored tensor."""
        found = self.ckpt.entry(name)
        return found.shape, found.dtype

    def check_complete(self, model: Any) -> None:
        """Raises where a parameter of the prepared model has no tensor in the file.

        Heads outside the base model that are not its output layer (a new classifier) are left to transformers, which
        initialises them as for any float checkpoint.
        """
        have = set(self.table.values())
        for name in self.loose:
            target, pattern = self.resolve(name)
            have.add(target)
            for converter in self._converters if pattern is not None else ():
                if pattern in converter.source_patterns:
                    first = converter.target_patterns[0]
                    have |= {target.replace(first, other) for other in converter.target_patterns}
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        optional = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or []]
        head = model.get_output_embeddings()
        for key in model.state_dict():
            if key in have or key in tied or any(p.search(key) for p in optional):
                continue
            module = self._paths.get(key.rpartition(".")[0])
            inside = key.startswith(model.base_model_prefix + ".") or not hasattr(model, model.base_model_prefix)
            if inside or (head is not None and module is head):
                raise CheckpointError(
                    f"{self.label}: {key}: not in the file; the module would be left with random numbers. "
                    "The download is incomplete, or config.json belongs to another model"
                )
