"""The configuration of compressed-tensors checkpoints: schemes, presets, and which module has which scheme.

Read after compressed-tensors 0.20.0 (quantization/quant_args.py, quant_scheme.py, quant_config.py, utils/match.py) and,
for what later versions dropped, 0.9 - 0.12 (`actorder: group`, sparse formats, string `block_structure`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jq.errors import FormatError
from jq.formats.base import Context, true_or_false, warn_unknown
from jq.formats.compressed_tensors_transforms import Transforms, parse_transforms

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
FLOAT_KINDS = {4: "e2m1", 6: "e2m3", 8: "e4m3fn"}
# Formats whose tensors are read, dense ones included; "mixed-precision" says that each group names its own.
FORMATS = (
    "dense",
    "fakequant",
    "mixed-precision",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "marlin-24",
    "sparse-bitmask",
    "sparse-24-bitmask",
)
# Class names of embedding tables go by the module's own name: a checkpoint does not hold classes.
_EMBEDDING_NAMES = re.compile(r"(^|\.)(embed_tokens|embeddings?|word_embeddings|wte|wpe|tok_embeddings|embed_in)$")


@dataclasses.dataclass(frozen=True)
class Args:
    """`QuantizationArgs`: how one tensor (weight, input or output) is quantized.

    Fields as in the library. `dynamic` is True, False or "local"; `scale_dtype` "" where the file names none.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int = 0
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str = ""
    scale_dtype: str = ""

    @property
    def is_mx(self) -> bool:
        """Power-of-two scales, one for 32 values (MXFP4, MXFP6, MXFP8)."""
        small = self.num_bits in (4, 6)  # files older than scale_dtype: fp4 in groups of 32 is MXFP4
        return self.type == "float" and self.group_size == 32 and (self.scale_dtype == "uint8" or small)

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest quantized value."""
        if self.type == "int":
            return -(2.0 ** (self.num_bits - 1)), 2.0 ** (self.num_bits - 1) - 1
        top = {4: 6.0, 6: 7.5, 8: 448.0}[self.num_bits]
        return -top, top

    def __str__(self) -> str:
        kind = f"int{self.num_bits}" if self.type == "int" else f"fp{self.num_bits}"
        size = f" {self.group_size}" if self.group_size else ""
        when = "static" if self.dynamic is False else "dynamic" if self.dynamic is True else "dynamic local"
        return f"{kind} {self.strategy}{size} {when}{'' if self.symmetric else ' asym'}"


@dataclasses.dataclass(frozen=True)
class Group:
    """One entry of `config_groups`: a scheme and the modules it is for."""

    targets: tuple[str, ...]
    weights: Args | None = None
    inputs: Args | None = None
    outputs: Args | None = None
    format: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """A parsed quantization config."""

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    format: str = "dense"
    kv_cache: Args | None = None
    version: str = ""
    transforms: Transforms | None = dataclasses.field(default=None, compare=False)

    def group_of(self, name: str, *, respect_ignore: bool = True) -> Group | None:
        """The scheme of a module: exact names first, then regexes, then class names, each sorted as strings."""
        if respect_ignore and any(matches(name, target) for target in self.ignore):
            return None
        schemes = {target: group for group in self.groups for target in group.targets}  # a later group wins
        ordered = sorted(schemes, key=lambda t: ("re:" in t, t))
        for test in (matches_name, matches_class):
            for target in ordered:
                if test(name, target):
                    return schemes[target]
        return None


def matches_name(name: str, target: str) -> bool:
    """Exact module name, or a regex (anchored at its start only) after "re:"."""
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), name) is not None
        except re.error as e:
            raise FormatError(f"quantization_config: target {target!r} is no regular expression ({e})") from e
    return name == target


def is_embedding(name: str) -> bool:
    """Whether a module's name is one that embedding tables have."""
    return _EMBEDDING_NAMES.search(name) is not None


def matches_class(name: str, target: str) -> bool:
    """Class of the module, as far as its name tells: embeddings by their usual names, everything else is a Linear."""
    return target == ("Embedding" if is_embedding(name) else "Linear")


def matches(name: str, target: str) -> bool:
    return matches_name(name, target) or matches_class(name, target)


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization config (or old `compression_config`).

    Raises:
      FormatError: values that the format does not know.
    """
    label = f"{context.label}: quantization_config"
    if isinstance(config.get("quantization_config"), Mapping):  # transformers 4.45 wrote it one level deeper
        config = {**{k: v for k, v in config.items() if k != "quantization_config"}, **config["quantization_config"]}
    known = {
        *("quant_method", "version", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"),
        *("global_compression_ratio", "moe_sparsity_config", "sparsity_config", "transform_config", "run_compressed"),
        *("dequantize", "use_optimized_inference", "sparsity_structure"),
    }
    warn_unknown(config, known, context.label)
    # Before 0.20 the format may be a sparse one itself, and a sparsity config lay where the quantization config is now.
    sparse = config.get("sparsity_config")
    if sparse is None and str(config.get("format", "")).startswith("sparse-") and "config_groups" not in config:
        sparse = config
    form = str(config.get("format") or "dense")
    _one_of(form, FORMATS, f"{label}: format")
    _one_of(str(config.get("quantization_status") or "compressed"), STATUSES, f"{label}: quantization_status")
    _check_sparsity(sparse, f"{label}: sparsity_config")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise FormatError(f"{label}: config_groups is a {type(groups).__name__}, expected an object of schemes")
    ignore = _strings(config.get("ignore"), f"{label}: ignore")
    return Options(
        groups=tuple(parse_group(name, group, f"{label}: config_groups.{name}") for name, group in groups.items()),
        ignore=ignore,
        format=form,
        kv_cache=parse_args(config.get("kv_cache_scheme"), f"{label}: kv_cache_scheme"),
        version=str(config.get("version") or ""),
        transforms=Transforms(parse_transforms(config.get("transform_config"), label), context, matches),
    )


def parse_group(name: str, group: Any, label: str) -> Group:
    """One value of config_groups: a scheme, or the targets of the preset that `name` names."""
    if isinstance(group, list | tuple):
        return preset(name, _strings(group, label), label)
    if not isinstance(group, Mapping):
        raise FormatError(f"{label}: {group!r} is neither a scheme nor a list of targets")
    extra = set(group) - {"targets", "weights", "input_activations", "output_activations", "format"}
    if extra:
        raise FormatError(f"{label}: unknown keys {', '.join(sorted(extra))}; the library refuses them too")
    form = str(group.get("format") or "")
    if form:
        _one_of(form, FORMATS, f"{label}: format")
    return Group(
        targets=_strings(group.get("targets"), f"{label}: targets"),
        weights=parse_args(group.get("weights"), f"{label}: weights"),
        inputs=parse_args(group.get("input_activations"), f"{label}: input_activations"),
        outputs=parse_args(group.get("output_activations"), f"{label}: output_activations"),
        format=form,
    )


def parse_args(value: Any, label: str) -> Args | None:
    """A QuantizationArgs object with the library's defaults and its inference of the strategy."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise FormatError(f"{label}: {value!r}, expected an object")
    ignored = {"observer", "observer_kwargs", "zp_dtype", "is_float", "min", "max"}
    for key in sorted(set(value) - ignored - {f.name for f in dataclasses.fields(Args)}):
        raise FormatError(f"{label}: unknown key {key!r}; the library refuses it too")
    bits, kind = value.get("num_bits", 8), str(value.get("type") or "int").lower()
    _one_of(kind, ("int", "float"), f"{label}: type")
    if not isinstance(bits, int) or not 1 <= bits <= 8 or (kind == "float" and bits not in FLOAT_KINDS):
        raise FormatError(f"{label}: num_bits {bits!r} of type {kind}, expected 1 to 8 (int) or 4, 6, 8 (float)")
    size = value.get("group_size")
    if size is not None and (not isinstance(size, int) or size < -1 or size == 0):
        raise FormatError(f"{label}: group_size {size!r}, expected a positive number, or -1 for one group a channel")
    strategy = value.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(strategy).lower()
    _one_of(strategy, STRATEGIES, f"{label}: strategy")
    if strategy in ("group", "tensor_group") and not (size and size > 0):
        raise FormatError(f"{label}: strategy {strategy} needs a positive group_size, found {size!r}")
    dynamic = "local" if value.get("dynamic") == "local" else true_or_false(value, "dynamic", label, default=False)
    return Args(
        num_bits=bits,
        type=kind,
        symmetric=true_or_false(value, "symmetric", label),
        strategy=strategy,
        group_size=size if size and size > 0 else 0,
        block_structure=_block(value.get("block_structure"), strategy, label),
        dynamic=dynamic,
        actorder=_actorder(value.get("actorder"), label),
        scale_dtype=str(value.get("scale_dtype") or "").removeprefix("torch."),
    )


def _block(value: Any, strategy: str, label: str) -> tuple[int, int] | None:
    if isinstance(value, str):  # "128x128" in old files
        value = [int(part) if part.isdigit() else part for part in value.split("x")]
    if value is None:
        if strategy == "block":
            raise FormatError(f"{label}: strategy block needs a block_structure, e.g. [128, 128]")
        return None
    if len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise FormatError(f"{label}: block_structure {value!r}, expected two positive numbers [rows, columns]")
    return int(value[0]), int(value[1])


def _actorder(value: Any, label: str) -> str:
    """ "group" (g_idx in the file) or "" (nothing in the file: null, false, "weight", "static")."""
    name = {True: "group", False: "", None: ""}.get(value, value) if not isinstance(value, str) else value.lower()
    found = {"": "", "weight": "", "static": "", "group": "group", "dynamic": "group"}.get(str(name))
    if found is None:
        raise FormatError(f"{label}: actorder {value!r}, expected null, 'weight', 'static', 'group' or 'dynamic'")
    return found


def _check_sparsity(value: Any, label: str) -> None:
    """Old files' `sparsity_config`: which modules are sparse their tensors tell."""
    if not value:
        return
    if not isinstance(value, Mapping):
        raise FormatError(f"{label}: {value!r}, expected an object")
    _one_of(str(value.get("format") or "dense"), ("dense", "sparse-bitmask", "sparse-24-bitmask"), f"{label}: format")
    for key in ("targets", "ignore"):
        _strings(value.get(key), f"{label}: {key}")


def _one_of(value: str, allowed: tuple[str, ...], label: str) -> None:
    if value not in allowed:
        raise FormatError(f"{label} {value!r} is not known; known: {', '.join(allowed)}")


def _strings(value: Any, label: str) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"{label}: {value!r}, expected a list of strings")
    return tuple(value)


def _presets() -> dict[str, tuple[Args | None, Args | None]]:
    """Preset name -> (weights, input activations), compressed-tensors 0.20.0 `quant_scheme.py`."""
    table: dict[str, tuple[Args | None, Args | None]] = {"UNQUANTIZED": (None, None)}
    token8 = Args(8, "int", strategy="token", dynamic=True)
    fp8_token = Args(8, "float", strategy="token", dynamic=True)

    def group(bits: int, **kw: Any) -> Args:
        return Args(bits, "int", strategy="group", group_size=128, **kw)

    def mx(bits: int, dynamic: bool = False) -> Args:
        return Args(bits, "float", strategy="group", group_size=32, dynamic=dynamic, scale_dtype="uint8")

    for bits in range(2, 9):
        table[f"W{bits}A16"] = (group(bits), None)
    for bits in (2, 3, 4):
        table[f"W{bits}A4"] = (group(bits), Args(4, "int", strategy="token", dynamic=True))
    for bits in range(2, 8):
        table[f"W{bits}A8"] = (group(bits), token8)
    table["W8A8"] = table["INT8"] = (Args(8, "int", strategy="channel"), token8)
    table["W4A16_ASYM"] = (group(4, symmetric=False), None)
    table["W4AFP8"] = (group(4), fp8_token)
    fp8_tensor = Args(8, "float", strategy="tensor")
    fp8_group = Args(8, "float", strategy="group", group_size=128, dynamic=True)
    table["FP8"] = (fp8_tensor, fp8_tensor)
    table["FP8_DYNAMIC"] = (Args(8, "float", strategy="channel"), fp8_token)
    table["FP8_BLOCK"] = (Args(8, "float", strategy="block", block_structure=(128, 128)), fp8_group)
    nv = Args(4, "float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn")
    table["NVFP4A16"] = (nv, None)
    table["NVFP4"] = (nv, dataclasses.replace(nv, dynamic="local"))
    table["MXFP4A16"], table["MXFP4"] = (mx(4), None), (mx(4), mx(4, True))
    table["MXFP4XFP8"] = (mx(4), fp8_group)
    table["MXFP6A16"], table["MXFP6A8"] = (mx(6), None), (mx(6), mx(8, True))
    table["MXFP8A16"], table["MXFP8"] = (mx(8), None), (mx(8), mx(8, True))
    return table


PRESETS = _presets()


def preset(name: str, targets: tuple[str, ...], label: str = "preset") -> Group:
    """The scheme of a preset name (any case) for some targets."""
    if name.upper() not in PRESETS:
        raise FormatError(f"{label}: preset {name!r} is not known; known: {', '.join(PRESETS)}")
    weights, inputs = PRESETS[name.upper()]
    return Group(targets, weights, inputs)
