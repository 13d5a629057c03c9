"""GGUF files of several architectures, written as llama.cpp's converter writes them, against transformers' logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jq
from jq.formats.gguf import model_state
from jq.formats.gguf_config import ARCHITECTURES, COMMON_PARTS, MIXTRAL, TOP

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("torch", reason="torch is not installed")
import torch  # noqa: E402

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# name -> (config class, its settings, further metadata)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0},
        {"embedding_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.2, "logit_scale": 3.0},
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
        {
            "attention.key_length": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 8,
        },
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        {"attention.key_length": 32, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5}, {}),
    "phi3": ("Phi3Config", {}, {}),
}


def stored_tensors(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """The model's tensors under the names that checkpoints have (experts one by one)."""
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def write(path: Path, name: str, config: Any, extra: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """llama.cpp's names, row order of q and k, and offset of norms."""
    row, arch = (MIXTRAL, "llama") if name == "mixtral" else (ARCHITECTURES[name], name)
    names = {v: k for k, v in COMMON_PARTS.items()} | {v: k for k, v in row.parts.items()}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    for key, value in extra.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    experts: dict[str, list[np.ndarray]] = {}
    for full, array in sorted(tensors.items()):
        stem, _, tail = full.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem)
        expert = layer and re.fullmatch(r"(.*experts)\.\d+\.(.*)", layer[2])
        if layer is None:
            target = f"{ {v: k for k, v in TOP.items()}[stem] }.{tail}"
        elif expert:
            experts.setdefault(f"blk.{layer[1]}.{names[f'{expert[1]}.{{}}.{expert[2]}']}.weight", []).append(array)
            continue
        else:
            target = f"blk.{layer[1]}.{names[layer[2]]}.{tail}"
        if target.endswith("norm.weight"):
            array = array + np.float32(row.norm_offset)
        if row.permuted and re.search(r"attn_[qk]\.", target):
            heads = 4 if "attn_q" in target else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(target, np.ascontiguousarray(array, np.float32))
    for target, arrays in experts.items():
        writer.add_tensor(target, np.stack(arrays).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, settings, extra = CASES[name]
    config = getattr(transformers, kind)(**{**COMMON, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            size = 0.15 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * size + (parameter.ndim == 1 and "norm" in parameter_name))
    write(tmp_path / "m.gguf", name, config, extra, stored_tensors(model, tmp_path / "hf"))
    ids = np.arange(3, 27)[None]
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    got = np.asarray(jq.load(tmp_path / "m.gguf")(ids))
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    held, lazy = (model_state(jq.load_state(tmp_path / "m.gguf", lazy=lazy)) for lazy in (False, True))
    assert held.config == lazy.config and held.keys() == lazy.keys()
    for key in held:
        np.testing.assert_array_equal(held[key], lazy[key], err_msg=key)
