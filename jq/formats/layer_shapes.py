"""Sizes of a linear layer from the model's config, for formats that do not store the shape of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim")
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim")
_MOE_INNER = ("moe_intermediate_size", "shared_expert_intermediate_size")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_HEAD_SIZES = ("head_dim", "d_kv", "v_head_dim", "kv_channels")

# Last part of a module's name -> which dimension goes in.
_FROM_INNER = ("down_proj", "fc2", "dense_4h_to_h", "w2", "wo", "fc_out", "linear2")
_FROM_HEADS = ("o_proj", "out_proj", "attn_out")


def in_features_of(name: str, size: int, config: Mapping[str, Any], fits: Callable[[int], bool]) -> int | None:
    """The input dimension of a module.

    Args:
      name: module path; its last part tells the role ("down_proj").
      size: out_features * in_features.
      config: config.json; nested text_config, vision_config ... are looked at too.
      fits: whether a dimension agrees with the stored tensors.

    Returns:
      The first dimension of the role that fits, else the only dimension of the config that fits, else None.
    """
    last = name.rsplit(".", 1)[-1]
    configs = [config, *(v for v in config.values() if isinstance(v, Mapping))]
    hidden, inner, heads = set[int](), set[int](), set[int]()
    routed = ".experts." in name and any("moe_intermediate_size" in c for c in configs)
    for c in configs:
        hidden |= _numbers(c, _HIDDEN)
        inner |= _numbers(c, ("moe_intermediate_size",) if routed else (*_INNER, *_MOE_INNER))
        heads |= _attention_widths(c)
        if "n_embd" in c and c.get("n_inner") is None:
            inner |= {4 * n for n in _numbers(c, ("n_embd",))}
    if last == "c_proj":  # GPT-2's name for both outputs
        roles = [inner, heads | hidden] if ".mlp." in name else [heads | hidden, inner]
    elif last in _FROM_INNER:
        roles = [inner, heads | hidden]
    elif last in _FROM_HEADS or (last == "dense" and "attention" in name):
        roles = [heads, hidden, inner]
    else:
        roles = [hidden, heads, inner]
    for role in roles:
        fitting = [k for k in sorted(role) if size % k == 0 and fits(k)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def out_features_of(name: str, config: Mapping[str, Any], fits: Callable[[int], bool]) -> int | None:
    """The output dimension of a module of a decoder by its name, or None where none of its role or several fit.

    Args:
      name, config, fits: as for `in_features_of`.
    """
    last = name.rsplit(".", 1)[-1]
    found = set[int]()
    for c in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        if last in ("lm_head", "embed_out", "output"):
            found |= _numbers(c, ("vocab_size",))
        elif last in (*_FROM_INNER, *_FROM_HEADS):
            found |= _numbers(c, _HIDDEN)
        elif last in ("gate_proj", "up_proj", "fc1", "w1", "w3"):
            found |= _numbers(c, (*_INNER, *_MOE_INNER))
        elif last in ("q_proj", "k_proj", "v_proj"):
            kept = () if last == "q_proj" else ("num_key_value_heads",)
            heads = _numbers(c, kept) or _numbers(c, _HEADS)
            sizes = _numbers(c, _HEAD_SIZES) or {h // a for h in _numbers(c, _HIDDEN) for a in _numbers(c, _HEADS)}
            found |= {a * size for a in heads for size in sizes}
    fitting = [n for n in sorted(found) if fits(n)]
    return fitting[0] if len(fitting) == 1 else None


def _numbers(config: Mapping[str, Any], keys: tuple[str, ...]) -> set[int]:
    return {config[k] for k in keys if isinstance(config.get(k), int) and config[k] > 0}


def _attention_widths(config: Mapping[str, Any]) -> set[int]:
    """Width of the concatenated heads."""
    found = set()
    for heads in _numbers(config, _HEADS):
        for head_dim in _numbers(config, _HEAD_SIZES):
            found.add(heads * head_dim)
    return found or _numbers(config, _HIDDEN)
