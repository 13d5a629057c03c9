"""torchao's FqnToConfig while loading: a config for each name or pattern, embeddings and tied layers included."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from tiny import SMALL, ids, llama, same, tensors_of
from transformers import AutoModelForCausalLM

import jq_torch
from jq.errors import UnsupportedError
from jq_torch.embedding import JqEmbedding
from jq_torch.linear import JqLinear


def _of(kind, **data):
    return {"_type": kind, "_data": data}


TABLE = _of("IntxWeightOnlyConfig", weight_dtype="int8", granularity=_of("PerAxis", axis=0))
INT4 = _of("IntxWeightOnlyConfig", weight_dtype="int4", granularity=_of("PerGroup", group_size=32))
DYNAMIC = _of(
    "Int8DynamicActivationIntxWeightConfig",
    weight_dtype="int4",
    weight_granularity=_of("PerGroup", group_size=32),
)
NAMES = {
    "model.embed_tokens": TABLE,
    "model.layers.0.self_attn.q_proj.weight": INT4,
    "model.layers.0.self_attn.v_proj": _of("Int8WeightOnlyConfig"),
    "re:.*\\.k_proj": None,
    "re:.*\\.layers\\.1\\..*_proj": INT4,
    "_default": DYNAMIC,
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("float")
    llama(SMALL, tie_word_embeddings=request.param).save_pretrained(path)
    return path, request.param


def config(names=NAMES, **options):
    return transformers.TorchAoConfig(_of("FqnToConfig", fqn_to_config=names), **options)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def bits(layer):
    return layer.qtensor().code_bits if isinstance(layer, JqLinear) else None


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("unties", [False, True])
def test_names_patterns_and_the_rest(folder, ends, unties, enabled, tmp_path):
    path, tied = folder
    flags = {"include_input_output_embeddings": ends, "untie_embedding_weights": unties}
    model, info = load(path, quantization_config=config(**flags), output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    first, second = (layer.self_attn for layer in model.model.layers)
    assert [bits(first.q_proj), bits(first.v_proj), bits(first.k_proj), bits(first.o_proj)] == [4, 8, None, 4]
    assert [bits(second.q_proj), bits(second.k_proj)] == [4, None]
    assert first.o_proj.qtensor().activation is not None and second.q_proj.qtensor().activation is None
    assert isinstance(model.model.embed_tokens, JqEmbedding) == (ends or not tied)  # transformers skips tied ends
    head = "own" if not isinstance(model.lm_head, JqLinear) else "packed" if model.lm_head.tied is None else "tied"
    assert head == ("own" if not ends or (tied and unties) else "tied" if tied else "packed")
    assert model.config.tie_word_embeddings == (tied and not (ends and unties))
    if head == "own":
        assert torch.equal(model.lm_head.weight, load(path).lm_head.weight)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    want, got = tensors_of(tmp_path), tensors_of(tmp_path / "again")
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)


def test_one_config_for_all_includes_the_output_layer(folder, enabled):
    """Embeddings stay float then, as torchao's filter takes linear layers alone."""
    path, tied = folder
    options = {"include_input_output_embeddings": True}
    model = load(path, quantization_config=transformers.TorchAoConfig("Int8WeightOnlyConfig", **options))
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert isinstance(model.lm_head, JqLinear) != tied


def test_options_of_a_name_are_looked_at(folder, enabled):
    with pytest.raises(UnsupportedError, match=r"knows .*granularity"):
        load(folder[0], quantization_config=config({"lm_head": _of("Int8WeightOnlyConfig", groupsize=3)}))


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("ends", [False, True])
def test_the_same_tensors_as_torchaos(folder, ends, tmp_path):
    path, tied = folder
    if tied and ends:
        pytest.skip("transformers 5.23 with torchao 0.18 raises NotImplementedError for a table that is tied")

    import torchao.quantization as ao
    from torchao.quantization.granularity import PerAxis, PerGroup

    int4 = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    configs = {
        "model.embed_tokens": ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        "model.layers.0.self_attn.q_proj.weight": int4,
        "model.layers.0.self_attn.v_proj": ao.Int8WeightOnlyConfig(),
        "re:.*\\.k_proj": None,
        "re:.*\\.layers\\.1\\..*_proj": int4,
        "_default": ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    }
    assert configs.keys() == NAMES.keys()
    theirs = ao.FqnToConfig(configs)
    options = {"include_input_output_embeddings": ends}
    load(path, quantization_config=transformers.TorchAoConfig(theirs, **options)).save_pretrained(tmp_path / "theirs")
    with jq_torch.enable():
        own = load(path, quantization_config=transformers.TorchAoConfig(theirs, **options))
        own.save_pretrained(tmp_path / "ours")
    want, got = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert want.keys() == got.keys()
    assert [name for name in want if not same(want[name], got[name])] == []
