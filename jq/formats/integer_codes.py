"""Storages of codes for `jq.convert`: HQQ, torchao's intx class, quanto's int8 and EETQ hold integer weights as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.algorithms.quanto import group_size_of
from jq.formats import eetq, hqq, quanto, torchao
from jq.formats.base import Context, Parts
from jq.formats.integers import Integers, Summary, Target, need
from jq.formats.slabs import pack_slabs
from jq.formats.torchao_method import TorchAO
from jq.qtensor import Affine, Grouping, QTensor


def _whole_groups(w: Summary, title: str) -> None:
    need(not w.ordered, f"{w.name}: has an activation order (g_idx), which {title} cannot store; GPTQ can")
    need(
        w.whole or w.in_features % w.group_size == 0,
        f"{w.name}: in_features {w.in_features} is not a multiple of group_size {w.group_size}; {title} has whole groups "
        "only, GPTQ may end with a short one",
    )


def _as_asked(to: Any, w: Summary) -> None:
    """Options that were given must be what the weights have; a method with its defaults asks for nothing."""
    if isinstance(to, str) or to == type(to)(**({"scheme": to.scheme} if hasattr(to, "scheme") else {})):
        return
    found, wanted = (w.bits, _group(w)), (to.bits, to.group_size or w.in_features)
    need(
        found == wanted,
        f"{w.name}: has {found[0]} bits in groups of {found[1]}, {type(to).__name__} asks for {wanted[0]} in groups of "
        f"{wanted[1]}; convert changes no weight. Leave them out, or quantize the float model",
    )


def _group(w: Summary | Integers) -> int:
    k = w.codes.shape[1] if hasattr(w, "codes") else w.in_features
    return min(w.group_size, k)


def linear_tag(name: str) -> str:
    """hqq's name for the same layer of every block: "model.layers.3.self_attn.q_proj" -> "self_attn.q_proj"."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isdigit())


def to_hqq(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """HQQ along rows (axis 1): integer zeros as floats. (dt(code) - dt(zero)) is exact, so the weights are the same."""
    by_tag: dict[str, dict[str, Any]] = {}
    for w in weights:
        _whole_groups(w, "HQQ")
        need(getattr(to, "axis", 1) == 1, f"{w.name}: groups lie along in_features; HQQ axis 0 has others")
        _as_asked(to, w)
        need(w.bits in (8, 6, 5, 4, 3, 2, 1), f"{w.name}: {w.bits} bits; HQQ has 8, 6, 5, 4, 3, 2 and 1")
        group, per = _group(w), hqq.PACKINGS[hqq.PACKING_OF_NBITS[w.bits]][1]
        need(group % 8 == 0, f"{w.name}: groups of {group}; HQQ has multiples of 8")
        rows = w.out_features * w.in_features // group
        need(w.bits == 3 or rows % per == 0, f"{w.name}: {rows} groups do not fill words of {per} codes")
        params = _hqq_params(w.bits, group)
        need(
            by_tag.setdefault(linear_tag(w.name), params) == params,
            f"{w.name}: bits or groups differ from those of the same layer in another block; HQQ's config says one for all",
        )

    def tensor(w: Integers) -> QTensor:
        codes = w.codes.reshape(-1, _group(w))
        scale, zero = (a.astype(w.scales.dtype).reshape(-1, 1) for a in (w.scales, w.zeros))
        return hqq.build(codes, scale, zero, w.codes.shape, _hqq_params(w.bits, _group(w)), w.name)

    def config(skip: list[str]) -> dict[str, Any]:
        kinds = {tag: _hqq_config(params) for tag, params in by_tag.items()}
        first = next(iter(kinds.values()))
        one = all(kind == first for kind in kinds.values())
        return {"quant_config": first if one else kinds, "quant_method": "hqq", "skip_modules": skip}

    return Target(tensor, config)


def _hqq_params(bits: int, group: int) -> dict[str, Any]:
    return {
        "nbits": bits, "channel_wise": True, "group_size": group, "optimize": True, "round_zero": bits == 4, "axis": 1,
        "view_as_float": False,
    }  # fmt: skip


def _hqq_config(params: dict[str, Any]) -> dict[str, Any]:
    return {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


def to_torchao(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """torchao's IntxUnpackedToInt8Tensor: signed codes and int8 zero points, both moved by half the range."""
    need(
        isinstance(to, str) or to.scheme == "intx_weight_only",
        f"{to!r}: only torchao's 'intx_weight_only' class holds integer weights as they are; to='torchao' takes it",
    )
    for w in weights:
        _whole_groups(w, "torchao")
        _as_asked(to, w)

    def method(w: Summary) -> TorchAO:
        return TorchAO("intx_weight_only", w.bits, None if w.whole else w.group_size, asymmetric=not w.symmetric)

    def tensor(w: Integers) -> QTensor:
        half = 1 << (w.bits - 1)
        parts = {"qdata": (w.codes - half).astype(np.int8), "scale": np.ascontiguousarray(w.scales)}
        parts["zero_point"] = (w.zeros - half).astype(np.int8)
        attributes = {
            "target_dtype": {"_type": "torch.dtype", "_data": f"int{w.bits}"},
            "block_size": [1, _group(w)],
            "dtype": {"_type": "torch.dtype", "_data": str(w.scales.dtype)},
            "activation_quantization": None,
        }
        entry = {"_type": "IntxUnpackedToInt8Tensor", "_data": attributes, "_tensor_data_names": list(parts)}
        name = f"{w.name}.weight"
        return torchao.load(name, parts, {name: entry}, Context())

    def config(skip: list[str]) -> dict[str, Any]:
        configs = {w.name: method(w).config(skip) for w in weights}
        first = next(iter(configs.values()))
        if all(c == first for c in configs.values()):
            return first
        by_name = {name: c["quant_type"]["default"] for name, c in configs.items()}
        data = {"fqn_to_config": by_name, "module_fqn_to_config": json.loads(json.dumps(by_name))}
        return first | {"quant_type": {"default": {"_type": "FqnToConfig", "_version": 1, "_data": data}}}

    return Target(tensor, config)


def _symmetric_bytes(w: Summary, title: str) -> None:
    _whole_groups(w, title)
    need(w.bits == 8 and w.symmetric and w.whole, f"{w.name}: {title} stores symmetric 8-bit weights by output channel")


def _signed(w: Integers) -> tuple[np.ndarray, np.ndarray]:
    return (w.codes - 128).astype(np.int8), np.ascontiguousarray(w.scales[:, :1])


def to_quanto(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """quanto's qint8, and its qint4 and qint2 with integer shifts (float ones are subtracted after the product)."""
    bits = sorted({w.bits for w in weights})
    need(len(bits) == 1, f"{weights[0].name}: modules have {bits} bits; quanto's config says one width for all")
    kind = f"int{bits[0]}"
    asked = getattr(to, "qtype", f"q{kind}")
    for w in weights:
        if w.bits == 8:
            _symmetric_bytes(w, "quanto")
        else:
            need(w.bits in (4, 2), f"{w.name}: {w.bits} bits; quanto has 8, 4 and 2")
            size = group_size_of(w.in_features) or w.in_features
            need(
                _group(w) == size,
                f"{w.name}: groups of {_group(w)}; quanto has {size} for in_features {w.in_features}, and stores no other",
            )
            need(
                not (w.bits == 4 and size == 128 and w.dtype == "bfloat16" and w.in_features > size),
                f"{w.name}: bfloat16 weights of 4 bits in groups of 128, which quanto brings into tinygemm's layout when it "
                "loads them, refusing integer zero points there",
            )
        need(asked == f"q{kind}", f"{w.name}: has {w.bits} bits, {to!r} asks for {asked}; convert changes no weight")

    def tensor(w: Integers) -> QTensor:
        one = np.ones((), w.scales.dtype)
        parts: Parts = {"input_scale": one, "output_scale": one}
        if w.bits == 8:
            parts["weight._data"], parts["weight._scale"] = _signed(w)
        else:
            codes = w.codes.reshape(-1, _group(w)).astype(np.uint8)
            parts["weight._data._data"] = pack_slabs(codes, w.bits, 8 // w.bits, high_first=False)
            parts["weight._scale"] = np.ascontiguousarray(w.scales).reshape(-1, 1)
            parts["weight._shift"] = w.zeros.astype(np.uint8).reshape(-1, 1)
        shape = Context(shapes={f"{w.name}.bias": (w.codes.shape[0],)})  # quanto stores no shape
        return quanto.load(w.name, parts, quanto.Options({"": f"q{kind}"}, {}), shape)

    return Target(tensor, quanto.Quanto(kind).config)


def to_eetq(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """EETQ's interleaved int8; float16, both dimensions multiples of 64."""
    for w in weights:
        _symmetric_bytes(w, "EETQ")
        need(w.dtype == "float16", f"{w.name}: scales are {w.dtype}, EETQ's are float16")
        need(
            w.out_features % eetq.TILE == 0 and w.in_features % eetq.TILE == 0,
            f"{w.name}: shape {w.out_features} x {w.in_features}; EETQ needs multiples of {eetq.TILE}",
        )

    def tensor(w: Integers) -> QTensor:
        data, scale = _signed(w)
        return Affine.make(
            data, scale, code_bits=8, signed=True, grouping=Grouping("block", 1, 0), source=eetq.SOURCE, name=w.name
        )

    return Target(tensor, eetq.EETQ().config)
