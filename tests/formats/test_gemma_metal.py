"""gemma and metal against transformers' own modules where torch is there, and against plain numpy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jq
from jq.errors import FormatError
from jq.formats import gemma, metal
from jq.formats.base import Context


def context(k: int, dtype: str = "bfloat16") -> Context:
    return Context(config={"dtype": dtype, "hidden_size": k}, label="test")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gemma_as_transformers(bits: int, dtype: str, cell) -> None:
    cell("gemma", "read", "write", "identical bits", "identical dequantize")
    pytest.importorskip("torch", reason="torch is not installed")
    import torch

    library = pytest.importorskip("transformers.integrations.gemma_quant", reason="transformers has no gemma_quant")
    rng, k = np.random.default_rng(bits), 40 if bits == 8 else 37
    layer = library.QuantizedLinear(k, 24, bias=False, num_bits=bits)
    raw = rng.integers(0, 256, tuple(layer.weight.shape), np.uint8)
    layer.weight.data = torch.from_numpy(raw).view(layer.weight.dtype)
    layer.weight_scale.data = torch.from_numpy(rng.random((24, 1), np.float32) * 0.1)
    layer.input_activation_scale.data = torch.tensor(0.02)
    layer.output_activation_scale.data = torch.tensor(0.05)
    parts = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    ctx = context(k, dtype)
    q = gemma.load("m.q_proj", parts, gemma.parse({"num_bits": bits}, ctx), ctx)
    assert q is not None
    want = layer._dequantize_weights(getattr(torch, dtype)).detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), want)
    for name, array in gemma.dump(q.to_jax()).items():
        assert array.tobytes() == parts[name].tobytes() and array.shape == parts[name].shape, name
    x = rng.standard_normal((5, k)).astype(np.float32)
    y = layer(torch.from_numpy(x).to(getattr(torch, dtype))).detach().float().numpy()
    got = np.asarray(jq.matmul(jnp.asarray(x).astype(dtype), q)).astype(np.float32)
    np.testing.assert_allclose(got, y, atol=0.051)  # a step of the output's grid where a sum lies on its border
    assert np.mean(got != y) < 0.05


def test_gemma_embedding_and_patterns() -> None:
    rng = np.random.default_rng(0)
    parts = {
        "embedding_quantized": rng.integers(0, 256, (10, 16), np.uint8),
        "embedding_scale": rng.random((10, 4), np.float32),
    }
    config = {"num_bits": 8, "quantize_embeddings": True, "module_quant_configs": {"embed": {"num_bits": 4}, "e": {}}}
    ctx = context(32, "float32")
    options = gemma.parse(config, ctx)
    assert (options.of("model.embed_tokens"), options.of("model.x"), options.of("e")) == (8, 8, 8)  # "e" of "model"
    config["module_quant_configs"] = {"embed": {"num_bits": 4}}
    q = gemma.load("model.embed_tokens", parts, gemma.parse(config, ctx), ctx)
    assert q is not None
    codes = np.stack([parts["embedding_quantized"] & 15, parts["embedding_quantized"] >> 4], axis=-1).reshape(10, 32)
    want = (codes.astype(np.float32) - 8) * np.repeat(parts["embedding_scale"], 8, axis=1)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), want)
    assert all(np.array_equal(v, parts[k]) for k, v in gemma.dump(q).items())


def test_gemma_errors() -> None:
    with pytest.raises(FormatError, match="num_bits is 3, expected 2, 4 or 8"):
        gemma.parse({"num_bits": 3}, context(8))
    with pytest.raises(FormatError, match="no regular expression"):
        gemma.parse({"module_quant_configs": {"(": {}}}, context(8))
    parts = {"weight": np.zeros((4, 4), np.int8), "weight_scale": np.ones((4, 1), np.float32)}
    with pytest.raises(FormatError, match=r"m.weight: found dtype int8, expected uint8"):
        gemma.load("m", parts, gemma.Options(4), context(8))
    parts["weight"] = np.zeros((4, 4), np.float32)
    assert gemma.load("m", parts, gemma.Options(4), context(4)) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_as_transformers(bits: int, dtype: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    import torch

    library = pytest.importorskip(
        "transformers.integrations.metal_quantization", reason="transformers has no metal_quantization"
    )
    w = np.random.default_rng(bits).standard_normal((8, 128)).astype(np.float32)
    w[0, :64] = 0.5  # a group of one value
    dense = torch.from_numpy(w).to(getattr(torch, dtype))
    packed, scales, biases = library._affine_quantize_tensor(dense, 64, bits)
    scales, biases = scales.to(dense.dtype), biases.to(dense.dtype)
    want = library._affine_dequantize_tensor(packed, scales, biases, 64, bits).to(dense.dtype).float().numpy()
    q = metal.Metal(bits, 64).quantize(jnp.asarray(w).astype(dtype))
    parts = metal.dump(q)
    np.testing.assert_array_equal(parts["weight"], packed.numpy())
    np.testing.assert_array_equal(parts["scales"].astype(np.float32), scales.float().numpy())
    np.testing.assert_array_equal(parts["qbiases"].astype(np.float32), biases.float().numpy())
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), want)


def test_metal_errors() -> None:
    parts = metal.dump(metal.Metal(4, 32).quantize(np.ones((4, 64), np.float32)))
    ctx = context(64)
    with pytest.raises(FormatError, match="64 inputs, no multiple of group_size 48"):
        metal.load("m", parts, metal.Options(4, 48), ctx)
    with pytest.raises(FormatError, match=r"m.scales: found shape \(4, 2\), expected \(4, 1\)"):
        metal.load("m", parts, metal.Options(4, 64), ctx)
    with pytest.raises(FormatError, match="in_features 60 are no multiple"):
        metal.Metal(4, 32).quantize(np.ones((4, 60), np.float32))


def test_metal_checkpoint(tmp_path: Any) -> None:
    q = metal.Metal(4, 32).quantize(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float16))
    config = {"model_type": "x", "quantization_config": metal.Metal(4, 32).config(["lm_head"])}
    jq.save(jq.state.State({"a.weight": q, "b.weight": np.ones(3, np.float16)}, config), tmp_path / "out")
    again = jq.load_state(tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(again["a.weight"].dequantize()), np.asarray(q.dequantize()))
    assert again.config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
