"""transform_config of compressed-tensors: rotations of weights and activations (QuIP, SpinQuant).

    {"config_groups": {name: {"type": "hadamard" | "random-hadamard" | "random-matrix", "head_dim": block size or null,
     "apply": [{"targets": [...], "location": ..., "inverse": false, "ignore": [...]}], "precision", "randomize", ...}}}

Locations weight_input and weight_output are in the weights already. The others run: "input" before a linear layer (and
before its inputs are quantized), "output" behind it, "q_attn" and "k_cache" on queries and keys behind the rotary
embedding. Their matrices are stored once for each size of a scheme, on the first module that uses one:
`<module>.<name>_<location>.weight` [n, n] (float64 or `precision`), `.perm` int64 [n] with "randomize". Hadamard matrices hold 1 and -1,
and the product is divided by sqrt(n); "inverse" multiplies by the transposed one. A random matrix is stored as it is
applied, inverted where it says so.

Source: compressed-tensors 0.20.0 (transform/), which runs on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq import rotation
from jq.activations import FLOAT, Activation
from jq.errors import FormatError
from jq.formats.base import Context, Parts, true_or_false
from jq.qtensor.rotated import hadamard as hadamard_matrix
from jq.rotation import Rotation

LOCATIONS = ("input", "weight_input", "weight_output", "output", "k_cache", "q_attn")
AROUND = ("input", "output")  # of a linear layer
TYPES = ("hadamard", "random-hadamard", "random-matrix")


@dataclasses.dataclass(frozen=True)
class Apply:
    """Where a transform is applied."""

    targets: tuple[str, ...]
    location: str
    inverse: bool = False
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Transform:
    """One entry of `config_groups`; `size` is the block's, 0 for the whole axis."""

    name: str
    type: str
    size: int = 0
    randomize: bool = False
    apply: tuple[Apply, ...] = ()


def parse_transforms(value: Any, label: str) -> tuple[Transform, ...]:
    """The schemes of a transform_config.

    Raises:
      FormatError: keys or values that the library refuses.
    """
    label = f"{label}: transform_config"
    value = value or {}
    groups = value.get("config_groups") or {} if isinstance(value, Mapping) else value
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise FormatError(f"{label} {value!r:.80}, expected an object with config_groups")
    return tuple(_parse_one(str(name), group, f"{label}.{name}") for name, group in groups.items())


def _parse_one(name: str, group: Mapping[str, Any], label: str) -> Transform:
    _known(group, ("type", "apply", "randomize", "requires_grad", "head_dim", "precision"), label)
    size = group.get("head_dim")
    if group.get("type") not in TYPES:
        raise FormatError(f"{label}: type {group.get('type')!r} is not known; known: {', '.join(TYPES)}")
    if size is not None and (type(size) is not int or size < 1):
        raise FormatError(f"{label}: head_dim {size!r}, expected a positive number or null")
    found = []
    for entry in group.get("apply") or []:
        if not isinstance(entry, Mapping):
            raise FormatError(f"{label}: apply holds {entry!r:.60}, expected objects")
        _known(entry, ("targets", "location", "inverse", "ignore"), label)
        if entry.get("location") not in LOCATIONS:
            raise FormatError(f"{label}: location {entry.get('location')!r}; known: {', '.join(LOCATIONS)}")
        targets, ignore = (_names(entry.get(k), f"{label}: {k}") for k in ("targets", "ignore"))
        found.append(Apply(targets, entry["location"], true_or_false(entry, "inverse", label, default=False), ignore))
    return Transform(
        name, group["type"], size or 0, true_or_false(group, "randomize", label, default=False), tuple(found)
    )


def _known(value: Mapping[str, Any], keys: tuple[str, ...], label: str) -> None:
    for key in sorted(set(value) - set(keys)):
        raise FormatError(f"{label}: unknown key {key!r}; the library refuses it too")


def _names(value: Any, label: str) -> tuple[str, ...]:
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"{label}: {value!r:.60}, expected a list of strings")
    return tuple(value)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored matrix: the module that it lies on, its location, its size."""

    module: str
    location: str
    size: int


class Transforms:
    """The transforms of one checkpoint that run on activations, and where their matrices are stored.

    Args:
      schemes: of the config.
      context: names and shapes of the stored tensors.
      match: (module, target) -> whether a target means a module.
    """

    def __init__(self, schemes: tuple[Transform, ...], context: Context, match: Any) -> None:
        self._match, self._label = match, context.label
        self.schemes = tuple(s for s in schemes if any(not a.location.startswith("weight") for a in s.apply))
        self._stored: dict[str, list[Stored]] = {s.name: [] for s in self.schemes}
        self.tensors: set[str] = set()
        endings = {f"{s.name}_{where}": s for s in self.schemes for where in LOCATIONS}
        for name, shape in context.shapes.items():
            module, _, last = name.rpartition(".")
            parent, _, own = module.rpartition(".")
            if own in endings and last in ("weight", "perm"):
                self.tensors.add(name)
                if last == "weight":
                    scheme = endings[own]
                    self._check_shape(name, shape)
                    self._stored[scheme.name].append(Stored(parent, own[len(scheme.name) + 1 :], shape[0]))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise FormatError(f"{name}: found shape {shape}, expected a square matrix; the file is damaged")

    def around(self, module: str, locations: tuple[str, ...] = AROUND) -> list[tuple[Transform, Apply]]:
        """The transforms of a module, in the order in which the library registers them."""
        return [
            (scheme, apply)
            for scheme in self.schemes
            for apply in scheme.apply
            if apply.location in locations
            and any(self._match(module, t) for t in apply.targets)
            and not any(self._match(module, t) for t in apply.ignore)
        ]

    def everywhere(self) -> list[tuple[Transform, Apply]]:
        """Every transform around linear layers."""
        return [(s, a) for s in self.schemes for a in s.apply if a.location in AROUND]

    def borrowed(self, module: str, locations: tuple[str, ...] = AROUND) -> dict[str, str]:
        """{"~suffix": stored name} of every matrix that a module may need: which one, its sizes tell."""
        found = {}
        for scheme, _ in self.around(module, locations):
            for stored in self._stored[scheme.name]:
                name = f"{stored.module}.{scheme.name}_{stored.location}"
                found[f"~{name}"] = f"{name}.weight"
                if f"{name}.perm" in self.tensors:
                    found[f"~{name}.perm"] = f"{name}.perm"
        return found

    def rotation(
        self, module: str, scheme: Transform, apply: Apply, size: int, parts: Parts, key: str
    ) -> tuple[Rotation, Parts]:
        """(what runs, its arrays by name) of one transform over an axis of `size`.

        Raises:
          FormatError: a block that does not divide the axis, or no stored matrix.
        """
        block = scheme.size or size
        own = f"{module}.{scheme.name}_{apply.location}.weight"
        if size % block:
            raise FormatError(f"{own}: blocks of {block} do not divide {size}; the config does not belong to this file")
        matches = [s for s in self._stored[scheme.name] if s.size == block and self._same(scheme, s, apply)]
        nearest = next((s for s in matches if s.module == module), matches[0] if matches else None)
        hadamard = scheme.type != "random-matrix"
        if nearest is not None:
            name = f"{nearest.module}.{scheme.name}_{nearest.location}"
            made, arrays = rotation.held(_floats(parts[f"~{name}"], f"{name}.weight"), scaled=hadamard)
            perm = parts.get(f"~{name}.perm")
        elif scheme.type == "hadamard" and not scheme.randomize:
            if block & (block - 1):
                raise FormatError(f"{own}: missing, and {block} is no power of two")
            (made, arrays), perm = rotation.held(hadamard_matrix(block), scaled=True), None
        else:
            raise FormatError(
                f"{own}: missing; no module stores a {scheme.type} matrix of {block}. The file is incomplete"
            )
        if scheme.randomize:
            if perm is None or sorted(perm.tolist()) != list(range(block)):
                raise FormatError(f"{own[:-6]}perm: missing, or no permutation of {block} inputs")
            arrays = {**arrays, "perm": perm.astype(np.int32)}
        made = dataclasses.replace(made, transposed=apply.inverse and hadamard, key=key, permuted=scheme.randomize)
        return made, {f"{key}{name}": array for name, array in arrays.items()}

    def _same(self, scheme: Transform, stored: Stored, apply: Apply) -> bool:
        """Whether a stored matrix is the one that `apply` uses: random ones are stored inverted where they are so applied."""
        if scheme.type != "random-matrix":
            return True
        owners = [a for s, a in self.around(stored.module, LOCATIONS) if s is scheme and a.location == stored.location]
        return not owners or owners[-1].inverse == apply.inverse

    def attach(self, module: str, tensor: Any, parts: Parts) -> Any:
        """A linear layer's weight with the transforms around it."""
        inputs: list[Rotation] = []
        outputs: list[Rotation] = []
        arrays: Parts = {}
        for i, (scheme, apply) in enumerate(self.around(module)):
            into, size = (inputs, tensor.shape[1]) if apply.location == "input" else (outputs, tensor.shape[0])
            made, found = self.rotation(module, scheme, apply, size, parts, f"~{i}.")
            into.append(made)
            arrays |= found
        if not arrays:
            return tensor
        inputs.reverse()  # the library puts each in front of those before it
        activation = tensor.activation or Activation(FLOAT)
        options = [("prepare", "rotate"), ("rotate_input", tuple(inputs))] if inputs else []
        options += [("finish", "rotate"), ("rotate_output", tuple(outputs))] if outputs else []
        activation = dataclasses.replace(
            activation,
            parameters=(*activation.parameters, *arrays),
            options=(*activation.options, *options),
        )
        return tensor.replace(extras={**tensor.extras, **arrays}, activation=activation)


def _floats(matrix: np.ndarray, name: str) -> np.ndarray:
    matrix = np.asarray(matrix)
    with np.errstate(over="ignore"):  # it is applied in float32
        finite = matrix.dtype.kind in "fV" and np.isfinite(matrix.astype(np.float32)).all()
    if not finite:
        raise FormatError(f"{name}: found {matrix.dtype}, or values that are not finite; the file is damaged")
    return matrix
