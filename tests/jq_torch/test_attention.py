"""Rotated and rounded queries, keys and values behind transformers: the library's bits, and `jq.load`'s logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models.tiny import CACHES, random_ids, with_cache
from reference_dirs import array, bits, raw

import jq
import jq_torch
from jq.formats.compressed_tensors_attention import Attentions
from jq_torch import attention, bridge

FILES = sorted((Path(__file__).parents[1] / "recorded" / "attention").glob("*.safetensors"))


def array_of(tensor) -> np.ndarray:
    """Numpy has no bfloat16 of torch's: a view of the bytes."""
    return (
        tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
    )


def load(folder: Path, **options):
    with jq_torch.enable(**options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, ids: np.ndarray, **options) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **options).logits.numpy()


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_does_what_the_library_does(file: Path) -> None:
    tensors, meta = raw(file)
    arrays = {name: array(entry) for name, entry in tensors.items()}
    own = {name: a for name, a in arrays.items() if name.startswith("m.")}
    config = {"quantization_config": json.loads(meta["config"])}
    inside, turning = Attentions(own, config, quantize=True, cache=True, label="here").layer("m")
    module = torch.nn.Module()
    for name in own:
        if name.count(".") == 1:
            module.register_buffer(name[2:], bridge.tensor_of(arrays[name]))
    changes = attention.Changes(inside, inside.cache, turning, None, 0)
    q, k, v = (bridge.tensor_of(arrays[w]) for w in "qkv")
    got = changes.queries(module, q), *changes.keys_and_values(module, k, v)
    for which, value in zip("qkv", got, strict=True):
        assert np.array_equal(bits(arrays[f"{which}.out"]), bits(array_of(value))), which


@pytest.mark.parametrize("scheme", CACHES)
def test_models_compute_what_jq_computes(tmp_path: Path, scheme: str) -> None:
    folder = with_cache(tmp_path, CACHES[scheme])
    model, mine = load(folder), jq.load(folder)
    ids = random_ids((3, 44))  # this and the prompts below: shapes that tests/models/test_kv_cache.py compiles, too
    want = np.asarray(mine(ids))
    np.testing.assert_allclose(logits(model, ids), want, atol=2e-4)
    np.testing.assert_array_equal(logits(model, ids), logits(model, ids, use_cache=False))
    assert np.abs(logits(load(folder, quantize_activations=False), ids) - want).max() > 1e-3
    prompts = ids[:, :21]
    for cache in ("dynamic", "static"):
        got = model.generate(
            torch.tensor(prompts, dtype=torch.long),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=[],
            cache_implementation=cache,
        )
        np.testing.assert_array_equal(got.numpy(), mine.generate(prompts, 9, do_sample=False, eos_token_id=-1))
    model.save_pretrained(tmp_path / "again")
    first, second = (jq.load_state(f) for f in (folder, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(np.array_equal(np.asarray(first[n]), np.asarray(second[n])) for n in first)


def queries_too(folder: Path) -> Path:
    """Turned queries and keys, both rounded, and values."""
    args = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16, "dynamic": True}
    turn = [{"targets": ["re:.*self_attn$"], "location": where} for where in ("q_attn", "k_cache")]

    def change(config):
        config["config_groups"] = {"a": {"targets": ["LlamaAttention"], "input_activations": args}}
        config["transform_config"] = {"config_groups": {"R3": {"type": "hadamard", "head_dim": 32, "apply": turn}}}
        config["kv_cache_scheme"] = None

    with_cache(folder, CACHES["fp8-groups"])
    edit(folder, change)
    return folder


def test_queries(tmp_path: Path) -> None:
    folder = queries_too(tmp_path)
    model, ids = load(folder), random_ids((2, 21))
    want = np.asarray(jq.load(folder)(ids))
    assert model.config._attn_implementation == "sdpa"
    np.testing.assert_allclose(logits(model, ids), want, atol=2e-4)
    turned = load(folder, quantize_activations=False)  # the same numbers without rounding, but for what turning rounds
    edit(folder, lambda config: config.update(transform_config=None, config_groups={}))
    np.testing.assert_allclose(logits(turned, ids), np.asarray(jq.load(folder)(ids)), atol=2e-4)


def test_base_models(tmp_path: Path) -> None:
    """Without the head, modules have other names than in the file."""
    for scheme in ("int8-asym-head", "mxfp4"):
        folder = with_cache(tmp_path / scheme, CACHES[scheme])
        ids = torch.tensor(random_ids((2, 9)), dtype=torch.long)
        with jq_torch.enable(), torch.no_grad():
            base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            want = load(folder).model(ids).last_hidden_state
            assert torch.equal(base(ids).last_hidden_state, want)
            base.save_pretrained(tmp_path / "base")
            again = transformers.AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
            assert torch.equal(again(ids).last_hidden_state, want)


def test_other_attention_functions_copies_and_pickles(tmp_path: Path) -> None:
    model, ids = load(queries_too(tmp_path / "m")), random_ids((1, 9))
    want = logits(model, ids)
    model.set_attn_implementation("eager")
    np.testing.assert_allclose(logits(model, ids), want, atol=1e-4)
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "eager"
    np.testing.assert_allclose(logits(other, ids), want, atol=1e-4)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    np.testing.assert_allclose(logits(again, ids), want, atol=1e-4)
    with torch.no_grad():  # only the eager function gives weights
        weights = model(torch.tensor(ids, dtype=torch.long), output_attentions=True).attentions
    assert len(weights) == 2 and weights[0] is not None


def test_adapters_before_the_cache_learn(tmp_path: Path) -> None:
    model = load(with_cache(tmp_path, CACHES["int4"]))
    embeddings = model.get_input_embeddings()(torch.tensor(random_ids((1, 9)), dtype=torch.long)).detach()
    embeddings.requires_grad_(True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    k_proj = model.model.layers[0].self_attn.k_proj
    assert float(k_proj.weight.grad.abs().sum()) > 0


def test_is_one_graph(tmp_path: Path) -> None:
    model, ids = load(queries_too(tmp_path)), random_ids((1, 9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    np.testing.assert_allclose(logits(compiled, ids, use_cache=False), logits(model, ids), atol=1e-5)


def test_what_is_missing_or_not_done_is_said(tmp_path: Path, caplog) -> None:
    folder = with_cache(tmp_path / "a", CACHES["int4"])
    edit(folder, lambda config: config["kv_cache_scheme"].update(num_bits=4, symmetric=False))
    with pytest.raises(jq.errors.FormatError, match=r"self_attn.k_zero_point: missing; the config asks for int4"):
        load(folder)
    edit(folder, lambda config: config["kv_cache_scheme"].update(strategy="token", dynamic=True))
    with caplog.at_level("WARNING", logger="transformers"):
        transformers.utils.logging.enable_propagation()
        try:
            model = load(folder)
        finally:
            transformers.utils.logging.disable_propagation()
    assert "scale depends on all tokens of a call" in caplog.text and "cache stays float" in caplog.text
    edit(folder, lambda config: config.update(kv_cache_scheme=None))
    ids = random_ids((1, 9))
    np.testing.assert_array_equal(logits(model, ids), logits(load(folder), ids))


@pytest.mark.parametrize("algo, said", [("NVFP4", "kv_cache_quant_algo 'NVFP4' is not done here"), ("FP8", "")])
def test_modelopt(tmp_path: Path, caplog, algo: str, said: str) -> None:
    folder = with_cache(tmp_path, CACHES["fp8"])

    def change(config):
        config.clear()
        config.update(quant_method="modelopt", kv_cache_quant_algo=algo)

    edit(folder, change)
    with caplog.at_level("WARNING", logger="transformers"):
        transformers.utils.logging.enable_propagation()
        try:
            model = load(folder)
        finally:
            transformers.utils.logging.disable_propagation()
    assert (said in caplog.text) if said else "stay float" not in caplog.text
    mine = jq.load(folder, kv_cache=None if algo == "FP8" else "float32")
    np.testing.assert_allclose(logits(model, random_ids((2, 9))), np.asarray(mine(random_ids((2, 9)))), atol=2e-4)
