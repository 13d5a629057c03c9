"""GGUF: whole models against the weights they were written from."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jq
from jq.errors import CheckpointError, JqError, UnsupportedError
from jq.formats.gguf import model_state, to_huggingface
from jq.formats.gguf_reader import read_file, read_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
from gguf import GGMLQuantizationType as Type  # noqa: E402

CONFIG = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PARTS = {
    "attn_q": ("self_attn.q_proj", 64, 64),
    "attn_k": ("self_attn.k_proj", 32, 64),
    "attn_v": ("self_attn.v_proj", 32, 64),
    "attn_output": ("self_attn.o_proj", 64, 64),
    "ffn_gate": ("mlp.gate_proj", 96, 64),
    "ffn_up": ("mlp.up_proj", 96, 64),
    "ffn_down": ("mlp.down_proj", 64, 96),
}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, as its converter makes it."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_model(
    path: Path, kind: str = "Q8_0", *, tied: bool = True, arch: str = "llama", seed: int = 0, tokenizer: bool = True
) -> dict[str, np.ndarray]:
    """A tiny model as llama.cpp would write it; returns its dequantized weights by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(16)
    if tokenizer:
        add_byte_level(writer)
    dense: dict[str, np.ndarray] = {}

    def matrix(name: str, target: str, n: int, k: int, kind: str, heads: int = 0) -> None:
        raw = gguf.quantize((rng.standard_normal((n, k)) * 0.2).astype(np.float32), Type[kind])
        w = gguf.dequantize(raw, Type[kind])
        if heads:  # rows of blocks move whole
            raw = permuted(raw, heads)
        writer.add_tensor(name, raw, raw_dtype=None if kind in ("F16", "F32") else Type[kind])
        dense[target] = w

    def norm(name: str, target: str) -> None:
        dense[target] = (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)
        writer.add_tensor(name, dense[target])

    matrix("token_embd.weight", "model.embed_tokens.weight", 24, 64, kind)
    norm("output_norm.weight", "model.norm.weight")
    if not tied:
        matrix("output.weight", "lm_head.weight", 24, 64, "F16")
    for i in range(2):
        norm(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight")
        norm(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight")
        for part, (target, n, k) in PARTS.items():
            heads = {"attn_q": 4, "attn_k": 2}.get(part, 0) if arch == "llama" else 0
            matrix(f"blk.{i}.{part}.weight", f"model.layers.{i}.{target}.weight", n, k, kind, heads)
            if arch == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                dense[f"model.layers.{i}.{target}.bias"] = rng.standard_normal(n).astype(np.float32)
                writer.add_tensor(f"blk.{i}.{part}.bias", dense[f"model.layers.{i}.{target}.bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


TOKENS = ["<|end|>", "<|user|>", "a", "b", "c", "\u0120", "1", "2", "ab", "abc", "\u0120a", "\u0120ab", "<tool>"]


def add_byte_level(writer: Any, pre: str = "smollm") -> None:
    tokens = TOKENS + [f"x{i}" for i in range(24 - len(TOKENS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 10, 4, *[1] * 11])
    writer.add_token_merges(["a b", "ab c", "\u0120 a", "\u0120 ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.mark.parametrize(("arch", "kind", "tied"), [("llama", "Q8_0", True), ("qwen2", "Q5_1", False)])
def test_a_model_runs_as_its_dense_weights_do(tmp_path: Path, arch: str, kind: str, tied: bool) -> None:
    file = tmp_path / "model.gguf"
    dense = write_model(file, kind, tied=tied, arch=arch)
    config, tensors, files = to_huggingface(file)
    assert config.items() >= {**CONFIG, "model_type": arch, "tie_word_embeddings": tied, "rope_theta": 50000.0}.items()
    assert tensors.keys() == dense.keys()
    for name, w in dense.items():
        np.testing.assert_array_equal(tensors[name], w.astype(np.float16), err_msg=name)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    model = jq.load(file)
    plain = jq.load(jq.state.State(dense, config))
    ids = np.arange(1, 20)[None] % 24
    np.testing.assert_allclose(np.asarray(model(ids)), np.asarray(plain(ids)), rtol=1e-4, atol=1e-4)
    packed = jq.load(file, packed=True)
    np.testing.assert_allclose(np.asarray(packed(ids)), np.asarray(plain(ids)), rtol=1e-3, atol=1e-3)
    assert len(jq.quantized(model)) == 15
    with pytest.raises(UnsupportedError, match="read, not written"):
        jq.save(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("Q8_0", ("hqq", "torchao", "compressed-tensors")),
        ("Q5_0", ("hqq", "torchao")),
        ("Q4_0", ("hqq", "compressed-tensors")),
    ],
)
def test_blocks_with_a_scale_become_integers(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    dense = write_model(tmp_path / "model.gguf", kind, tied=False)
    for to in targets:
        jq.convert(tmp_path / "model.gguf", tmp_path / to, to)
        state = jq.load_state(tmp_path / to)
        assert len(jq.quantized(state)) == 14 and state.keys() == dense.keys()
        for name, w in dense.items():
            got = np.asarray(state[name].dequantize()) if name.endswith("proj.weight") else np.asarray(state[name])
            np.testing.assert_array_equal(got.astype(np.float32), w.astype(np.float32), err_msg=name)
        assert jq.load(tmp_path / to).tokenizer("abc")["input_ids"] == [9]


def test_blocks_with_a_minimum_do_not(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "Q5_1")
    with pytest.raises(UnsupportedError, match="q_proj: zero points are floats"):
        jq.convert(tmp_path / "model.gguf", None, "hqq")


def test_a_state_has_the_names_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file)
    state = jq.load_state(file)
    assert {"token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"} <= set(state)
    assert "blk.0.attn_q" in jq.quantized(state)
    held = sum(v.nbytes for v in state.values())
    assert held <= 1.02 * file.stat().st_size
    assert model_state(model_state(state)).config["model_type"] == "llama"


@pytest.mark.parametrize("lazy", [False, True])
def test_a_state_in_memory_is_what_loads(tmp_path: Path, lazy: bool) -> None:
    """Tensors and settings that a user changed hold; what is in memory needs no file."""
    file = tmp_path / "model.gguf"
    dense = write_model(file)
    state = jq.load_state(file, lazy=lazy)
    rng = np.random.default_rng(5)
    query, norm = rng.standard_normal((64, 64), np.float32), rng.standard_normal(64, np.float32)
    nf4 = jq.NF4().quantize(query)
    changed = {"blk.0.attn_q.weight": permuted(query, 4), "output_norm.weight": norm, "blk.1.attn_q.weight": nf4}
    other = state.with_tensors({**{n: state[n] for n in state}, **changed}, {**state.config, "rope_theta": 100.0})
    file.unlink()
    made = model_state(other)
    assert made.config["rope_theta"] == 100.0 and made.keys() == dense.keys()
    expected = dense | {"model.layers.0.self_attn.q_proj.weight": query, "model.norm.weight": norm}
    halves = np.asarray(nf4.dequantize()).reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    expected["model.layers.1.self_attn.q_proj.weight"] = halves
    for name, w in expected.items():
        found = made[name].dequantize() if isinstance(made[name], jq.QTensor) else made[name]
        np.testing.assert_array_equal(np.asarray(found), w, err_msg=name)
    plain = jq.load(jq.state.State(expected, made.config))
    ids = np.arange(1, 9)[None]
    np.testing.assert_allclose(np.asarray(jq.load(other)(ids)), np.asarray(plain(ids)), rtol=1e-4, atol=1e-4)
    assert jq.load(other).tokenizer("abc")["input_ids"] == [9]
    if lazy:
        with pytest.raises(CheckpointError, match=r"model[.]gguf: cannot be read"):
            jq.load(state)


def test_a_state_with_other_tensors_stays_a_gguf(tmp_path: Path) -> None:
    """Its config and vocabulary are the file's; and a directory of its names alone is nothing that loads."""
    file = tmp_path / "model.gguf"
    dense = write_model(file)
    state = jq.load_state(file)
    plain = {n: np.asarray(v.dequantize()) if isinstance(v, jq.QTensor) else v for n, v in state.items()}
    ids = np.arange(1, 9)[None]
    expected = np.asarray(jq.load(jq.state.State(dense, model_state(state).config))(ids))
    for tensors in (plain, dict(state)):
        other = state.replace(tensors)
        model = jq.load(other)
        np.testing.assert_allclose(np.asarray(model(ids)), expected, rtol=1e-4, atol=1e-4)
        assert model.tokenizer("abc")["input_ids"] == [9]
        with pytest.raises(UnsupportedError, match=r"model[.]gguf: GGUF is read, not written; jq[.]convert"):
            jq.save(other, tmp_path / "out")
    jq.save(state.replace(dense, model_state(state).config), tmp_path / "out")  # under Hugging Face's names
    np.testing.assert_allclose(np.asarray(jq.load(tmp_path / "out")(ids)), expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_of_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file)
    tokenizer = jq.load(file).tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    assert ids("abc ab<|user|>12<tool>") == [9, 11, 1, 6, 7, 12]
    assert tokenizer.decode(ids("abc ab12")) == "abc ab12"
    assert tokenizer.decode([9, 0], skip_special_tokens=True) == "abc"
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|user|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_llama3_rope_divisors(tmp_path: Path) -> None:
    from jq.formats.gguf_config import _llama3_scaling

    frequencies = 1 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    wave = 2 * np.pi / frequencies
    smooth = (8192 / wave - 1) / 3
    factors = np.where(wave < 2048, 1, np.where(wave > 8192, 8, 1 / ((1 - smooth) / 8 + smooth))).astype(np.float32)
    got = _llama3_scaling(factors.astype(np.float64), {"rope_theta": 500000.0}, strict=True)
    assert got == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(UnsupportedError, match="does not hold the divisors of Llama 3"):
        _llama3_scaling(factors * 1.1, {"rope_theta": 500000.0}, strict=True)


def test_architectures_without_names(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, arch="mamba")
    assert len(jq.load_state(file)) == 20
    with pytest.raises(UnsupportedError, match="architecture 'mamba' has no Hugging Face names"):
        jq.load(file)


def test_split_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    dense = write_model(whole)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=9, split_max_size=0)
    for key, value in read_file(whole)[1].items():
        if isinstance(value, int) and not isinstance(value, bool) and key.startswith("llama."):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for name, entry in read_file(whole)[0].items():
        writer.add_tensor(name, np.array(entry.read()), raw_dtype=Type[entry.kind] if entry.kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    _, tensors, _ = to_huggingface(parts[0], packed=True)
    assert tensors.keys() == dense.keys()
    with pytest.raises(CheckpointError, match="is part 2 of 3; give the first one, model-00001-of-00003"):
        read_gguf(parts[1])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.gguf: missing"):
        read_gguf(parts[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(file, tied=False)
    return file


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_files(small: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.mktemp("cut") / "model.gguf"
    raw = small.read_bytes()
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 33))])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        read_gguf(file)


@pytest.mark.filterwarnings("ignore::jq.errors.JqWarning")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers(small: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    damaged = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 2600))
        damaged[at] = data.draw(st.sampled_from([0, 1, 9, 0x7F, 0x80, 0xFF]))
    file = tmp_path_factory.mktemp("bad") / "model.gguf"
    file.write_bytes(bytes(damaged))
    try:
        state = jq.load_state(file, lazy=True)
        assert len(state) > 0
        to_huggingface(file, packed=True)
    except JqError as e:
        assert str(file) in str(e) or "blk." in str(e)


def header(tensors: int, keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (b"", CheckpointError, "cannot be read"),
        (b"GGML" + bytes(100), CheckpointError, "no GGUF file"),
        (header(0, 0, version=1), UnsupportedError, "version 1; little-endian versions 2 and 3"),
        (header(0, 0, version=3 << 24), UnsupportedError, "a big-endian file"),
        (header(2**60, 0), CheckpointError, "do not fit the file"),
        (header(0, 1, struct.pack("<Q", 2**62) + bytes(20)), CheckpointError, "truncated or damaged"),
        (header(0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**61)), CheckpointError, "metadata key 'a' takes"),
        (header(0, 1, struct.pack("<Q1sI", 1, b"a", 77)), CheckpointError, "unknown type 77"),
        (header(0, 1, struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 9), CheckpointError, "too deep"),
        (
            header(1, 0, struct.pack("<Q1sI2QIQ", 1, b"w", 2, 33, 1, 2, 0) + bytes(64)),
            CheckpointError,
            "rows of Q4_0 are blocks of 32",
        ),
        (
            header(1, 0, struct.pack("<Q1sI2QIQ", 1, b"w", 2, 2**40, 2**20, 2, 0) + bytes(64)),
            CheckpointError,
            "does not fit the file",
        ),
        (
            header(1, 0, struct.pack("<Q1sI1QIQ", 1, b"w", 1, 8, 4, 0) + bytes(64)),
            UnsupportedError,
            "w: tensor type 4 is not known",
        ),
        (
            header(1, 0, struct.pack("<Q4sI1QIQ", 4, b"../x", 1, 8, 0, 0) + bytes(64)),
            CheckpointError,
            "looks like a path",
        ),
        (header(1, 0, struct.pack("<Q1sI", 1, b"w", 9) + bytes(99)), CheckpointError, "w: 9 dimensions"),
    ],
)
def test_hostile_headers(tmp_path: Path, raw: bytes, error: type[Exception], message: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(raw)
    with pytest.raises(error, match=message) as caught:
        jq.load_state(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "tensors"),
    [
        ("rope.dimension_count", "x", {}),
        ("rope.dimension_count", [1, 2], {}),
        ("expert_count", "x", {}),
        ("rope.scaling.type", "none", {"rope_freqs.weight": np.ones((2, 8), np.float32)}),
        (
            "rope.scaling.type",
            "none",
            {f"rope_factors_{which}.weight": np.ones((2, 4), np.float32) for which in ("long", "short")},
        ),
    ],
)
def test_metadata_of_wrong_types_names_the_file(tmp_path: Path, key: str, value: Any, tensors: dict) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.embedding_length", 32)
    (writer.add_array if isinstance(value, list) else writer.add_string)(f"llama.{key}", value)
    for name, tensor in {"token_embd.weight": np.ones((50, 32), np.float32), **tensors}.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for call in (jq.load_state, jq.inspect, jq.load):
        with pytest.raises(CheckpointError, match=r"model\.gguf: the metadata describes no model"):
            call(tmp_path / "model.gguf")
