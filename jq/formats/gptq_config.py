"""The quantization_config of GPTQ checkpoints: reading it (config.json or AutoGPTQ's quantize_config.json), writing it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, true_or_false, warn_unknown
from jq.qtensor.affine import check_indices

WORDS = ("int8", "int16", "int32", "int64")

# (width, bit offset) of the planes of format gptq_p; 2, 4 and 8 bits are stored as in gptq_v2.
PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    3: ((2, 0), (1, 2)),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
}

# Config keys that record how a checkpoint was made, or choose a kernel; they change no stored number.
_HARMLESS = (
    "quant_method method format checkpoint_format bits wbits w_bit group_size q_group_size desc_act static_groups sym "
    "lm_head dynamic pack_dtype true_sequential damp_percent damp_auto_increment mse act_group_aware model_seqlen dataset "
    "batch_size tokenizer block_name_to_quantize module_name_preceding_first_block cache_block_outputs pad_token_id "
    "max_input_length model_name_or_path model_file_base_name is_marlin_format use_exllama exllama_config "
    "disable_exllama use_cuda_fp16 modules_in_block_to_quantize meta backend hyb_act quantizer pack_impl hessian "
    "fallback gptaq foem mock_quantization offload_to_disk offload_to_disk_path hyperparameters autoround_version data_type "
    "iters nsamples seqlen lr minmax_lr scale_dtype provider to_quant_block_names enable_quanted_input"  # AutoRound in GPTQ's format
)
_FLAGS = ("desc_act", "static_groups", "true_sequential", "act_group_aware", "lm_head", "is_marlin_format")
_REFUSED = {
    "rotation": "the inputs of each layer are rotated",
    "adapter": "a low-rank adapter is added to each layer",
    "activation": "activations are quantized too",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a quantization_config says about the stored numbers.

    Fields:
      bits, group_size, sym: defaults of all modules; group_size -1 = all of K.
      rules: (pattern, overrides) of `dynamic`, skips first; overrides None = not quantized.
      planar: format gptq_p.
      zeros: "v2" (as is), "v1-word" (minus one on whole words) or "v1-field" (minus one per field).
      word: dtype of the stored words.
      marlin: codes in the order of that kernel.
      ordered: g_idx says which inputs a group has (desc_act without static groups).
    """

    bits: int
    group_size: int
    sym: bool
    rules: Rules = ()
    planar: bool = False
    zeros: str = "v1-field"
    word: str = "int32"
    marlin: bool = False
    ordered: bool = False

    @property
    def planes(self) -> tuple[tuple[int, int], ...] | None:
        """Planes of the codes, None where they are one stream."""
        return PLANES.get(self.bits) if self.planar else None

    def of(self, module: str) -> Options:
        """The options of one module after `dynamic`."""
        return apply_rules(self, self.rules, module)


Rules = tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...]


def apply_rules(options: Any, rules: Rules, module: str) -> Any:
    """Options with the overrides of the first pattern that matches from the start of the module's name."""
    for pattern, overrides in rules:
        if re.match(pattern, module):
            return options if overrides is None else dataclasses.replace(options, **dict(overrides))
    return options


def first(config: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """The first of several spellings of a key that a config has."""
    return next((config[k] for k in keys if config.get(k) is not None), default)


def whole_number(value: Any, name: str, label: str) -> int:
    """A config value that must be an integer (JSON writers store 4.0 and "4" too)."""
    try:
        number = int(value)
        if number != float(value):
            raise ValueError
    except (TypeError, ValueError):
        raise FormatError(f"{label}: quantization_config.{name} is {value!r}, expected an integer") from None
    return number


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads quantization_config (or quantize_config.json).

    Raises:
      FormatError: no or impossible bits or group_size, a pattern that is no regular expression.
      UnsupportedError: a kernel's own storage (bitblas), rotated inputs, adapters.
    """
    label = context.label
    bits = first(config, "bits", "wbits", "w_bit")
    if bits is None:
        raise FormatError(
            f"{label}: the checkpoint has GPTQ tensors (*.qweight), but neither config.json (quantization_config.bits) nor "
            "quantize_config.json says how many bits they have; add one of the two files"
        )
    storage = str(first(config, "checkpoint_format", "format", default="gptq")).lower()
    for key in _FLAGS:  # the tensors tell what most of them say, but a word in their place is a damaged file
        true_or_false(config, key, f"{label}: quantization_config", default=False)
    if config.get("is_marlin_format") or config.get("quant_method") == "marlin":
        storage = "marlin"
    if storage not in ("gptq", "gptq_v2", "gptq_p", "marlin"):
        raise UnsupportedError(
            f"{label}: GPTQ checkpoint_format {storage!r} is a kernel's own order; formats read here: gptq, gptq_v2, "
            "gptq_p, marlin. Export it again with GPT-QModel as gptq_v2"
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(
                f"{label}: quantization_config.{key} = {config[key]!r}: {why}, which is not done here"
            )
    warn_unknown(config, (*_HARMLESS.split(), *_REFUSED), label)
    word = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if word not in WORDS:
        raise UnsupportedError(f"{label}: quantization_config.pack_dtype {word!r}, expected one of {', '.join(WORDS)}")
    planar = storage == "gptq_p"
    meta = config.get("meta")
    static = bool(config.get("static_groups") or (isinstance(meta, Mapping) and meta.get("static_groups")))

    def checked_bits(value: Any, where: str) -> int:
        allowed = (2, 3, 4, 5, 6, 7, 8) if planar else (4,) if storage == "marlin" else (2, 3, 4, 8)
        number = whole_number(value, "bits", where)
        if number not in allowed:
            shown = ", ".join(map(str, allowed))
            raise UnsupportedError(f"{where}: GPTQ with {number} bits; checkpoint_format {storage!r} has {shown}")
        return number

    return Options(
        bits=checked_bits(bits, label),
        group_size=checked_group(first(config, "group_size", "q_group_size", default=128), label),
        sym=true_or_false(config, "sym", f"{label}: quantization_config"),
        rules=rules_of(config.get("dynamic"), checked_bits, label, ordered=not static),
        planar=planar,
        zeros="v2" if storage != "gptq" else "v1-word" if by_gptqmodel(config) else "v1-field",
        word=word,
        marlin=storage == "marlin",
        ordered=bool(config.get("desc_act")) and not static,
    )


def checked_group(value: Any, label: str) -> int:
    """A group size: -1 or positive."""
    size = whole_number(value, "group_size", label)
    if size != -1 and size < 1:
        raise FormatError(f"{label}: quantization_config.group_size is {size}, expected -1 or a positive number")
    return size


def by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether GPT-QModel wrote the file: its v1 zeros are shifted by one on whole words."""
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = [quantizer] if isinstance(quantizer, str) else quantizer if isinstance(quantizer, list) else []
    return any(str(name).lower().startswith("gptqmodel") for name in names)


def rules_of(dynamic: Any, checked_bits: Callable[[Any, str], int], label: str, *, ordered: bool = False) -> Rules:
    """GPT-QModel's `dynamic`: (pattern, overrides) with skips first, as it orders them itself.

    Args:
      dynamic: the config's.
      checked_bits: (value, where it stands) -> bits.
      label: file, for messages.
      ordered: `desc_act` of a rule becomes the option `ordered`.

    Raises:
      FormatError: not an object, a pattern that is no regular expression, impossible values.
      UnsupportedError: another quantization method for some modules.
    """
    if not dynamic:
        return ()
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"{label}: quantization_config.dynamic is {type(dynamic).__name__}, expected an object")
    skips: list[tuple[str, None]] = []
    changes: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
    for key, overrides in dynamic.items():
        pattern = key[2:] if key[:2] in ("+:", "-:") else key
        try:
            re.compile(pattern)
        except re.error as e:
            raise FormatError(
                f"{label}: quantization_config.dynamic pattern {key!r} is no regular expression: {e}"
            ) from e
        if key.startswith("-:") or overrides is False:
            skips.append((pattern, None))
        else:
            changes.append((pattern, _overrides(overrides or {}, checked_bits, f"{label}: dynamic {key!r}", ordered)))
    return (*skips, *changes)


def _overrides(
    found: Mapping[str, Any], checked_bits: Callable[[Any, str], int], label: str, ordered: bool
) -> tuple[tuple[str, Any], ...]:
    changed: dict[str, Any] = {}
    bits, group = first(found, "bits", "w_bit"), first(found, "group_size", "q_group_size")
    if bits is not None:
        changed["bits"] = checked_bits(bits, label)
    if group is not None:
        changed["group_size"] = checked_group(group, label)
    if found.get("sym") is not None:
        changed["sym"] = true_or_false(found, "sym", label)
    if ordered and found.get("desc_act") is not None:
        changed["ordered"] = true_or_false(found, "desc_act", label)
    method = first(found, "method", "quant_method")
    if method is not None and str(method).lower() not in ("gptq", "awq"):
        raise UnsupportedError(f"{label}: method {method!r} for some modules is not read here")
    for key, why in _REFUSED.items():
        if found.get(key):
            raise UnsupportedError(f"{label}: {key} = {found[key]!r}: {why}, which is not done here")
    return tuple(sorted(changed.items()))


def detect(checkpoint: Any) -> dict | None:
    """The config of files without one in config.json: AutoGPTQ's quantize_config.json, or {} where tensors alone tell."""
    if not any(name.endswith((".qzeros", ".B")) for name in checkpoint.entries):
        return None
    for name in ("quantize_config.json", "quant_config.json"):
        found = checkpoint.side_json(name)
        if found is not None:
            method = str(first(found, "quant_method", "method", default="gptq"))
            return dict(found) if method in ("gptq", "marlin") else None
    words = {str(checkpoint.entry(n).dtype) for n in checkpoint.entries if n.endswith(".qweight")}
    return {} if words == {"int32"} else None


def config_of(
    *,
    bits: int,
    group_size: int,
    sym: bool,
    storage: str,
    desc_act: bool = False,
    skip: Any = (),
    lm_head: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A quantization_config that GPT-QModel, Optimum and transformers read.

    Args:
      skip: names of linear modules that stay float; they become `-:` rules of `dynamic`.
      overrides: name -> bits, group_size of modules that differ; they become `+:` rules.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "checkpoint_format": storage,
        "format": storage,
        "lm_head": lm_head,
        "true_sequential": True,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["jaxq"]},
    }
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in skip if name != "lm_head"}
    rules |= {f"+:^{re.escape(name)}$": dict(changed) for name, changed in (overrides or {}).items()}
    if rules:
        config["dynamic"] = rules
    return config


def with_block_list(config: dict[str, Any], quantized: list[str], skip: list[str]) -> dict[str, Any]:
    """`modules_in_block_to_quantize` where linear layers of blocks stay float and all blocks agree on which."""

    def in_block(names: list[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in names:
            match = re.match(r"(.*?\.\d+)\.(.+)", name)
            if match:
                found.setdefault(match[2], set()).add(match[1])
        return found

    done, left = in_block(quantized), in_block(skip)
    if left and not done.keys() & left.keys():
        config["modules_in_block_to_quantize"] = [sorted(done)]
    return config


def index_mode(
    prefix: str, g_idx: np.ndarray | None, in_features: int, group: int, groups: int
) -> tuple[str, np.ndarray | None]:
    """("none" | "trivial" | "stored", the g_idx that the arithmetic needs).

    Raises:
      FormatError: groups that are not there, or group 0 for all inputs though there are several: GPT-QModel's torch and
        triton layers would multiply by its scales alone, its exllama and marlin ones by those of k // group.
    """
    if g_idx is None:
        return "none", None
    check_indices(g_idx, groups, f"{prefix}.g_idx")
    if np.array_equal(g_idx, np.arange(in_features) // group):
        return "trivial", None
    if not g_idx.any():  # one group would have been trivial
        raise FormatError(
            f"{prefix}.g_idx: found 0 for all {in_features} inputs, expected each of {groups} groups of {group} in use; "
            f"some readers take that for group 0 throughout, some for k // {group}. A buffer that was never filled: make "
            "the file anew, or leave g_idx out of it if the weights were quantized without desc_act"
        )
    return "stored", g_idx.astype(np.int32)
