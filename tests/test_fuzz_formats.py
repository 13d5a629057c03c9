"""Every format against damaged modules and configs: a clear jq exception, or a tensor that can be used; never a crash."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mutations
import numpy as np
import pytest
import reference_dirs
from reference_dirs import directories, raw, stored

import jq
from jq.errors import JqError, JqWarning, UnsupportedError

FOLDERS = {
    name: path
    for name, path in directories().items()
    if "/tests/reference/" in path.as_posix() or (Path(__file__).parent / "reference" / name).exists()
}
FOLDERS = {name: path for name, path in FOLDERS.items() if any(path.glob("*.safetensors")) and stored(path)[0]}
ROUNDS = 25
AT = "model.layers.0.self_attn.q_proj"
SHAPE = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "dtype": "bfloat16"}
Seed = tuple[dict[str, np.ndarray], dict[str, Any], dict[str, bytes], dict[str, str]]


def _made(method: Any) -> Seed:
    """One module as a quantizer of jq makes it."""
    w = np.random.default_rng(0).standard_normal((128, 128)).astype(ml_dtypes.bfloat16)
    config = {**SHAPE, "quantization_config": method.config(["lm_head"])}
    parts = jq.formats()[method.format].dump(method.quantize(w, name=AT))
    if method.format == "higgs":
        config["quantization_config"]["tune_metadata"] = {AT: {"template_id": method.template_id}}
    return {f"{AT}.{suffix}": array for suffix, array in parts.items()}, config, {}, {}


def _gemma() -> Seed:
    rng = np.random.default_rng(1)
    parts = {
        "weight": rng.integers(0, 256, (128, 64), np.uint8),
        "weight_scale": rng.random((128, 1), np.float32),
        "input_activation_scale": np.asarray(0.1, np.float32),
        "output_activation_scale": np.asarray(0.1, np.float32),
    }
    settings = {"quant_method": "gemma", "num_bits": 4, "module_quant_configs": {"q_proj": {"num_bits": 4}}}
    return {f"{AT}.{k}": v for k, v in parts.items()}, {**SHAPE, "quantization_config": settings}, {}, {}


def _spqr() -> Seed:
    rng = np.random.default_rng(2)
    parts = {
        "dense_weights": rng.integers(0, 1 << 50, 8 * 8 * 16, np.int64),
        "row_offsets": np.minimum(np.arange(129), 40).astype(np.int32),
        "col_vals": rng.integers(0, 128, 40).astype(np.int32),
        "in_perm": np.zeros(0, np.int32),
    }
    settings = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": {}}
    return {f"{AT}.{k}": v for k, v in parts.items()}, {**SHAPE, "quantization_config": settings}, {}, {}


def _recorded(name: str) -> Seed:
    """The layer of a file in tests/recorded/layers, as a checkpoint."""
    tensors, meta = raw(Path(__file__).parent / "recorded" / "layers" / f"{name}.safetensors")
    stored = {f"{AT}.{k.removeprefix('m.')}": reference_dirs.array(v) for k, v in tensors.items() if k.startswith("m.")}
    settings = {"quantization_config": json.loads(meta["config"]), **json.loads(meta["model"])}
    return stored, {**SHAPE, **settings}, {}, {}


# Formats, and variants, of which no file of the original library is at hand.
MADE: dict[str, Callable[[], Seed]] = {
    "higgs": lambda: _made(jq.HIGGS(group_size=64, hadamard_size=64)),
    "fp_quant-nvfp4": lambda: _made(jq.FPQuant()),
    "fp_quant-mxfp4": lambda: _made(jq.FPQuant("mxfp4", "quest")),
    "fouroversix": lambda: _made(jq.FourOverSix()),
    "quark-uint2": lambda: _made(jq.Quark("uint2", symmetric=False)),
    "sinq-8": lambda: _made(jq.SINQ(8)),
    "gemma": _gemma,
    "spqr": _spqr,
    "qqq": lambda: _recorded("qqq-group"),
    "auto-round-rotated": lambda: _recorded("auto-round-rotated-random"),
    "paroquant": lambda: _recorded("paroquant-g128"),
    "exl3": lambda: _recorded("exl3-mcg-3"),
    "ct-rotated": lambda: _recorded("ct-rotated-permuted"),
    "quark-rotated": lambda: _recorded("quark-rotated-block"),
}


@pytest.mark.filterwarnings("ignore::jq.errors.JqWarning")
@pytest.mark.parametrize("name", [*FOLDERS, *MADE])
def test_damage_is_an_error_or_harmless(name: str, tmp_path: Path) -> None:
    seed = MADE[name]() if name in MADE else mutations.seed_of(FOLDERS[name])
    mutations.write(tmp_path / "good", *seed)
    if name in MADE:
        assert f"{AT}.weight" in jq.load_state(tmp_path / "good")
    rng = random.Random(name)
    for round_ in range(ROUNDS):
        tensors, config, sides, metadata = copy.deepcopy(seed)
        done = [mutations.mutate(rng, tensors, config, sides) for _ in range(rng.choice([1, 1, 2]))]
        folder = tmp_path / str(round_)
        mutations.write(folder, tensors, config, sides, metadata)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", JqWarning)
                state = jq.load_state(folder)
        except JqError as e:
            assert str(folder) in str(e) or any(t in str(e) for t in tensors), (
                f"{done}: names neither file nor tensor: {e}"
            )
            continue
        except Exception as e:
            raise AssertionError(f"{name}: {done}: {type(e).__name__}: {e}") from e
        for key in state:
            value = state[key]
            if isinstance(value, jq.QTensor):
                try:
                    assert np.asarray(value.unpack()) is not None
                except UnsupportedError:  # codes that do not belong to one weight each
                    assert np.asarray(value.dequantize()) is not None


@pytest.mark.parametrize("name", [*FOLDERS, *MADE])
def test_codes_without_the_rest_are_no_dense_weight(name: str, tmp_path: Path) -> None:
    """A file that lost everything of a module but its `weight` codes is an error: they are not the numbers of a layer."""
    tensors, config, sides, metadata = MADE[name]() if name in MADE else mutations.seed_of(FOLDERS[name])
    codes = [n for n, a in tensors.items() if n.endswith(".weight") and a.ndim == 2 and a.dtype.itemsize == 1]
    if not codes:
        pytest.skip("holds no codes under the name of a dense weight")
    module = codes[0].removesuffix("weight")
    left = {n: a for n, a in tensors.items() if n == codes[0] or not n.startswith(module)}
    mutations.write(tmp_path, left, config, sides, metadata)
    with pytest.raises(JqError, match=module.replace(".", r"\.")):
        jq.load_state(tmp_path)


# Tensors that are carried and take no part in a product.
CARRIED = ("backward_hadamard_matrix", "tables", "tables2", "weight", "bias", "down_proj_bias", "gate_up_proj_bias")
UNUSED = {"quanto-mixed-f16": ("input_scale", "output_scale")}


@pytest.mark.filterwarnings("ignore::jq.errors.JqWarning")
# torchao's metadata lists every module of a checkpoint: the seed, which is one module of it, is incomplete.
@pytest.mark.parametrize("name", [n for n in (*FOLDERS, *MADE) if not n.startswith("torchao")])
def test_scales_that_are_not_numbers_are_named(name: str, tmp_path: Path) -> None:
    tensors, config, sides, metadata = MADE[name]() if name in MADE else mutations.seed_of(FOLDERS[name])
    kept = (*CARRIED, *UNUSED.get(name, ()))
    tried = 0
    for key, array in tensors.items():
        wide = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if not wide or not array.size or array.dtype.itemsize == 1 or key.rsplit(".", 1)[-1] in kept:
            continue
        bad = array.copy()
        bad.reshape(-1)[-1] = np.nan
        folder = tmp_path / str(tried)
        mutations.write(folder, {**tensors, key: bad}, config, sides, metadata)
        module = key.split(".meta.")[0].split(".weight.")[0].rpartition(".")[0] if ".experts." not in key else "experts"
        with pytest.raises(JqError) as raised:
            jq.load_state(folder)
        assert str(folder) in str(raised.value) and module in str(raised.value), (key, str(raised.value))
        tried += 1
    if not tried:
        pytest.skip("holds no scales of 16 bits or more")


@pytest.mark.parametrize("key", ["modules_to_not_convert", "linear_weights_not_to_quantize", "ignored_layers"])
@pytest.mark.parametrize("value", [3, "lm_head", {"lm_head": 1}, ["lm_head", 3]])
def test_lists_of_names_hold_names(key: str, value: Any, tmp_path: Path) -> None:
    tensors, config, sides, metadata = _gemma()
    config["quantization_config"][key] = value
    mutations.write(tmp_path, tensors, config, sides, metadata)
    with pytest.raises(JqError, match=f"{tmp_path.name}.*{key} is .*expected a list of names"):
        jq.load_state(tmp_path)
