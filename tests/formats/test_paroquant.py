"""ParoQuant: the rotation of inputs pair by pair, experts that share it, whole models, bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

import jq
from jq.errors import JqError
from jq.formats import paroquant
from jq.formats.base import Context

OPTIONS = paroquant.parse({"group_size": 32, "krot": 3}, Context())


def rotation(k: int, size: int = 32, rounds: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(size) for _ in range(rounds * k // size)]
    return {
        "theta": rng.uniform(-3, 3, (rounds, k // 2)).astype(np.float16),
        "pairs": np.reshape(pairs, (rounds, k)).astype(np.int16),
        "channel_scales": rng.uniform(0.5, 2, (1, k)).astype(np.float16),
    }


def integers(n: int, k: int, size: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    words = rng.integers(-(1 << 31), 1 << 31, (k + k // size, n // 8)).astype(np.int32)
    scales = (rng.uniform(0.5, 1.5, (k // size, n)) * 0.1).astype(np.float16)
    return {"qweight": words[:k], "qzeros": words[k:], "scales": scales}


def turned(x: np.ndarray, parts: dict[str, np.ndarray], size: int = 32) -> np.ndarray:
    """The rotation of float64 inputs, one pair after the other."""
    x = x * parts["channel_scales"].astype(np.float64)
    for angles, pairs in zip(parts["theta"].astype(np.float64), parts["pairs"].astype(int), strict=True):
        y = x.copy()
        for p, angle in enumerate(angles):
            i, j = (2 * p // size * size + pairs[2 * p + a] for a in (0, 1))
            y[:, i] = x[:, i] * np.cos(angle) + x[:, j] * np.sin(angle)
            y[:, j] = x[:, j] * np.cos(angle) - x[:, i] * np.sin(angle)
        x = y
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_inputs_are_rotated(dtype: Any, cell) -> None:
    cell("paroquant", "read")
    parts = integers(16, 64) | rotation(64)
    q = paroquant.load("m", parts, OPTIONS, Context()).to_jax()
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(dtype)
    want = turned(x.astype(np.float64), parts) @ np.asarray(q.dequantize("float32")).T
    limit = 1e-6 if dtype == np.float32 else 3e-3
    for quantize in (True, False):  # the rotation belongs to the layer
        got = np.asarray(jq.matmul(x, q, quantize_activations=quantize))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, atol=limit * np.abs(want).max())


def test_experts_share_their_rotation(tmp_path: Path, cell) -> None:
    cell("paroquant", "read", "write", "identical bits")
    at = "model.layers.0.mlp.experts"
    tensors = {
        f"{at}.{part}_weight_{k}": v
        for i, part in enumerate(("gate_up", "down"))
        for k, v in rotation(64, seed=i).items()
    }
    for expert in range(2):
        for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            tensors |= {f"{at}.{expert}.{name}.{k}": v for k, v in integers(64, 64, seed=3 * expert + i).items()}
    config = {"quantization_config": {"quant_method": "paroquant", "bits": 4, "group_size": 32, "krot": 3}}
    mutations.write(tmp_path / "in", tensors, config, {}, {})
    state = jq.load_state(tmp_path / "in")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    for name, part in (("up_proj", "gate_up"), ("down_proj", "down")):
        own = {k: tensors[f"{at}.{part}_weight_{k}"] for k in rotation(64)}
        q = state[f"{at}.1.{name}.weight"]
        want = turned(x.astype(np.float64), own) @ np.asarray(q.dequantize("float32")).T
        np.testing.assert_allclose(np.asarray(jq.matmul(x, q.to_jax())), want, atol=1e-6 * np.abs(want).max())
    jq.save(state, tmp_path / "out")
    same(tmp_path / "out", tensors)


def same(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    back = jq.checkpoint.open_checkpoint(folder)
    assert set(back.entries) == set(tensors)
    for name, array in tensors.items():
        got = np.asarray(back.read(name))
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_a_whole_model(tmp_path: Path, cell) -> None:
    cell("paroquant", "read", "write", "identical bits")
    tensors: dict[str, np.ndarray] = {}
    sizes = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (64, 64))
    sizes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    for i, (name, (n, k)) in enumerate(sizes.items()):
        parts = integers(n, k, seed=i) | rotation(k, seed=i)
        tensors |= {f"model.layers.0.{name}.{s}": a for s, a in parts.items()}
    rng = np.random.default_rng(7)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = rng.standard_normal((256, 64)).astype(np.float16)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(64, np.float16)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "tie_word_embeddings": False,
        "dtype": "float16",
        "quantization_config": {"quant_method": "paroquant", "bits": 4, "group_size": 32, "krot": 3},
    }
    mutations.write(tmp_path / "in", tensors, config, {}, {"format": "pt"})
    model = jq.load(tmp_path / "in")
    assert model.generate(np.array([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)
    jq.save(model, tmp_path / "out")
    same(tmp_path / "out", tensors)
    ids = np.array([[1, 5, 9, 2]])
    np.testing.assert_array_equal(np.asarray(model(ids)), np.asarray(jq.load(tmp_path / "out")(ids)))


TWICE = rotation(64)["pairs"]
TWICE[1, 3] = TWICE[1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": TWICE}, r"m\.pairs: a set must pair every channel"),
        ({"pairs": np.full((3, 64), -1, np.int16)}, r"m\.pairs: a set must pair every channel"),
        ({"pairs": np.zeros((3, 64), np.int32)}, r"m\.pairs: found dtype int32"),
        ({"theta": np.zeros((2, 32), np.float16)}, r"m\.theta: found shape"),
        ({"theta": np.full((3, 32), np.nan, np.float16)}, r"m\.theta: .*not finite"),
        ({"theta": None}, r"m\.theta: missing"),
        ({"channel_scales": np.ones(64, np.float16)}, r"m\.channel_scales: found shape"),
        ({"qzeros": None}, r"m\.qzeros: missing"),
    ],
)
def test_bad_modules(change: dict[str, Any], message: str) -> None:
    parts = {k: v for k, v in (integers(16, 64) | rotation(64) | change).items() if v is not None}
    with pytest.raises(JqError, match=message):
        paroquant.load("m", parts, OPTIONS, Context())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 3}, "ParoQuant with 3 bits"),
        ({"krot": -2}, "krot is -2"),
        ({"krot": "many"}, "krot is 'many'"),
        ({"format": "gemm"}, "format is 'gemm'"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(JqError, match=message):
        paroquant.parse(config, Context())
