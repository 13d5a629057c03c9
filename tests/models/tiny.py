"""Random tiny llamas written by jq itself: for tests that need no other library."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import jq

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "eos_token_id": 2, "pad_token_id": 0}

# kv_cache_schemes that llm-compressor writes, or could
CACHES = {
    "int8": {"num_bits": 8},
    "int8-asym": {"num_bits": 8, "symmetric": False},
    "int8-asym-head": {"num_bits": 8, "symmetric": False, "strategy": "attn_head"},
    "int6-asym": {"num_bits": 6, "symmetric": False},
    "int4": {"num_bits": 4},
    "fp8": {"num_bits": 8, "type": "float"},
    "fp8-groups": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16, "dynamic": True},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
}


def write(folder: Path, tensors: dict, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    jq.save(jq.State(tensors, config), folder)
    return folder


def tiny(dtype=np.float32, **options) -> tuple[dict, dict]:
    """Tensors and config of a random llama."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 48,
        "rms_norm_eps": 1e-5,
        **options,
    }
    rng = np.random.default_rng(0)

    def one(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(dtype)

    tensors = {"model.embed_tokens.weight": one(48, 32), "model.norm.weight": one(32), "lm_head.weight": one(48, 32)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors |= {
            p + f"self_attn.{n}_proj.weight": one(*s)
            for n, s in {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}.items()
        }
        tensors |= {
            p + f"mlp.{n}_proj.weight": one(*s) for n, s in {"gate": (64, 32), "up": (64, 32), "down": (32, 64)}.items()
        }
        tensors |= {p + "input_layernorm.weight": one(32), p + "post_attention_layernorm.weight": one(32)}
    return tensors, config


def with_cache(folder: Path, scheme: dict | None, **options) -> Path:
    """A llama whose keys and values compressed-tensors' `kv_cache_scheme` rounds, written to `folder`."""
    tensors, config = tiny(**HEADS | options)
    rng = np.random.default_rng(1)
    for name in [n for n in tensors if "self_attn" in n]:
        shape = {"q": (64, 32), "k": (32, 32), "v": (32, 32), "o": (32, 64)}[name.split(".")[-2][0]]
        tensors[name] = (rng.standard_normal(shape) * 0.3).astype(np.float32)
    if scheme is not None:
        scheme = {"symmetric": True, "strategy": "tensor", "dynamic": False, "type": "int"} | scheme
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "kv_cache_scheme": scheme,
        }
        shape = (1, 1, 1) if scheme["strategy"] == "attn_head" else (1,)
        top = 448 if scheme["type"] == "float" else 2 ** (scheme["num_bits"] - 1)
        for i in range(config["num_hidden_layers"]):
            for which in "kv":
                at = f"model.layers.{i}.self_attn.{which}_"
                if scheme["dynamic"] == "local":
                    tensors[at + "global_scale"] = np.full(1, 500, np.float32)
                elif not scheme["dynamic"]:
                    tensors[at + "scale"] = np.full(shape, 3.0 / top, np.float32)
                    if not scheme["symmetric"]:
                        tensors[at + "zero_point"] = np.full(shape, 2, np.int8)
    return write(folder, tensors, config)


def random_ids(shape: tuple[int, int], vocab: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, shape, dtype=np.int32)
