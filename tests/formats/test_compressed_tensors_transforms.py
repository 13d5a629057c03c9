"""compressed-tensors: rotations of activations (transform_config). What they compute: tests/recorded/layers/ct-rotated-*."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_reading import compressed_tensors_config as config
from reference_dirs import array, raw
from safetensors.numpy import save_file

import jq
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context
from jq.formats.compressed_tensors_config import parse

RECORDED = Path(__file__).parents[1] / "recorded" / "layers"


def test_gradients_pass_through_a_rotation(tmp_path):
    w = jq.quantized(jq.load_state(rotated_layer(tmp_path)))["m"].to_jax()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    identity = np.asarray(jq.matmul(jnp.eye(64), w), np.float64)
    found = jax.grad(lambda x: jq.matmul(x, w).sum())(x)
    assert np.allclose(found, np.broadcast_to(identity.sum(axis=1), (3, 64)), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "wavelet"}, "type 'wavelet' is not known"),
        ({"head_dim": 0}, "head_dim 0, expected a positive number"),
        ({"block": 3}, "unknown key 'block'"),
        ({"apply": [{"location": "bias"}]}, "location 'bias'; known: input, "),
        ({"apply": [{"location": "input", "targets": [1]}]}, "targets: .* expected a list of strings"),
        ({"apply": [3]}, "apply holds 3, expected objects"),
        ({"randomize": "no"}, "R4.randomize is 'no', expected true or false"),
        ({"apply": [{"location": "input", "targets": [], "inverse": "no"}]}, "inverse is 'no', expected true or false"),
    ],
)
def test_bad_transforms(change, message):
    scheme = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}], **change}
    with pytest.raises(FormatError, match=message):
        parse(config({"num_bits": 4}, transform_config={"config_groups": {"R4": scheme}}), Context())


def rotated_layer(folder, **change):
    """A file of one recorded layer with rotated inputs, some tensors changed (None: left out)."""
    tensors, meta = raw(RECORDED / "ct-rotated-permuted.safetensors")
    arrays = {k: array(v) for k, v in tensors.items() if k.startswith("m.")} | {
        f"m.{k.replace('__', '.')}": v for k, v in change.items()
    }
    save_file({k: v for k, v in arrays.items() if v is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": json.loads(meta["config"])}))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"R4_input__weight": None}, r"m.R4_input.weight: missing; no module stores a random-hadamard matrix of 32"),
        ({"R4_input__perm": None}, r"m.R4_input.perm: missing, or no permutation of 32 inputs"),
        ({"R4_input__perm": np.zeros(32, np.int64)}, r"m.R4_input.perm: missing, or no permutation"),
        ({"R4_input__weight": np.ones((32, 16))}, r"m.R4_input.weight: found shape \(32, 16\), expected a square"),
        ({"R4_input__weight": np.full((32, 32), np.nan)}, r"m.R4_input.weight: .* not finite"),
    ],
)
def test_bad_rotations(tmp_path, change, message):
    with pytest.raises(FormatError, match=f"(?s)test_bad_rotations.*{message}"):
        jq.load_state(rotated_layer(tmp_path, **change))


def test_rotations_of_other_modules(tmp_path):
    rotated_layer(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    for apply in found["quantization_config"]["transform_config"]["config_groups"]["R4"]["apply"]:
        apply["targets"] = ["LlamaMLP"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(UnsupportedError, match=r"R4 rotates the input of \['LlamaMLP'\], which means no linear layer"):
        jq.load_state(tmp_path)


@pytest.mark.parametrize("lazy", [False, True])
def test_layers_hold_a_shared_matrix_once(tmp_path, lazy):
    rng, tensors = np.random.default_rng(0), {}
    for i in range(3):
        codes = rng.integers(-(2**31), 2**31, (8, 8)).astype(np.int32)
        parts = {"packed": codes, "scale": np.ones((8, 1), np.float32), "shape": np.array([8, 64])}
        tensors |= {f"layers.{i}.up_proj.weight_{name}": a for name, a in parts.items()}
    tensors["layers.0.up_proj.R1_input.weight"] = rng.standard_normal((64, 64))
    save_file(tensors, tmp_path / "model.safetensors")
    scheme = {"type": "random-matrix", "apply": [{"targets": ["Linear"], "location": "input"}]}
    found = config({"num_bits": 4, "strategy": "channel"}, transform_config={"config_groups": {"R1": scheme}})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": found}))
    layers = jq.quantized(jq.load_state(tmp_path, lazy=lazy)).values()
    matrices = [w.extras["~0.matrix"] for w in layers]
    assert len(matrices) == 3 and all(m is matrices[0] for m in matrices)
    np.testing.assert_array_equal(matrices[0], tensors["layers.0.up_proj.R1_input.weight"].astype(np.float32))


def test_rotations_count_once(tmp_path):
    summary = jq.inspect(rotated_layer(tmp_path)).to_dict()
    stored, _ = raw(tmp_path / "model.safetensors")
    assert summary["tensor_bytes"] == sum(len(data) for _, _, data in stored.values())


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}])
def test_a_dense_layer_with_a_rotation_is_saved_as_it_was(tmp_path, inputs):
    rng = np.random.default_rng(0)
    tensors = {"layers.0.up_proj.weight": rng.standard_normal((8, 64)).astype(np.float32)}
    tensors["layers.0.up_proj.R1_input.weight"] = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    save_file(tensors, tmp_path / "model.safetensors")
    scheme = {"type": "random-matrix", "apply": [{"targets": ["Linear"], "location": "input"}]}
    group = {"targets": ["Linear"], "weights": None, "input_activations": inputs}
    found = {"quant_method": "compressed-tensors", "config_groups": {"g": group} if inputs else {}}
    found["transform_config"] = {"config_groups": {"R1": scheme}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": found}))
    saved = dict(jq.load_state(tmp_path).stored())
    assert saved.keys() == tensors.keys()
    assert all(np.array_equal(saved[name], tensors[name]) for name in tensors)
