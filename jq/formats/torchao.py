"""torchao (`quant_method: torchao`): tensor subclasses flattened into safetensors.

Source: torchao 0.18.0 (prototype/safetensors), transformers 5.23 (quantizers/quantizer_torchao.py).

Parameter `m.weight` of class C is stored as tensors `m._weight_<array>`; the safetensors metadata of the shards holds
for every parameter a JSON object under the parameter's name: {"_type": C, "_data": attributes, "_tensor_data_names":
arrays}, {"_type": "Tensor"} for plain ones, and "tensor_names", the list of all parameters. The classes and their
arithmetic are in `jq.formats.torchao_tensors` and `jq.formats.torchao_mx`. What is quantized how is read from the
metadata, never from quantization_config: torchao leaves a weight as it is where a group does not divide it, and
transformers sorts the keys of FqnToConfig, whose order decides between patterns.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from jq import qtensor
from jq.activations import FLOAT, Activation
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, warn_unknown
from jq.formats.torchao_method import TorchAO
from jq.formats.torchao_mx import MX_CLASSES
from jq.formats.torchao_tensors import CLASSES, Stored, TensorClass, dtype_name
from jq.qtensor import QTensor, Source

_ALL = {**CLASSES, **MX_CLASSES}
_KEYS = (
    "quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert", "include_input_output_embeddings",
    "untie_embedding_weights", "autoquant_config",
)  # fmt: skip
_STATIC = ("act_quant_scale", "act_quant_zero_point")


def head_is_embedding(config: Mapping[str, Any], metadata: Mapping[str, str], there: Container[str]) -> bool:
    """Whether a file lacks its output matrix because it was the embedding.

    With `untie_embedding_weights` transformers 5.23 sets tie_word_embeddings to false and yet keeps one tensor for both;
    its save lists both in the metadata and stores one. (Loading such a file it makes the other up.)
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping) or not settings.get("untie_embedding_weights") or "lm_head.weight" in there:
        return False
    plain = (metadata.get("lm_head.weight"), metadata.get("model.embed_tokens.weight"))
    return plain[0] is not None and plain[0] == plain[1] and "model.embed_tokens.weight" in there


def parse(config: Mapping[str, Any], context: Context) -> dict[str, dict[str, Any]]:
    """Entries of the safetensors metadata by parameter name, plain tensors left out.

    Raises:
      UnsupportedError: no metadata, as in the pickled files of old transformers.
      FormatError: metadata that does not parse.
    """
    warn_unknown(config, _KEYS, context.label)
    listed = context.metadata.get("tensor_names")
    if listed is None:
        raise UnsupportedError(
            f"{context.label}: torchao weights need the safetensors metadata that describes them ('tensor_names'), and "
            f"there is none (quant_type {config.get('quant_type')!r:.60}). Files that pickle torchao's classes (.bin), or "
            "were re-saved without metadata, are not read: save the model again with torchao >= 0.15 as safetensors"
        )
    entries = {}
    for name in _json(listed, "tensor_names", list, context):
        entry = _json(context.metadata.get(str(name), "null"), str(name), dict, context)
        kind = entry.get("_type")
        if kind == "Tensor":
            continue
        if kind not in _ALL:
            raise UnsupportedError(
                f"{context.label}: {name}: torchao class {kind!r} is not read here; known: {', '.join(_ALL)}"
            )
        if not isinstance(entry.get("_data"), dict) or not isinstance(entry.get("_tensor_data_names"), list):
            raise FormatError(f"{context.label}: metadata of {name}: expected _data and _tensor_data_names")
        entries[str(name)] = entry
    return entries


def _json(text: str, key: str, kind: type, context: Context) -> Any:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise FormatError(f"{context.label}: safetensors metadata {key!r} is not valid JSON: {e}") from e
    if not isinstance(value, kind):
        raise FormatError(
            f"{context.label}: safetensors metadata {key!r}: expected a {kind.__name__}, found {text:.40}"
        )
    return value


def group(names: list[str], options: dict[str, dict[str, Any]], context: Context) -> dict[str, dict[str, str]]:
    """Parameters that the metadata describes, each with the arrays that it lists."""
    have = set(names)
    found = {}
    for parameter, entry in options.items():
        stored = {str(s): stored_name(parameter, str(s)) for s in entry["_tensor_data_names"]}
        missing = [name for name in stored.values() if name not in have]
        if missing:
            raise FormatError(
                f"{context.label}: {missing[0]}: missing; the metadata lists it for {parameter}. The file is incomplete"
            )
        if not stored:
            raise FormatError(f"{context.label}: metadata of {parameter}: lists no tensors")
        found[parameter] = stored
    return found


def stored_name(parameter: str, array: str) -> str:
    """Stored name of a parameter's array: ("a.b.weight", "qdata") -> "a.b._weight_qdata"."""
    module, _, last = parameter.rpartition(".")
    return f"{module}._{last}_{array}" if module else f"_{last}_{array}"


def join(prefix: str, suffix: str) -> str:
    """Inverse of `group`; arrays of a parameter that is not called "weight" carry its name as "@name.array"."""
    if suffix.startswith("@"):
        return stored_name(prefix, suffix.split(".", 1)[1])
    return stored_name(f"{prefix}.weight", suffix)


def load(prefix: str, parts: Parts, options: dict[str, dict[str, Any]], context: Context) -> QTensor:
    """One parameter -> QTensor of its class; a stack of experts [E, N, K] slice by slice."""
    entry = options[prefix]
    kind, attributes = entry["_type"], entry["_data"]
    cls: TensorClass = _ALL[kind]
    unknown = [name for name in parts if name not in cls.names]
    if unknown:
        raise FormatError(f"{prefix}: {unknown[0]}: {kind} has no such array (it has {', '.join(cls.names)})")
    plain_rank = 4 if kind == "Int4TilePackedTo4dTensor" else 2
    experts = parts["qdata"].shape[0] if "qdata" in parts and parts["qdata"].ndim == plain_rank + 1 else 0
    source = _source(prefix, entry, parts, experts)
    activation = _activation(prefix, kind, attributes, parts)
    if not experts:
        extras = {name: parts[name] for name in cls.carried if name in parts}
        common = {"extras": extras, "activation": activation, "source": source}
        return cls.load(Stored(prefix, parts, attributes, common))
    slices = []
    for e in range(experts):
        mine = {k: v[e if len(v) == experts else 0] for k, v in parts.items()}
        extras = {name: mine[name] for name in cls.carried if name in mine}
        common = {"extras": extras, "activation": activation, "source": source}
        slices.append(cls.load(Stored(f"{prefix}[{e}]", mine, _of_slice(attributes), common)))
    return qtensor.stack(slices)


def _of_slice(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of one expert's matrix."""
    return {
        k: v[1:] if k in ("block_size", "shape") and isinstance(v, list) and len(v) == 3 else v
        for k, v in attributes.items()
    }


def _source(prefix: str, entry: Mapping[str, Any], parts: Parts, experts: int) -> Source:
    """What `dump` and the metadata of a changed checkpoint need beside the arrays."""
    kind, attributes = entry["_type"], entry["_data"]
    options: list[tuple[str, Any]] = [("entry", json.dumps(entry))]
    last = prefix.rpartition(".")[2]
    if last != "weight":
        options.append(("parameter", last))
    if experts:
        options.append(("experts", experts))
        shared = tuple(k for k, v in parts.items() if v.ndim and len(v) == 1 != experts)
        options += [("shared", shared)] if shared else []
    if kind == "Int4TilePackedTo4dTensor" and "qdata" in parts:
        tiles = parts["qdata"].shape[-4:]
        options.append(("padded", (tiles[0] * 8, tiles[1] * 128)))
        options.append(("group", (attributes.get("block_size") or [0])[-1]))
    if attributes.get("is_swizzled_scales"):
        shape = tuple(parts["scale"].shape)
        options.append(("scale_shape", shape[1:] if experts else shape))
    shapes = tuple(
        (k, tuple(parts[k].shape)) for k in ("scale", "zero_point") if k in parts and parts[k].ndim < 2 and not experts
    )
    if shapes:
        options.append(("shapes", shapes))
    return Source("torchao", tuple(options))


def _activation(prefix: str, kind: str, attributes: Mapping[str, Any], parts: Parts) -> Activation | None:
    """How inputs are quantized, None for weight-only tensors."""
    scheme, parameters, options = _scheme(prefix, kind, attributes, parts)
    if "act_pre_scale" in parts:
        parameters, options = (*parameters, "act_pre_scale"), (*options, ("prepare", "pre_scale"))
        scheme = scheme or FLOAT
    return None if scheme is None else Activation(scheme, parameters, options)


def _scheme(
    prefix: str, kind: str, attributes: Mapping[str, Any], parts: Parts
) -> tuple[str | None, tuple[str, ...], tuple[tuple[str, Any], ...]]:
    if kind == "IntxUnpackedToInt8Tensor":
        found = attributes.get("activation_quantization")
        found = found.get("_data") if isinstance(found, Mapping) else found
        if found is None:
            return None, (), ()
        if str(found).lower() != "int8_asym_per_token":
            raise UnsupportedError(f"{prefix}: activation_quantization {found!r} is not known here")
        return "torchao_int8_fake", (), ()
    if kind == "Int4Tensor" and dtype_name(attributes.get("activation_dtype")) == "float8_e4m3fn":
        return "torchao_float8_int4", (), ()
    kwargs = attributes.get("act_quant_kwargs")
    if kwargs is None:
        return None, (), ()
    data = kwargs.get("_data", {}) if isinstance(kwargs, Mapping) else {}
    if kind == "Int8Tensor":
        mapping = data.get("mapping_type") or {"_data": "SYMMETRIC"}
        options: tuple[tuple[str, Any], ...] = (
            ("granularity", _granularity(prefix, data.get("granularity"))),
            ("asymmetric", str(mapping.get("_data") if isinstance(mapping, Mapping) else mapping) == "ASYMMETRIC"),
            ("reduce_range", bool(data.get("reduce_range"))),
        )
        return "torchao_int8", tuple(k for k in _STATIC if k in parts), options
    if kind == "Float8Tensor":
        options = (
            ("granularity", _granularity(prefix, data.get("granularity"))),
            ("dtype", dtype_name(data.get("float8_dtype") or "float8_e4m3fn")),
            ("low", data.get("hp_value_lb")),
            ("high", data.get("hp_value_ub")),
        )
        return "torchao_float8", (), options
    if kind == "MXTensor":
        mode = data.get("scaling_mode") or "FLOOR"
        options = (
            ("element", dtype_name(data.get("elem_dtype") or "float8_e4m3fn")),
            ("block", int(data.get("block_size", 32))),
            ("mode", str(mode.get("_data") if isinstance(mode, Mapping) else mode).upper()),
        )
        return "torchao_mx", (), options
    static = ("act_per_tensor_scale",) if "act_per_tensor_scale" in parts else ()
    options = (("block", int(data.get("block_size", 16))), ("dynamic", bool(data.get("use_dynamic_per_tensor_scale"))))
    return "torchao_nvfp4", static, options


def _granularity(prefix: str, value: Any) -> Any:
    """ "row", "tensor", or the block along K."""
    kind = value.get("_type") if isinstance(value, Mapping) else value
    if kind in (None, "PerRow", "PerToken"):
        return "row"
    if kind == "PerTensor":
        return "tensor"
    if kind == "PerBlock" and isinstance(value, Mapping):
        block = value.get("_data", {}).get("block_size")
        if isinstance(block, list) and len(block) == 2 and block[0] == 1:
            return int(block[1])
    raise UnsupportedError(f"{prefix}: activation granularity {value!r} is not known here")


def dump(q: Any) -> Parts:
    """The stored arrays of a parameter."""
    source = q.source
    entry = json.loads(source.get("entry"))
    cls: TensorClass = _ALL[entry["_type"]]
    experts = source.get("experts")
    if experts:
        slices = [_dump_one(q[e], cls) for e in range(experts)]
        parts = {k: np.stack([s[k] for s in slices]) for k in slices[0]}
        shared = source.get("shared", ())  # one value for all experts
        parts = {k: v[:1] if k in shared else v for k, v in parts.items()}
    else:
        parts = _dump_one(q, cls)
    parts = {k: parts[k] for k in entry["_tensor_data_names"] if k in parts}
    name = source.get("parameter")
    return parts if name is None else {f"@{name}.{k}": v for k, v in parts.items()}


def _dump_one(q: Any, cls: TensorClass) -> Parts:
    parts = cls.dump(q)
    for name, shape in q.source.get("shapes", ()):
        parts[name] = parts[name].reshape(shape)
    carried = {k: np.asarray(v) for k, v in q.extras.items() if k in (*cls.carried, "scale")}
    return parts | carried


def metadata(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Safetensors metadata of a State with newly quantized tensors."""
    found = {"format": "pt", "tensor_names": json.dumps(list(tensors))}
    for name, value in tensors.items():
        source = getattr(value, "source", None) if isinstance(value, QTensor) else None
        found[name] = json.dumps({"_type": "Tensor"}) if source is None else source.get("entry")
    return found


FORMAT = Format(
    name="torchao",
    methods=("torchao",),
    title="torchao: int8, int1-8, int4, float8, MX, NVFP4 tensor classes",
    parse=parse,
    markers=("_weight_qdata",),
    suffixes=tuple(sorted({f"_weight_{name}" for cls in _ALL.values() for name in cls.names})),
    load=load,
    dump=dump,
    group=group,
    join=join,
    parameter=lambda prefix: True,
    metadata=metadata,
    methods_table={"TorchAO": TorchAO},
)
