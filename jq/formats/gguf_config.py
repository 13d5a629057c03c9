"""What a GGUF file says about the model, in Hugging Face's terms: config.json and tensor names.

Keys and tensor names: llama.cpp's gguf-py/gguf/constants.py and convert_hf_to_gguf.py. An architecture is a row of
`ARCHITECTURES`; the families that store other names or transformed values say so in their row.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jq.errors import CheckpointError, UnsupportedError

Metadata = Mapping[str, Any]
Entries = Mapping[str, Any]

# GGUF name of a layer's part -> Hugging Face's, for most families.
COMMON_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Tensors that become part of the config (or follow from it) and have no Hugging Face name.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Fields:
      model_type, class_name: of config.json.
      parts: names of a layer's parts that differ from `COMMON_PARTS`.
      permuted: q and k rows are stored for interleaved rotary pairs.
      norm_offset: what llama.cpp added to every norm's weight (Gemma: 1).
      extra: (metadata getter) -> further config keys.
    """

    model_type: str
    class_name: str
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    extra: Callable[[Callable[..., Any]], dict[str, Any]] = lambda key: {}

    def part(self, name: str) -> str | None:
        return self.parts.get(name) or COMMON_PARTS.get(name)


def _present(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _gemma2(key: Callable[..., Any]) -> dict[str, Any]:
    return _present(
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=key("attn_logit_softcapping"),
        final_logit_softcapping=key("final_logit_softcapping"),
        sliding_window=key("attention.sliding_window"),
        query_pre_attn_scalar=key("attention.key_length"),
    )


def _gemma3(key: Callable[..., Any]) -> dict[str, Any]:
    return _present(
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=key("attention.sliding_window"),
        query_pre_attn_scalar=key("attention.key_length"),
        rope_local_base_freq=10000.0,
    )


def _experts(key: Callable[..., Any]) -> dict[str, Any]:
    return _present(
        num_experts=key("expert_count"),
        num_experts_per_tok=key("expert_used_count"),
        moe_intermediate_size=key("expert_feed_forward_length"),
        norm_topk_prob=True,
    )


def _granite(key: Callable[..., Any]) -> dict[str, Any]:
    return _present(
        embedding_multiplier=key("embedding_scale"),
        residual_multiplier=key("residual_scale"),
        attention_multiplier=key("attention.scale"),
        logits_scaling=key("logit_scale"),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", QWEN_EXPERTS, extra=_experts),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", norm_offset=1.0, extra=lambda key: {"hidden_activation": "gelu_pytorch_tanh"}
    ),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", SANDWICH, norm_offset=1.0, extra=_gemma2),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", SANDWICH, norm_offset=1.0, extra=_gemma3),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        extra=lambda key: _present(sliding_window=key("attention.sliding_window")),
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    ),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", permuted=True, extra=lambda key: {"no_rope_layer_interval": 4}
    ),
    "granite": Architecture("granite", "GraniteForCausalLM", permuted=True, extra=_granite),
}
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    MIXTRAL_EXPERTS,
    permuted=True,
    extra=lambda key: _present(num_local_experts=key("expert_count"), num_experts_per_tok=key("expert_used_count")),
)


def architecture_of(metadata: Metadata, label: str) -> Architecture:
    """The row of a file's architecture.

    Raises:
      UnsupportedError: none; `jq.load_state` still reads the tensors.
    """
    name = str(metadata.get("general.architecture"))
    if name == "llama" and (metadata.get("llama.expert_count") or 0) > 0:
        return MIXTRAL
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{label}: GGUF architecture {name!r} has no Hugging Face names here; known: {', '.join(ARCHITECTURES)}. "
            "jq.load_state reads its tensors under the file's own names"
        )
    return ARCHITECTURES[name]


def short(value: Any) -> Any:
    """A float32 of the metadata as the shortest decimal that gives it: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_of(metadata: Metadata, entries: Entries) -> dict[str, Any]:
    """config.json of a file as far as its metadata goes; {} where the architecture is not known."""
    try:
        return _config(metadata, entries, architecture_of(metadata, "file"), strict=False)
    except UnsupportedError:
        return {}


def full_config(metadata: Metadata, entries: Entries, label: str) -> dict[str, Any]:
    """config.json of a file, complete.

    Raises:
      UnsupportedError: an unknown architecture or rotary scaling.
      CheckpointError: a size is missing from the metadata.
    """
    config = _config(metadata, entries, architecture_of(metadata, label), strict=True)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if type(config.get(key)) is not int or config[key] <= 0:
            raise CheckpointError(f"{label}: {key} is {config.get(key)!r} in the metadata; it describes no whole model")
    return config


def _config(metadata: Metadata, entries: Entries, row: Architecture, *, strict: bool) -> dict[str, Any]:
    prefix = str(metadata["general.architecture"])

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{prefix}.{name}")
        return default if value is None else short(value)

    heads, hidden = key("attention.head_count"), key("embedding_length")
    head_dim = key("attention.key_length")
    rotary = key("rope.dimension_count")
    if head_dim is None and isinstance(heads, int) and heads and isinstance(hidden, int):
        head_dim = hidden // heads
    embedding = entries.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else key("vocab_size")
    kv_heads = key("attention.head_count_kv", heads)
    if isinstance(kv_heads, list) or isinstance(heads, list):
        if strict:
            raise UnsupportedError(f"{prefix}: head counts that differ from layer to layer are not read")
        kv_heads = None
    config = _present(
        architectures=[row.class_name],
        model_type=row.model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_theta=key("rope.freq_base", 10000.0),
        hidden_act="silu",
        tie_word_embeddings="output.weight" not in entries,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_end_of_text(metadata),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    if row.model_type in ("llama", "granite", "qwen3", "qwen3_moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in entries
    if row.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in entries
    if head_dim and rotary and rotary < head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    config |= row.extra(key)
    scaling = _rope_scaling(metadata, entries, key, config, strict=strict)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _end_of_text(metadata: Metadata) -> int | list[int] | None:
    """The end token, with the end-of-turn token of chat models where that is another one."""
    found = [metadata.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id")]
    ids = list(dict.fromkeys(i for i in found if isinstance(i, int)))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _rope_scaling(
    metadata: Metadata, entries: Entries, key: Callable[..., Any], config: Mapping[str, Any], *, strict: bool
) -> dict[str, Any] | None:
    kind = key("rope.scaling.type", "none")
    if "rope_freqs.weight" in entries:
        return _llama3_scaling(np.asarray(entries["rope_freqs.weight"].read(), np.float64), config, strict=strict)
    original = key("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in entries and "rope_factors_short.weight" in entries:
        return _present(
            rope_type="longrope",
            long_factor=[float(v) for v in entries["rope_factors_long.weight"].read()],
            short_factor=[float(v) for v in entries["rope_factors_short.weight"].read()],
            original_max_position_embeddings=original,
            attention_factor=key("rope.scaling.attn_factor"),
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": key("rope.scaling.factor")}
    if kind == "yarn":
        return _present(rope_type="yarn", factor=key("rope.scaling.factor"), original_max_position_embeddings=original)
    if kind != "none" and strict:
        raise UnsupportedError(f"rope.scaling.type {kind!r} is not read; none, linear and yarn are")
    return None


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], *, strict: bool) -> dict[str, Any] | None:
    """Llama 3.1's scaling, which llama.cpp stores as its result: a divisor for each rotary frequency.

    The largest divisor is the factor; the other parameters are the ones of every published Llama 3 (1, 4, 8192). The
    divisors they give are compared with the stored ones, so that another choice is an error and not a wrong model.
    """
    factor = float(short(float(factors.max(initial=1.0))))
    low, high, original = 1.0, 4.0, 8192
    dim = 2 * len(factors)
    frequencies = 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, dim, 2) / dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between))
    if not np.allclose(expected, factors, rtol=1e-3):
        if strict:
            raise UnsupportedError(
                "rope_freqs.weight does not hold the divisors of Llama 3 (low_freq_factor 1, high_freq_factor 4, "
                "original_max_position_embeddings 8192); such a scaling is not read"
            )
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def huggingface_name(name: str, row: Architecture, label: str) -> str | None:
    """Hugging Face's name of a tensor; with `{}` in place of the expert for stacked experts, None for rope tables.

    Raises:
      UnsupportedError: a tensor that the family is not known to have.
    """
    if name in ROPE_TENSORS:
        return None
    stem, _, tail = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{tail}"
    match = re.fullmatch(r"blk\.(\d+)\.([a-z0-9_]+?)(?:\.(\d+))?", stem)
    part = row.part(match[2]) if match else None
    if match and part and match[3] is not None:  # one tensor for each expert, as old files have it
        part = row.part(f"{match[2]}_exps")
        part = part.format(match[3]) if part else None
    if match is None or part is None:
        raise UnsupportedError(f"{label}: tensor {name!r} has no Hugging Face name for model type {row.model_type!r}")
    return f"model.layers.{match[1]}.{part}.{tail}"
