"""Random tiny models written and run by transformers: the oracle of the decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="transformers' own models need torch (extra `test`)")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # tiny models: threads cost more than they give

SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(folder: Path, model_type: str, dtype: Any = None, **options: Any) -> Any:
    """Writes a random model of `model_type` to `folder`; the transformers model in float32, with what was stored."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.6 if "embed" in name else 1.5 / p.shape[-1] ** 0.5)
            elif "norm" in name and "bias" not in name:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.normal_(0, 0.1)
    model.to(dtype or torch.float32).save_pretrained(folder)
    if dtype is None:
        return model
    # Loaded again: a cast to 16 bits also rounds the rope's frequencies.
    return type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long), **options).logits.float().numpy()


def greedy(model: Any, ids: np.ndarray, count: int, **options: Any) -> np.ndarray:
    """Prompt and `count` greedy tokens, as transformers' generate returns them."""
    ids = torch.tensor(np.asarray(ids), dtype=torch.long)
    options.setdefault("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=count, do_sample=False, **options).numpy()


def random_ids(shape: tuple[int, int], vocab: int = 160, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, shape, dtype=np.int32)
