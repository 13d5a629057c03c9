"""Every reference directory: load, dequantize, save, per-linear outputs and logits, against the original library.

A directory that is found is a test case; there is no code for a single one. See `reference_dirs.directories`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_dirs import array, bits, directories, oracle, raw, relative_error, stored

import jq

DIRECTORIES = directories()
cases = pytest.mark.parametrize("folder", list(DIRECTORIES.values()), ids=list(DIRECTORIES))


@pytest.fixture(autouse=True)
def _named(folder: Path, record_property) -> None:
    """Records what the table of formats is computed from: which format and file a result belongs to."""
    record_property("format", json.loads((folder / "reference.json").read_text()).get("method"))
    record_property("directory", folder.name)


def dense(state, name: str, dtype) -> np.ndarray | None:
    """The weight of a module or tensor in `dtype`; what the file stores unquantized counts as it is."""
    quantized = jq.quantized(state)
    if name in quantized:
        return np.asarray(quantized[name].dequantize(dtype)).astype(dtype)
    for key in (name, f"{name}.weight"):
        if key in state:
            value = state[key]
            return np.asarray(value.dequantize(dtype) if hasattr(value, "dequantize") else value).astype(dtype)
    return None


def either_way(got: np.ndarray, test) -> bool:
    """Stacked experts may be held [E, out, in] or [E, in, out]."""
    return test(got) or (got.ndim == 3 and test(np.ascontiguousarray(got.swapaxes(1, 2))))


def check_dequantized(state, folder: Path) -> int:
    tensors, meta = oracle(folder)
    checked = 0
    for key, want in tensors.items():
        if not key.startswith("dequantized."):
            continue
        name = key.removeprefix("dequantized.").removesuffix(".weight")
        got = dense(state, name, want.dtype)
        assert got is not None, f"{name} is missing"
        assert either_way(got, lambda g, w=want: g.shape == w.shape and np.array_equal(bits(g), bits(w))), name
        checked += 1
    for name, (dtype, shape, digest) in meta.get("dequantized_sha256", {}).items():
        got = dense(state, name, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
        assert got is not None, f"{name} is missing"
        assert either_way(
            got,
            lambda g, s=shape, d=digest: (
                list(g.shape) == s and hashlib.sha256(np.ascontiguousarray(g).tobytes()).hexdigest() == d
            ),
        ), name
        checked += 1
    return checked


@cases
def test_arrays_hold_no_second_copy(folder: Path) -> None:
    state = jq.load_state(folder)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(dict(state)))
    weights = [
        f
        for f in folder.iterdir()
        if f.suffix != ".json" and f.name not in ("reference.safetensors", "activations.safetensors")
    ]
    assert held <= 1.02 * sum(f.stat().st_size for f in weights) + 65536


@cases
def test_dequantizes_to_the_same_bits(folder: Path) -> None:
    if not check_dequantized(jq.load_state(folder), folder):
        pytest.skip("the directory holds no dequantized weights")


@cases
def test_saves_every_byte_back(folder: Path, tmp_path: Path) -> None:
    before, metadata = stored(folder)
    if not before:
        pytest.skip("not stored as safetensors: read only")
    jq.save(jq.load_state(folder), tmp_path / "out")
    after, metadata_after = stored(tmp_path / "out")
    assert set(after) == set(before)
    assert [name for name in before if before[name] != after[name]] == []
    assert {k: metadata_after.get(k) for k in metadata} == metadata
    for file in folder.glob("*.json"):
        if file.name == "reference.json" or file.name.endswith(".index.json"):
            continue
        was, now = json.loads(file.read_text()), json.loads((tmp_path / "out" / file.name).read_text())
        if file.name == "config.json":
            was, now = was.get("quantization_config"), now.get("quantization_config")
        assert was == now, file.name
    check_dequantized(jq.load_state(tmp_path / "out"), folder)


@cases
def test_dumps_from_arrays_alone(folder: Path) -> None:
    """Tensors rebuilt from their leaves, with nothing of the source, dump the same bytes."""
    before, _ = stored(folder)
    if not before:
        pytest.skip("not stored as safetensors: read only")
    from jq.state import dump_entry

    state = jq.load_state(folder)
    for key in state:
        leaves, treedef = jax.tree.flatten(state[key])
        rebuilt = jax.tree.unflatten(treedef, [np.array(leaf) for leaf in leaves])
        for name, value in dump_entry(key, rebuilt):
            assert np.ascontiguousarray(value).tobytes() == before[name][2], name


@cases
def test_quantizes_activations_as_the_library(folder: Path) -> None:
    file = folder / "activations.safetensors"
    if not file.exists():
        pytest.skip("the directory has no activations.safetensors")
    recorded, _ = raw(file)
    state = jq.load_state(folder)
    weights = jq.quantized(state)
    for key in recorded:
        if key.endswith(".input"):
            name = key.removesuffix(".input")
            got = np.asarray(jq.matmul(jnp.asarray(array(recorded[key])), weights[name]), np.float32)
            if f"{name}.bias" in state:
                got = got + np.asarray(state[f"{name}.bias"], np.float32)
            want = recorded[f"{name}.output"]
            assert relative_error(got, array(want)) < (2e-4 if want[0] == "F32" else 1e-3), name


@cases
def test_gives_the_same_logits(folder: Path, record_property) -> None:
    tensors, _ = oracle(folder)
    if "input_ids" not in tensors or not (folder / "config.json").exists():
        pytest.skip("the directory has no logits")
    runs = [("logits_f32", 1e-3, {"quantize_activations": False})] if "logits_f32" in tensors else []
    if "logits" in tensors and tensors["logits"].dtype == np.float32:
        runs.append(("logits", 1e-3, {}))
    elif "logits" in tensors and not runs:
        runs.append(("logits", 2e-2, {}))
    if not runs:
        pytest.skip("the directory has no logits")
    for key, limit, options in runs:
        try:
            model = jq.load(folder, dtype=jnp.float32, **options)
        except jq.errors.UnsupportedError as e:
            pytest.skip(f"no decoder for this family: {e}")
        error = relative_error(model(tensors["input_ids"].astype(np.int32)), tensors[key])
        record_property(key, error)
        print(f"{folder.name:40s} {key:12s} relative L2 {error:.2e}")
        assert error < limit
