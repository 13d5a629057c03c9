"""Every reference directory through transformers: load, logits, save, reload, dequantize; a directory is a case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_dirs import array, bits, directories, oracle, raw, relative_error, stored
from transformers import AutoModelForCausalLM

import jq_torch
from jq_torch import sources
from jq_torch.packed import Packed

FOREIGN = ("bitsandbytes", "gptqmodel", "awq", "hqq", "optimum", "aqlm", "vptq", "eetq", "fbgemm_gpu")
FOREIGN += ("compressed_tensors", "torchao", "auto_round", "quark")


def _is_model(folder: Path) -> bool:
    """A directory that from_pretrained can open: a config of a model, and safetensors."""
    config = folder / "config.json"
    if not config.exists() or not any(f.suffix == ".safetensors" for f in stored_files(folder)):
        return False
    return "model_type" in json.loads(config.read_text())


def stored_files(folder: Path) -> list[Path]:
    return [f for f in folder.iterdir() if f.name not in ("reference.safetensors", "activations.safetensors")]


CASES = {name: folder for name, folder in directories().items() if _is_model(folder)}
cases = pytest.mark.parametrize("folder", list(CASES.values()), ids=list(CASES))
if not CASES:
    pytest.skip("no reference directories: set JAXQ_REFERENCE", allow_module_level=True)


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)


@cases
def test_nothing_is_missing_and_logits_are_the_librarys(folder: Path) -> None:
    tensors, _ = oracle(folder)
    runs = [("logits_f32", 1e-3, False)] if "logits_f32" in tensors else []
    if "logits" in tensors and (tensors["logits"].dtype == np.float32 or not runs):
        runs.append(("logits", 1e-3 if tensors["logits"].dtype == np.float32 else 2e-2, True))
    for key, limit, active in runs or [("", 0.0, True)]:
        with jq_torch.enable(quantize_activations=active):
            model, info = load(folder, dtype=torch.float32)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert any(isinstance(m, Packed) for m in model.modules())
        if key:
            ids = torch.from_numpy(tensors["input_ids"].astype(np.int64))
            with torch.no_grad():
                assert relative_error(model(ids).logits.numpy(), tensors[key]) < limit, key
    assert not [name for name in FOREIGN if name in sys.modules]


@cases
def test_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with jq_torch.enable():
        model, _ = load(folder)
        model.save_pretrained(saved, max_shard_size="100KB")
        (want, metadata), (got, written) = stored(folder), stored(saved)
        cast = ("norm.weight", "embed_tokens.weight", "lm_head.weight", ".bias")  # to the config's dtype
        wrong = [k for k in want if want[k] != got.get(k) and not (k.endswith(cast) and want[k][0] != got[k][0])]
        assert not wrong and got.keys() == want.keys(), (wrong[:4], sorted(got.keys() - want.keys())[:4])
        assert written == {**metadata, "format": "pt"}
        before, after = (json.loads((f / "config.json").read_text()) for f in (folder, saved))
        assert before.get("quantization_config") == after.get("quantization_config")
        assert before.get("compression_config") == after.get("compression_config")
        for file in sources.SIDE_FILES:
            assert (folder / file).exists() == (saved / file).exists()
            assert not (saved / file).exists() or (saved / file).read_bytes() == (folder / file).read_bytes()
        again, info = load(saved)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@cases
def test_dequantized_weights_are_the_librarys(folder: Path) -> None:
    tensors, _ = oracle(folder)
    with jq_torch.enable():
        model, _ = load(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (jq_torch.JqLinear, jq_torch.JqEmbedding))}
    for key, want in tensors.items():
        name = key.removeprefix("dequantized.").removesuffix(".weight")
        if key.startswith("dequantized.") and name in layers:
            dense = jq_torch.bridge.array_of(layers[name].dequantize())
            assert np.array_equal(bits(dense.astype(want.dtype)), bits(want)), name
    dense_model = model.dequantize()
    assert not any(isinstance(m, Packed) for m in dense_model.modules())
    assert not hasattr(dense_model.config, "quantization_config") and not hasattr(dense_model, "hf_quantizer")
    assert torch.isfinite(dense_model(torch.arange(3, 15)[None]).logits).all()


@pytest.mark.parametrize(
    "folder",
    [f for f in CASES.values() if (f / "activations.safetensors").exists()],
    ids=[n for n, f in CASES.items() if (f / "activations.safetensors").exists()],
)
def test_quantized_activations_are_the_librarys(folder: Path) -> None:
    acts = {k: array(v) for k, v in raw(folder / "activations.safetensors")[0].items()}
    with jq_torch.enable():
        model, _ = load(folder)
    for key, x in acts.items():
        if not key.endswith(".input"):
            continue
        name = key.removesuffix(".input")
        layer = model.get_submodule(name)
        with torch.no_grad():
            y = layer(jq_torch.bridge.tensor_of(x)[None])[0]
        want = acts[f"{name}.output"]
        limit = 2e-4 if want.dtype == np.float32 else 1e-3
        assert relative_error(jq_torch.bridge.array_of(y).astype(np.float32), want.reshape(y.shape)) < limit, name
