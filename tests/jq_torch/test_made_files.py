"""Formats of whose library no whole checkpoint is at hand: files made here give the numbers of jq in JAX, and save unchanged.

HIGGS, Four Over Six, FP-Quant, SINQ, Quark and ModelOpt by jq's own methods, which are held to the libraries elsewhere
(tests/formats, tests/test_recorded_codes.py). SpQR's words by the packer of its test, Gemma's bytes, QQQ's words, EXL3's
tiles and ParoQuant's pairs at random: beside JAX, the first is held to the dense weight that it stands for, the second to
transformers, which needs no library for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.test_exl3 import module as exl3_parts
from formats.test_paroquant import integers, rotation
from formats.test_spqr import checkpoint as spqr_parts
from reference_dirs import relative_error
from safetensors.torch import save_file
from tiny import ids, same, tensors_of
from transformers import AutoModelForCausalLM

import jq
import jq_torch
from jq_torch.linear import JqLinear


def written(source: Path, target: Path, tensors: dict[str, torch.Tensor], more: dict[str, Any]) -> None:
    target.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | more
    (target / "config.json").write_text(json.dumps(config))


def by(method: Any) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        jq.save(jq.quantize(jq.load_state(source), method), target / "packed")

    return make


def linears(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removesuffix("weight"): t for name, t in tensors.items() if name.endswith("_proj.weight")}


def spqr(source: Path, target: Path) -> None:
    packed, dense = tensors_of(source), tensors_of(source)
    for seed, (prefix, weight) in enumerate(linears(packed).items()):
        n, k = weight.shape
        parts, values = spqr_parts(seed, n, k, interleaved=False, perm="down_proj" in prefix, outliers=30)
        del packed[f"{prefix}weight"]
        packed |= {prefix + name: torch.from_numpy(np.array(a)) for name, a in parts.items()}
        dense[f"{prefix}weight"] = torch.from_numpy(values.astype(np.float32))
    shapes = {prefix + name: list(packed[prefix + name].shape) for prefix in linears(dense) for name in parts}
    config = {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": shapes}
    written(source, target / "packed", packed, {"quantization_config": config})
    written(source, target / "dense", dense, {})


def gemma(source: Path, target: Path) -> None:
    tensors, rng = tensors_of(source), np.random.default_rng(0)
    widths = {"q_proj": 2, "down_proj": 8}
    for prefix, weight in linears(tensors).items():
        n, k = weight.shape
        bits = widths.get(prefix.split(".")[-2], 4)
        raw = torch.from_numpy(rng.integers(0, 256, (n, k * bits // 8), np.uint8))
        tensors[f"{prefix}weight"] = raw.view(torch.int8) if bits == 8 else raw
        tensors[f"{prefix}weight_scale"] = torch.from_numpy((rng.random((n, 1), np.float32) + 0.5) * 0.1 / 2**bits)
        for side in ("input", "output"):
            tensors[f"{prefix}{side}_activation_scale"] = torch.tensor(0.03)
    table = {name: {"num_bits": bits} for name, bits in widths.items()}
    config = {"quant_method": "gemma", "num_bits": 4, "module_quant_configs": table}
    config["modules_to_not_convert"] = ["lm_head"]
    written(source, target / "packed", tensors, {"quantization_config": config})


def at_random(config: dict[str, Any], parts_of: Callable[[int, int, int], dict[str, np.ndarray]]) -> Any:
    """A maker of files whose layers [n, k] hold `parts_of(n, k, seed)`."""

    def make(source: Path, target: Path) -> None:
        tensors = tensors_of(source)
        for seed, (prefix, weight) in enumerate(linears(tensors).items()):
            del tensors[f"{prefix}weight"]
            parts = parts_of(*weight.shape, seed)
            tensors |= {prefix + name: torch.from_numpy(np.array(a)) for name, a in parts.items()}
        written(source, target / "packed", tensors, {"quantization_config": config})

    return make


def qqq_parts(n: int, k: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "B": rng.integers(-(1 << 31), 1 << 31, (k // 16, 2 * n)).astype(np.int32),
        "s_group": rng.uniform(1, 15, (k // 128, n)).astype(np.float16),
        "s_channel": rng.uniform(0.5, 1.5, (1, n)).astype(np.float32) / 64 / k**0.5,
    }


ACTIVE = ("gemma", "fp_quant", "fouroversix", "modelopt", "qqq")  # whose activations are quantized
MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "spqr": spqr,
    "gemma": gemma,
    "higgs": by(jq.HIGGS(group_size=64, hadamard_size=64)),
    "quark": by(jq.Quark("fp6_e2m3")),
    "fp_quant": by(jq.FPQuant("mxfp4", "quest", transform_init="gsr")),
    "fouroversix": by(jq.FourOverSix()),
    "sinq": by(jq.SINQ(tiling_mode="2D")),
    "modelopt": by(jq.NVFP4()),
    "qqq": at_random({"quant_method": "qqq", "bits": 4, "group_size": 128}, qqq_parts),
    "exl3": at_random({"quant_method": "exl3", "bits": 3.0}, lambda n, k, seed: exl3_parts(n, k, 3, seed=seed)),
    "paroquant": at_random(
        {"quant_method": "paroquant", "bits": 4, "group_size": 32, "krot": 3},
        lambda n, k, seed: integers(n, k, seed=seed) | rotation(k, seed=seed),
    ),
}


@pytest.fixture(scope="module", params=MAKERS)
def made(request, float_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](float_llama, folder)
    return folder / "packed"


def loaded(folder: Path) -> tuple[Any, np.ndarray]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert sum(isinstance(m, JqLinear) for m in model.modules()) == (0 if folder.name == "dense" else 14)
    with torch.no_grad():
        return model, model(ids()).logits.numpy()


def check_saved(model: Any, source: Path, target: Path) -> None:
    """The same tensors, and the same quantization_config."""
    model.save_pretrained(target)
    want, got = tensors_of(source), tensors_of(target)
    assert want.keys() == got.keys()
    assert all(same(want[n], got[n]) for n in want)
    before, after = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, target))
    assert before == after


@pytest.mark.parametrize("active", [False, True])
def test_numbers_are_those_of_jax_and_files_as_they_were(made, active, tmp_path, cell):
    cell(json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"], "torch adapter")
    if active and not made.parent.name.startswith(ACTIVE):
        pytest.skip("its activations are not quantized")
    with jq_torch.enable(quantize_activations=active):
        torchs, got = loaded(made)
        check_saved(torchs, made, tmp_path)
    packed = made.parent.name.startswith(("higgs", "sinq"))  # two kinds of tensors without codes of their own
    model = jq.load(made, dtype="float32", quantize_activations=active, packed=packed)
    # a rounded activation that falls to the other side moves by a whole step
    assert relative_error(got, np.asarray(model(ids().numpy()))) < (3e-2 if active else 1e-4)
    if (made.parent / "dense").exists():
        assert relative_error(got, loaded(made.parent / "dense")[1]) < 1e-4


def test_gemma_is_that_of_transformers(float_llama, tmp_path):
    gemma(float_llama, tmp_path)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert not any(isinstance(m, JqLinear) for m in want.modules())
    with torch.no_grad(), jq_torch.enable():
        assert relative_error(loaded(tmp_path / "packed")[1], want(ids()).logits.numpy()) < 3e-2
