"""Packed embeddings on an NVIDIA GPU, beside the same model on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from test_embeddings import save_twins
from tiny import ids, llama, same, tensors_of
from transformers import AutoModelForCausalLM

import jq_torch
from jq_torch import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = llama(SIZES, tie_word_embeddings=True).to(torch.bfloat16)
    return save_twins(model, tmp_path_factory.mktemp("tied"), ["model.embed_tokens"])


def load(folder, device_map="cuda", **settings):
    with jq_torch.enable(**settings):
        return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model(ids().to(model.device)).logits.float().cpu()


def error(found, want):
    return ((found - want).norm() / want.norm()).item()


def test_rows_and_a_tied_output_layer_in_the_kernels(folder, tmp_path):
    model, host = load(folder / "packed"), load(folder / "packed", "cpu")
    table = model.model.embed_tokens
    for numbers in (ids(), ids()[:1, :1], torch.empty(1, 0, dtype=torch.long)):
        assert torch.equal(table(numbers.cuda()).cpu(), host.model.embed_tokens(numbers))
    assert torch.isnan(table(torch.tensor([[64, -1]]).cuda())).all()
    assert ops.cuda_weight(*model.lm_head.operands(), torch.bfloat16) is not None
    assert error(logits(model), logits(host)) < 0.03
    model.save_pretrained(tmp_path)
    want, got = tensors_of(folder / "packed"), tensors_of(tmp_path)
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)


def test_moves_between_devices_keep_the_tie(folder):
    model = load(folder / "packed", "cpu")
    want = logits(model)
    assert error(logits(model.to("cuda")), want) < 0.03
    assert error(logits(copy.deepcopy(model)), want) < 0.03
    model.to("cpu")
    assert model.lm_head.q_codes is model.model.embed_tokens.q_codes
    assert torch.equal(logits(model), want)


def test_generation_with_cuda_graphs(folder):
    """torch.compile cuts its graphs at the look-up, which is XLA's."""
    model, host = load(folder / "packed"), load(folder / "packed", "cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    eager = model.generate(ids(batch=1).cuda(), **options)
    assert eager.shape == (1, 18)
    step = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            tokens = torch.randint(3, 64, (1, 1), generator=torch.Generator().manual_seed(seed))
            found = step(tokens.cuda(), use_cache=False).logits.clone()
            assert error(found.float().cpu(), host(tokens, use_cache=False).logits.float()) < 0.03
    torch.compiler.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_the_output_layer_on_another_gpu_than_its_table(folder, tmp_path):
    places = {"model.embed_tokens": 0, "model.layers": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    model = load(folder / "packed", places)
    assert model.lm_head._device().index == 1 and model.model.embed_tokens._device().index == 0
    assert error(logits(model), logits(load(folder / "packed", "cpu"))) < 0.03
    model.save_pretrained(tmp_path)
    want, got = tensors_of(folder / "packed"), tensors_of(tmp_path)
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)


def test_offloaded_beside_the_gpu(folder, tmp_path):
    names = ["model.layers", "model.norm", "model.rotary_emb", "model.embed_tokens", "lm_head"]
    want = logits(load(folder / "packed", "cpu"))
    for table, head in (("cpu", "cpu"), ("disk", "disk"), ("disk", 0), (0, "cpu"), (0, "disk")):
        places = dict.fromkeys(names, 0) | {"model.embed_tokens": table, "lm_head": head}
        with jq_torch.enable():
            model = AutoModelForCausalLM.from_pretrained(
                folder / "packed", device_map=places, dtype=torch.bfloat16, offload_folder=tmp_path / f"{table}{head}"
            )
        for _ in range(2):
            with torch.no_grad():
                found = model(ids().to(0)).logits.float().cpu()
            assert error(found, want) < 0.03, (table, head)
