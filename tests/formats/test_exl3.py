"""EXL3: codes against a decoder written bit by bit from exllamav3's kernels, sizes, padding, whole models, bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

import jq
from jq.errors import JqError
from jq.formats import exl3
from jq.formats.base import Context

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def module(n: int, k: int, bits: int, book: str = "mcg", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = {
        "trellis": rng.integers(-(1 << 15), 1 << 15, (k // 16, n // 16, 16 * bits)).astype(np.int16),
        "suh": rng.uniform(0.5, 1.5, k).astype(np.float16),
        "svh": (rng.uniform(0.5, 1.5, n) * k**-0.5).astype(np.float16),
    }
    if book in MULTIPLIERS:
        parts[book] = np.asarray(MULTIPLIERS[book], np.uint32).view(np.int32)
    return parts


def slow_value(x: int, book: str) -> np.float16:
    """codebook.cuh: decode_3inst of one window."""

    def half(bits: int) -> np.float16:
        return np.uint16(bits).view(np.float16)

    if book == "mul1":
        product = x * MULTIPLIERS["mul1"] & 0xFFFFFFFF
        total = 0x6400 + sum(product >> shift & 0xFF for shift in (0, 8, 16, 24))
        return np.float16(float(half(total)) * float(half(0x1EEE)) + float(half(0xC931)))
    product = (x * 89226354 + 64248484 if book == "3inst" else x * MULTIPLIERS["mcg"]) & 0xFFFFFFFF
    product = (product & 0x8FFF8FFF) ^ 0x3B603B60
    return half(product & 0xFFFF) + half(product >> 16)


def slow_tile(words: np.ndarray, bits: int, book: str) -> np.ndarray:
    """One tile of `trellis`, [16 inputs, 16 outputs]: `dq` of exl3_dq.cuh and the fragment order of reconstruct.cu."""
    stream = "".join(f"{word:032b}" for word in words.view(np.uint32))
    tile = np.zeros((16, 16), np.float16)
    for t in range(256):
        end = (t + 1) * bits + len(stream)
        window = int((stream * 2)[end - 16 : end], 2)
        lane, j = divmod(t, 8)
        row = 2 * (lane % 4) + (0, 1, 8, 9)[j % 4]
        tile[row, lane // 4 + 8 * (j // 4)] = slow_value(window, book)
    return tile


@pytest.mark.parametrize("book", ["3inst", "mcg", "mul1"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes(bits: int, book: str, cell) -> None:
    cell("exl3", "read", "identical dequantize")
    parts = module(128, 256, bits, book, seed=bits)
    q = exl3.load("m", parts, exl3.Options(), Context())
    assert q.shape == (128, 256) and q.bits == bits
    inner = np.asarray(q.base.dequantize("float16")).T
    for i, j in ((0, 0), (15, 3), (7, 7)):
        want = slow_tile(parts["trellis"][i, j], bits, book)
        np.testing.assert_array_equal(inner[16 * i : 16 * i + 16, 16 * j : 16 * j + 16], want)


def write(folder: Path, hidden: int, inner: int, vocab: int, **config: Any) -> dict[str, np.ndarray]:
    """A Llama of one layer as exllamav3 stores it: sizes padded to 128, the tied head quantized, floats in float16."""
    rng = np.random.default_rng(1)
    sizes = dict.fromkeys(NAMES, (hidden, hidden))
    tensors: dict[str, np.ndarray] = {}
    linears = {f"model.layers.0.self_attn.{name}": size for name, size in sizes.items()}
    linears |= {f"model.layers.0.mlp.{name}": (inner, hidden) for name in ("gate_proj", "up_proj")}
    linears |= {"model.layers.0.mlp.down_proj": (hidden, inner), "lm_head": (vocab, hidden)}
    for i, (name, (n, k)) in enumerate(linears.items()):
        parts = module(-(-n // 128) * 128, -(-k // 128) * 128, 1 + i, seed=i)
        tensors |= {f"{name}.{suffix}": array for suffix, array in parts.items()}
    tensors["model.embed_tokens.weight"] = rng.standard_normal((vocab, hidden)).astype(np.float16)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(hidden, np.float16)
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "exl3", "bits": 4.0, "head_bits": 8, "codebook": "mcg", **config},
    }
    mutations.write(folder, tensors, settings, {"quantization_config.json": b"{}"}, {"format": "pt"})
    return tensors


@pytest.mark.parametrize(("hidden", "inner", "vocab"), [(128, 256, 256), (192, 320, 300)])
def test_whole_models(hidden: int, inner: int, vocab: int, tmp_path: Path, cell) -> None:
    cell("exl3", "read", "write", "identical bits")
    tensors = write(tmp_path / "in", hidden, inner, vocab)
    model = jq.load(tmp_path / "in")
    assert model.generate(np.array([[1, 2, 3]]), max_new_tokens=3).shape == (1, 6)
    ids = np.array([[1, 5, 9, 2]])
    dense = np.asarray(model(ids))
    jq.save(model, tmp_path / "out")
    jq.save(jq.load_state(tmp_path / "in"), tmp_path / "again")
    for folder in ("out", "again"):
        back = jq.checkpoint.open_checkpoint(tmp_path / folder)
        assert set(back.entries) == set(tensors)
        for name, array in tensors.items():
            got = np.asarray(back.read(name))
            assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    state = jq.load_state(tmp_path / "again")
    assert state["lm_head.weight"].shape == (vocab, hidden)
    assert state["model.layers.0.mlp.down_proj.weight"].shape == (hidden, inner)
    np.testing.assert_array_equal(np.asarray(jq.load(tmp_path / "again")(ids)), dense)


def test_joined_matrices_are_stored_apart(tmp_path: Path) -> None:
    """Phi-3 has one matrix for queries, keys and values; exllamav3 writes three, as Llama has them."""
    write(tmp_path, 128, 256, 256)
    ids = np.array([[1, 5, 9, 2]])
    settings = json.loads((tmp_path / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    logits = []
    for name in ("llama", "phi3"):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": name, "pad_token_id": 0}))
        logits.append(np.asarray(jq.load(tmp_path)(ids)))
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trellis": np.zeros((8, 8, 65), np.int16)}, r"m\.trellis: found shape"),
        ({"trellis": np.zeros((8, 8, 144), np.int16)}, r"m\.trellis: found shape"),
        ({"trellis": np.zeros((8, 7, 64), np.int16)}, r"m\.trellis: 128 inputs and 112 outputs"),
        ({"trellis": np.zeros((8, 8, 64), np.int32)}, r"m\.trellis: found dtype int32"),
        ({"suh": np.ones(64, np.float16)}, r"m\.suh: found shape"),
        ({"svh": np.full(128, np.inf, np.float16)}, "m: scales of outputs"),
        ({"suh": None}, r"m\.su: missing.*suh"),
        ({"suh": None, "su": np.zeros(7, np.int16)}, r"m\.su: found shape"),
        ({"mul1": np.asarray(MULTIPLIERS["mul1"], np.uint32).view(np.int32)}, r"m\.mcg: is there beside mul1"),
        ({"mcg": np.asarray(5, np.int32)}, r"m\.mcg: multiplier 0x5"),
        ({"mcg": np.zeros(2, np.int32)}, r"m\.mcg: found shape"),
    ],
)
def test_bad_modules(change: dict[str, Any], message: str) -> None:
    parts = {k: v for k, v in (module(128, 128, 4) | change).items() if v is not None}
    with pytest.raises(JqError, match=message):
        exl3.load("m", parts, exl3.Options(), Context())


def test_bad_configs() -> None:
    for config, message in (
        ({"format": "gptq"}, "format is 'gptq'"),
        ({"rotation": "hadamard"}, "rotation = 'hadamard'"),
    ):
        with pytest.raises(JqError, match=message):
            exl3.parse({"quant_method": "exl3", **config}, Context())
