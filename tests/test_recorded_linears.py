"""Single biased layers whose inputs are quantized, with what the original library's module returned (tests/recorded_linears).

A file holds the layer's stored tensors, `input` [tokens, K] and `output` [tokens, N]; its metadata the checkpoint's
quantization_config (and what else its format keeps beside the tensors). The layers were cut to a few rows and tokens
from checkpoints that the libraries wrote. A new file is a new case without code.

Where the bias is added decides bits: before the product is rounded, and before an output is quantized.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from reference_dirs import array, bits, raw
from safetensors.numpy import save_file

import jq
from jq import activations

FILES = sorted((Path(__file__).parent / "recorded_linears").glob("*.safetensors"))


@pytest.fixture(params=FILES, ids=[f.stem for f in FILES])
def layer(request, tmp_path: Path):
    """(weight, bias, input, output) of a file."""
    tensors, meta = raw(request.param)
    arrays = {name: array(entry) for name, entry in tensors.items()}
    x, y = arrays.pop("input"), arrays.pop("output")
    stored = {k.removeprefix("stored:"): v for k, v in meta.items() if k.startswith("stored:")}
    if stored:
        stored["tensor_names"] = json.dumps(sorted(stored))
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"} | stored)
    config = {"model_type": "llama", "dtype": meta["dtype"]}
    if json.loads(meta["quantization_config"]):
        config["quantization_config"] = json.loads(meta["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "quanto_qmap" in meta:
        (tmp_path / "quanto_qmap.json").write_text(meta["quanto_qmap"])
    state = jq.load_state(tmp_path)
    return jq.quantized(state)[meta["module"]], np.asarray(state[meta["module"] + ".bias"]), x, y


def test_adds_the_bias_where_the_library_does(layer) -> None:
    w, bias, x, y = layer
    got = np.asarray(activations.matmul(jnp.asarray(x), w, jnp.asarray(bias)))
    assert got.dtype == y.dtype
    assert np.array_equal(bits(got), bits(y)), f"{(bits(got) != bits(y)).mean():.2%} differ"


def test_so_does_the_torch_layer(layer) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    import torch

    from jq_torch import bridge
    from jq_torch.linear import JqLinear

    w, bias, x, y = layer
    module = JqLinear(w.shape[1], w.shape[0], bias=torch.nn.Parameter(bridge.tensor_of(bias)))
    module.put("q", w)
    with torch.no_grad():
        got = bridge.array_of(module(bridge.tensor_of(x)))
    assert np.array_equal(bits(got), bits(y)), f"{(bits(got) != bits(y)).mean():.2%} differ"
