"""Random tiny llamas written by jq itself: for tests that need no other library."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import jq


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
    for i in range(2):
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


def random_ids(shape: tuple[int, int], vocab: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, shape, dtype=np.int32)
