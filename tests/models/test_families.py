"""Logits and greedy tokens of every family and rope variant, against transformers' own models in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import peer

import jq

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-rope-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "ministral": (
        "ministral",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2-moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen3-moe": ("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "gpt-oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model_type, options = CASES[name]
    theirs = peer.build(tmp_path, model_type, **options)
    ours = jq.load(tmp_path)
    ids = peer.random_ids((2, 24))
    error = np.abs(np.asarray(ours(ids)) - peer.logits(theirs, ids)).max()
    assert error < 2e-4, f"max abs error {error:.1e}"
    np.testing.assert_array_equal(ours.generate(ids, 12), peer.greedy(theirs, ids, 12))


def test_old_rope_keys_mean_the_same(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` of transformers 4, next to `rope_parameters` of 5."""
    import json

    peer.build(tmp_path, "llama", rope_parameters=LLAMA3)
    ids = peer.random_ids((1, 40))
    before = np.asarray(jq.load(tmp_path)(ids))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    params = config.pop("rope_parameters")
    config["rope_theta"] = params.pop("rope_theta")
    config["rope_scaling"] = {"type": params.pop("rope_type"), **params}
    file.write_text(json.dumps(config))
    np.testing.assert_array_equal(np.asarray(jq.load(tmp_path)(ids)), before)
    assert np.abs(before - np.asarray(jq.load(_plain_rope(tmp_path))(ids))).max() > 1e-2, "the scaling does nothing"


def _plain_rope(folder: Path) -> Path:
    import json

    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("rope_scaling")
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_16_bit_weights_compute_in_float32(dtype: str, tmp_path: Path) -> None:
    theirs = peer.build(tmp_path, "llama", dtype=getattr(peer.torch, dtype))
    ids = peer.random_ids((2, 16))
    assert np.abs(np.asarray(jq.load(tmp_path)(ids)) - peer.logits(theirs, ids)).max() < 2e-4


def test_left_padding_equals_transformers(tmp_path: Path) -> None:
    theirs = peer.build(tmp_path, "qwen3", head_dim=16)
    ours = jq.load(tmp_path)
    ids = peer.random_ids((3, 20))
    mask = np.ones_like(ids)
    for row, padding in enumerate((0, 7, 13)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    got = np.asarray(ours(ids, attention_mask=mask))
    want = peer.logits(theirs, ids, attention_mask=peer.torch.tensor(mask))
    assert np.abs(got - want)[mask.astype(bool)].max() < 2e-4
    tokens = peer.greedy(theirs, ids, 10, attention_mask=peer.torch.tensor(mask))
    np.testing.assert_array_equal(ours.generate(ids, 10, attention_mask=mask), tokens)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_stored_as_transformers_holds_them(name: str, tmp_path: Path) -> None:
    """A `state_dict` has the experts of a layer fused: saved as they were; one by one, as files have them, if quantized."""
    from safetensors.torch import load_file, save_file

    model_type, options = CASES[name]
    theirs = peer.build(tmp_path, model_type, **options)
    single = load_file(tmp_path / "model.safetensors")
    fused = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    assert any(k.endswith("mlp.experts.gate_up_proj") for k in fused)
    save_file(fused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, ids = jq.load(tmp_path), peer.random_ids((2, 24))
    assert np.abs(np.asarray(ours(ids)) - peer.logits(theirs, ids)).max() < 2e-4
    jq.save(ours, tmp_path / "saved")
    saved, stored = (jq.load_state(path / "model.safetensors") for path in (tmp_path / "saved", tmp_path))
    assert list(saved) == list(stored) and saved.metadata == stored.metadata
    assert all(saved[k].dtype == stored[k].dtype and np.array_equal(saved[k], stored[k]) for k in stored)
    np.testing.assert_array_equal(np.asarray(jq.load(tmp_path / "saved")(ids)), np.asarray(ours(ids)))
    method, experts = jq.RTN(bits=8, group_size=32), {k.removesuffix(".weight") for k in single if ".experts." in k}
    for path, source in ((tmp_path / "model", ours), (tmp_path / "state", jq.load_state(tmp_path))):
        jq.save(jq.quantize(source, method), path)
        names = load_file(path / "model.safetensors")
        assert {k.rpartition(".")[0] for k in names if ".experts." in k} == experts
        assert any(k.endswith(".gate.weight") for k in names)  # the router stays float


@pytest.mark.parametrize("container", ["mlp", "block_sparse_moe"])
def test_mixtral_under_the_names_of_other_mixtures(container: str, tmp_path: Path) -> None:
    """GPT-QModel and AutoRound take Mixtral apart into modules with the names of most families, and save these."""
    from safetensors.torch import load_file, save_file

    theirs = peer.build(tmp_path, "mixtral", num_local_experts=4)
    names = {"block_sparse_moe": container, ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    renamed = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, ids = jq.load(tmp_path), peer.random_ids((2, 24))
    assert np.abs(np.asarray(ours(ids)) - peer.logits(theirs, ids)).max() < 2e-4
    jq.save(ours, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == renamed.keys() and all(saved[k].equal(renamed[k]) for k in saved)
