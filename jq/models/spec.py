"""The static description of a decoder: what its config.json says, in one hashable dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jq.errors import CheckpointError, UnsupportedError
from jq.models.rope import Rope, read


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer.

    Fields:
      window: sliding attention window (keys i - window < j <= i), None for full attention.
      rope: index into `DecoderSpec.ropes`, None for no position embedding.
      experts: the MLP is a mixture of experts.
    """

    window: int | None = None
    rope: int | None = 0
    experts: bool = False

    def without_rope(self) -> LayerSpec:
        return dataclasses.replace(self, rope=None)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: `count` experts of width `width`, `top` of them for each token.

    Fields:
      normalize: divide the chosen weights by their sum.
      softmax_first: softmax over all experts before the choice (else over the chosen ones).
      shared: width of the expert that every token passes, 0 for none.
      names: module names of (container, router, gate, up, down) in the checkpoint.
      stacked: one parameter [count, ...] for the gate and up rows (interleaved) of all experts, one for down (gpt-oss);
        their activation is (up + 1) * gate * sigmoid(alpha * gate), both clamped at `limit`.
    """

    count: int
    top: int
    width: int
    normalize: bool = True
    softmax_first: bool = True
    shared: int = 0
    names: tuple[str, str, str, str, str] = ("mlp", "gate", "gate_proj", "up_proj", "down_proj")
    stacked: bool = False
    alpha: float = 1.0
    limit: float = float("inf")


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer.

    Fields beyond the usual sizes:
      activation: key of `jq.models.decoder.ACTIVATIONS`.
      attention_bias, output_bias, mlp_bias: whether q/k/v, o and the MLP must have a bias. A stored bias is always used.
      qk_norm: "" | "head" (RMS norm of each head of q and k) | "all" (of all heads together).
      norm_offset: added to each norm's weight (Gemma: 1).
      sandwich: norms after attention and MLP as well (Gemma 2).
      post_norm: norms only after attention and MLP (OLMo 2).
      fused: q/k/v and gate/up stored as one matrix each (Phi-3).
      attention_scale: factor of q . k, None for head_dim ** -0.5.
      *_softcap: c * tanh(x / c) on attention scores or logits.
      sinks: a learnt extra logit for each head in the softmax (gpt-oss).
      reread_at: length beyond which a longer rope holds for every position, so that keys of before are no use (Phi-3).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[Rope, ...]
    norm_eps: float = 1e-6
    activation: str = "silu"
    max_positions: int = 2048
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    norm_offset: float = 0.0
    sandwich: bool = False
    post_norm: bool = False
    fused: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sinks: bool = False
    experts: Experts | None = None
    reread_at: int | None = None

    def replace(self, **fields: Any) -> DecoderSpec:
        return dataclasses.replace(self, **fields)


def common(config: Mapping[str, Any], defaults: Mapping[str, Any], *, theta: float = 10000.0) -> DecoderSpec:
    """The spec that the keys shared by all families describe.

    Args:
      config: config.json.
      defaults: values of the keys that the family's config class may leave out.
      theta: default rope base.

    Raises:
      CheckpointError: a size is missing or does not fit the others.
    """
    merged = {**defaults, **{k: v for k, v in config.items() if v is not None or k in ("sliding_window",)}}

    hidden, heads = size_of(merged, "hidden_size"), size_of(merged, "num_attention_heads")
    kv_heads = size_of(merged, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key/value heads")
    head_dim = size_of(merged, "head_dim", hidden // heads)
    max_positions = size_of(merged, "max_position_embeddings", 2048)
    layers = layer_windows(merged, size_of(merged, "num_hidden_layers"))
    return DecoderSpec(
        family=str(merged.get("model_type")),
        vocab_size=size_of(merged, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size_of(merged, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(window=w) for w in layers),
        ropes=(read(merged, head_dim, theta=theta),),
        norm_eps=number_of(merged, "rms_norm_eps", 1e-6),
        activation=str(merged.get("hidden_act") or merged.get("hidden_activation") or "silu"),
        max_positions=max_positions,
        tied=flag_of(merged, "tie_word_embeddings"),
        attention_bias=flag_of(merged, "attention_bias"),
        output_bias=flag_of(merged, "attention_bias"),
        mlp_bias=flag_of(merged, "mlp_bias"),
    )


def size_of(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of a config.json.

    Raises:
      CheckpointError: it is missing and has no default, or is something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, expected a positive integer")
    return value


def number_of(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number of a config.json, at least 0; `CheckpointError` where it is something else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, expected a number")
    return float(value)


def flag_of(config: Mapping[str, Any], key: str) -> bool:
    """A true or false of a config.json (absent: false); `CheckpointError` where it is something else."""
    value = config.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, expected true or false")
    return bool(value)


def layer_windows(config: Mapping[str, Any], count: int) -> tuple[int | None, ...]:
    """The attention window of each layer.

    `layer_types` decides where it is given; else `use_sliding_window` with `max_window_layers` (Qwen: the first
    layers attend fully); else `sliding_window` holds for all layers (Mistral).
    """
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list | tuple) or len(types) < count:
            found = f"has {len(types)} entries" if isinstance(types, list | tuple) else f"is {types!r:.80}"
            raise CheckpointError(f"config.json: layer_types {found}, num_hidden_layers is {count}")
        for kind in types[:count]:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedError(
                    f"config.json: layer_types holds {kind!r:.80}; known here: full_attention, sliding_attention"
                )
    if not config.get("sliding_window") or not flag_of({"use_sliding_window": True, **config}, "use_sliding_window"):
        return (None,) * count
    window = size_of(config, "sliding_window")
    if types is not None:
        return tuple(window if t == "sliding_attention" else None for t in types[:count])
    first = number_of(config, "max_window_layers", 0) if "use_sliding_window" in config else 0
    return tuple(window if i >= first else None for i in range(count))
