"""Storages of packed words for `jq.convert`: GPTQ, AWQ and compressed-tensors' pack-quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq.formats import awq, gptq
from jq.formats import compressed_tensors as ct
from jq.formats.base import Context
from jq.formats.compressed_tensors_config import Args, Group
from jq.formats.compressed_tensors_methods import WRITES, args_dict
from jq.formats.compressed_tensors_parts import pack_dense
from jq.formats.gptq_config import by_gptqmodel, config_of, with_block_list
from jq.formats.integers import Integers, Summary, Target, need
from jq.qtensor import QTensor


def _common_group(weights: list[Summary], *, whole_fits: Callable[[Summary, int], bool]) -> int | None:
    """The group_size that one config value can say for all weights (-1: all of K), None where there is none."""
    sizes = {w.group_size for w in weights if not w.whole}
    if not sizes:
        return -1
    size = sizes.pop()
    return size if not sizes and all(whole_fits(w, size) for w in weights if w.whole) else None


def _scales_fit(weights: list[Summary], title: str, source_format: str, own: str) -> None:
    for w in weights:
        need(
            w.dtype in ("float16", "bfloat16") or source_format == own,
            f"{w.name}: scales are {w.dtype}; readers of {title} round them to 16 bits, which changes weights",
        )


def to_gptq(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """GPTQ v1, v2 and planar: groups may differ by module (`dynamic`), order by g_idx, zero points from 0."""
    _scales_fit(weights, "GPTQ", source_format, "gptq")
    symmetric = all(w.symmetric for w in weights)
    narrow = all(w.bits in (2, 3, 4, 8) for w in weights)
    storage = getattr(to, "checkpoint_format", None) or ("gptq_p" if not narrow else "gptq" if symmetric else "gptq_v2")
    meta = source.get("meta") if source_format == "gptq" and by_gptqmodel(source) else None
    for w in weights:
        allowed = (2, 3, 4, 5, 6, 7, 8) if storage == "gptq_p" else (2, 3, 4, 8)
        need(w.bits in allowed, f"{w.name}: {w.bits} bits; {storage} has {', '.join(map(str, allowed))}")
        multiple = 32 if storage == "gptq_p" else 32 // np.gcd(32, w.bits)
        need(
            w.in_features % multiple == 0 and w.out_features % multiple == 0,
            f"{w.name}: shape {w.out_features} x {w.in_features} does not fill words of 32 bits; GPTQ needs multiples of {multiple}",
        )
        need(
            storage != "gptq" or w.least_zero > 0 or meta is not None,
            f"{w.name}: has zero points of 0, which readers of GPTQ v1 (checkpoint_format 'gptq') disagree about; use "
            "jq.GPTQ(checkpoint_format='gptq_v2')",
        )
    group = _common_group(weights, whole_fits=lambda w, size: size >= w.in_features)
    base = group if group is not None else next(w.group_size for w in weights if not w.whole)
    rule = "v2" if storage != "gptq" else "v1-word" if meta is not None else "v1-field"

    def tensor(w: Integers) -> QTensor:
        return gptq.build(
            w.codes,
            w.scales,
            1 << (w.bits - 1) if symmetric else w.zeros,
            bits=w.bits,
            group_size=w.group_size,
            g_idx=w.g_idx,
            storage=storage,
            zeros_rule=rule,
            name=w.name,
        )

    def config(skip: list[str]) -> dict[str, Any]:
        done = [w.name for w in weights]
        made = config_of(
            bits=weights[0].bits,
            group_size=base,
            sym=symmetric,
            storage=storage,
            desc_act=any(w.ordered for w in weights),
            skip=[name for name in skip if name != "lm_head"],
            lm_head="lm_head" in done,
            overrides={
                w.name: {"bits": w.bits, "group_size": -1 if w.whole else w.group_size}
                for w in weights
                if w.bits != weights[0].bits
                or (w.group_size != base and not (w.whole and (base == -1 or base >= w.in_features)))
            },
        )
        if meta is not None:
            made["meta"] = dict(meta)
        return with_block_list(made, done, skip)

    return Target(tensor, config)


def to_awq(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """AWQ gemm and gemv: whole groups of one size, inputs in order, no quantized lm_head."""
    version = awq.VERSIONS.get(str(getattr(to, "version", None) or "gemm").lower(), "")
    need(
        version in ("gemm", "gemv"),
        f"AWQ {version or to.version!r}: its kernels compute fma(code, scale, -(scale * zero)) with the product stored rounded, "
        "so its weights differ from those of every other integer format in the last bit; gemm and gemv keep them",
    )
    _scales_fit(weights, "AWQ", source_format, "awq")
    for w in weights:
        need(not w.ordered, f"{w.name}: has an activation order (g_idx), which AWQ cannot store; GPTQ can")
        need(w.name != "lm_head", "lm_head: is quantized; readers of AWQ keep it in float. GPTQ can store it")
        need(
            w.bits == 4 or version == "gemm",
            f"{w.name}: {w.bits} bits; AWQ {version} has 4 (gemm: 2 to 8, read by GPT-QModel)",
        )
        axis, name = (w.in_features, "in_features") if version == "gemv" else (w.out_features, "out_features")
        need(axis * w.bits % 32 == 0, f"{w.name}: {name} {axis} does not fill words of 32 bits at {w.bits} bits")
        need(
            w.in_features % w.group_size == 0,
            f"{w.name}: in_features {w.in_features} is not a multiple of group_size {w.group_size}; AWQ has whole groups only, "
            "GPTQ may end with a short one",
        )
    bits = {w.bits for w in weights}
    need(len(bits) == 1, f"{weights[0].name}: modules have {sorted(bits)} bits; AWQ's config says one width for all")
    group = _common_group(weights, whole_fits=lambda w, size: size == w.in_features)
    sizes = sorted({w.group_size for w in weights})
    need(group is not None, f"{weights[0].name}: modules have groups of {sizes}; AWQ's config says one size for all")
    assert group is not None
    need(
        version == "gemm" or group == -1 or group >= 32,
        f"{weights[0].name}: groups of {group}; AWQ gemv reserves words for groups of 32 and more",
    )
    wanted = getattr(to, "zero_point", None)
    symmetric = all(w.symmetric for w in weights)
    need(
        wanted is not False or symmetric,
        f"{next((w.name for w in weights if not w.symmetric), '')}: has zero points; zero_point=False is for symmetric weights",
    )
    options = awq.Options(weights[0].bits, group, version, sym=wanted is False)

    def config(skip: list[str]) -> dict[str, Any]:
        return awq.config_of(options, skip=[name for name in skip if name != "lm_head"])

    return Target(lambda w: awq.build(w.codes, w.scales, w.zeros, options, name=w.name), config)


def to_compressed_tensors(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """compressed-tensors' pack-quantized: any group that divides K, one scheme for each kind of weight."""
    if hasattr(to, "scheme"):
        scheme = to.scheme()
        need(
            scheme.weights is not None and scheme.weights.type == "int" and scheme.inputs is None,
            f"{to!r}: only its weight-only integer presets (W4A16, W8A16) can hold integer weights as they are",
        )
        for w in weights:
            need(
                w.bits == scheme.weights.num_bits,
                f"{w.name}: has {w.bits} bits, preset {to.preset} has {scheme.weights.num_bits}; to='compressed-tensors' "
                "takes the widths of the source",
            )
    for w in weights:
        need(
            w.in_features % w.group_size == 0,
            f"{w.name}: in_features {w.in_features} is not a multiple of group_size {w.group_size}; compressed-tensors has "
            "whole groups only, GPTQ may end with a short one",
        )
    kinds: dict[Args, list[str]] = {}
    for w in weights:
        kinds.setdefault(_ct_args(w), []).append(w.name)
    version = "0.14.0" if any(w.ordered for w in weights) else WRITES  # later versions drop weight_g_idx
    by_name = {w.name: w for w in weights}

    def tensor(w: Integers) -> QTensor:
        args = _ct_args(by_name[w.name])
        parts = {
            "weight_packed": pack_dense(w.codes, w.bits),
            "weight_scale": np.ascontiguousarray(w.scales),
            "weight_shape": np.array(w.codes.shape, np.int64),
        }
        if not args.symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(pack_dense(np.ascontiguousarray(w.zeros.T), w.bits).T)
        if w.g_idx is not None:
            parts["weight_g_idx"] = w.g_idx
        options = ct.Options(groups=(Group(("Linear",), args),), format="pack-quantized", version=version)
        return ct.load(w.name, parts, options, Context())

    def config(skip: list[str]) -> dict[str, Any]:
        one = len(kinds) == 1
        groups = {
            f"group_{i}": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"] if one else names,
                "weights": args_dict(args) | ({"actorder": args.actorder} if args.actorder else {}),
            }
            for i, (args, names) in enumerate(kinds.items())
        }
        return {
            "config_groups": groups,
            "format": "pack-quantized",
            "global_compression_ratio": None,
            "ignore": skip if one else [],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": version,
        }

    return Target(tensor, config)


def _ct_args(w: Summary) -> Args:
    return Args(
        num_bits=w.bits,
        type="int",
        symmetric=w.symmetric,
        strategy="channel" if w.whole else "group",
        group_size=0 if w.whole else w.group_size,
        actorder="group" if w.ordered else "",
    )
