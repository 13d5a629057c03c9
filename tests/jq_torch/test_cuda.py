"""Models on a GPU: the kernels by default, CUDA graphs, mixed devices, the paths without a kernel."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import ids, same, tensors_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import jq
import jq_torch
from jq_torch import ops
from jq_torch.linear import JqLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """NF4 as bitsandbytes writes it, made on the CPU."""
    path = tmp_path_factory.mktemp("cuda")
    tiny.llama(tiny.SIZES, hidden_size=256, intermediate_size=512).save_pretrained(path / "float")
    with jq_torch.enable():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(path / "nf4")
    return path


def load(folder, device_map="cuda", **settings):
    with jq_torch.enable(**settings):
        return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model(ids().to(model.device)).logits.float().cpu()


def error(found, want):
    return ((found - want).norm() / want.norm()).item()


def kernels_of(model):
    layers = [m for m in model.modules() if isinstance(m, JqLinear)]
    return sum(ops.cuda_weight(*layer.operands(), torch.bfloat16) is not None for layer in layers), len(layers)


def test_kernels_are_the_default_and_right(folder):
    model = load(folder / "nf4")
    want = logits(load(folder / "nf4", "cpu"))
    assert error(logits(model), want) < 0.03
    assert kernels_of(model) == (14, 14)
    assert error(logits(load(folder / "nf4", kernels=False)), want) < 0.03


def test_saved_from_the_gpu_byte_for_byte(folder, tmp_path):
    model = load(folder / "nf4")
    logits(model)
    model.save_pretrained(tmp_path)
    want, got = tensors_of(folder / "nf4"), tensors_of(tmp_path)
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)


def test_a_packed_weight_is_held_once(folder):
    """In the kernels' order on the GPU, in its own elsewhere; a state dict of either place loads into both."""
    host, model = load(folder / "nf4", "cpu"), load(folder / "nf4")
    want, total = logits(host), sum(p.nbytes for p in host.parameters())
    found, before = logits(model), torch.cuda.memory_allocated()
    assert sum(p.nbytes for p in model.parameters()) == total
    assert any("q_mma16_codes" in n for n in model.state_dict())
    twin = copy.deepcopy(model)
    assert torch.cuda.memory_allocated() - before < 1.05 * total + 2**20
    assert torch.equal(logits(twin), found)
    moved = twin.to("cpu")
    assert torch.equal(logits(moved), want) and not any("mma16" in n for n in moved.state_dict())
    host.load_state_dict(model.state_dict())
    assert torch.equal(logits(host), want)
    model.load_state_dict(moved.state_dict())
    assert torch.equal(logits(model), found) and torch.equal(logits(host.to("cuda")), found)


def test_other_numbers_in_the_same_layer(folder):
    model, other = load(folder / "nf4"), load(folder / "nf4")
    want = logits(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name, parameter in other.named_parameters():
        if name.endswith("_codes"):
            parameter.data.zero_()
    assert error(logits(other), want) > 0.1
    other.load_state_dict(state)
    assert error(logits(other), want) < 1e-3
    assert error(logits(copy.deepcopy(other)), want) < 1e-3


def test_generation_in_a_cuda_graph(folder):
    """The compiled step replays a graph; it must compute what the eager model computes, token after token."""
    model = load(folder / "nf4")
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            tokens = torch.randint(3, 64, (1, 1), generator=torch.Generator().manual_seed(seed)).cuda()
            found = step(tokens, use_cache=False).logits.clone()
            assert error(found.float(), model(tokens, use_cache=False).logits.float()) < 0.03
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    assert model.generate(ids(batch=1).cuda(), **options).shape == (1, 18)
    torch.compiler.reset()


@pytest.mark.parametrize("first", [0, "cpu", "disk"])
def test_layers_on_several_devices(folder, tmp_path, first):
    """What `llm_int8_enable_fp32_cpu_offload` is for: every device may hold packed layers."""
    places = {"model.embed_tokens": 0, "model.layers.0": first, "model.layers.1": 0, "model.norm": 0, "lm_head": 0}
    places["model.rotary_emb"] = 0
    with jq_torch.enable():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "nf4", device_map=places, dtype=torch.bfloat16, offload_folder=tmp_path
        )
    assert error(logits(model), logits(load(folder / "nf4", "cpu"))) < 0.03


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("places", ["auto", {"": 1}])
def test_several_gpus(folder, places):
    """Layers on two GPUs, and a model on one that is not the current device."""
    room = {"max_memory": {0: 780_000, 1: 2**30}} if places == "auto" else {}  # of the model's 810 kB
    with jq_torch.enable():
        model = AutoModelForCausalLM.from_pretrained(folder / "nf4", device_map=places, dtype=torch.bfloat16, **room)
    assert torch.cuda.current_device() == 0  # XLA left another one
    assert {p.device.index for p in model.parameters()} == ({0, 1} if places == "auto" else {1})
    want = logits(load(folder / "nf4", "cpu"))
    for _ in range(2):  # the second call takes what the first prepared
        assert error(logits(model), want) < 0.03
    assert kernels_of(model) == (14, 14)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids(batch=1).to(model.device), **options).shape == (1, 16)
    model.save_pretrained(folder / f"again-{len(places)}")
    saved, first = (tensors_of(folder / name) for name in (f"again-{len(places)}", "nf4"))
    assert saved.keys() == first.keys() and all(same(saved[n], first[n]) for n in saved)


def test_quantized_on_the_gpu_while_loading(folder):
    with jq_torch.enable():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "float", quantization_config=config, dtype=torch.bfloat16, device_map="cuda"
        )
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert error(logits(model), logits(load(folder / "nf4", "cpu"))) < 0.03


@pytest.mark.parametrize("method", [jq.Int8(), jq.FP8(), jq.RTN(bits=3, group_size=64)], ids=["int8", "fp8", "rtn3"])
def test_without_a_kernel_jax_computes_on_the_gpu(method):
    import numpy as np

    weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32) * 0.05
    layer = JqLinear(512, 256)
    layer.put("q", method.quantize(weight))
    layer.use(quantize_activations=True, kernels=True)
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    want = layer(x)
    layer.to("cuda")
    assert kernels_of(layer) == (0, 1)
    found = layer(x.cuda())
    assert found.is_cuda and error(found.float().cpu(), want.float()) < 0.02


def test_a_chain_of_large_layers_without_a_kernel():
    """Each dequantized weight is XLA's memory, which its next program may take while torch still reads it."""
    import numpy as np

    layers, size = [], 4096
    for seed in range(4):
        weight = np.random.default_rng(seed).standard_normal((size, size), np.float32) * 0.02
        layer = JqLinear(size, size)
        layer.put("q", jq.RTN(bits=2, group_size=128).quantize(weight))
        layer.use(quantize_activations=True, kernels=True)
        layers.append(layer.to("cuda"))
        assert kernels_of(layer) == (0, 1)
    x = torch.randn(16384, size, device="cuda", dtype=torch.bfloat16)
    want = []
    with torch.no_grad():
        for layer in layers:
            want.append(layer(x))
            torch.cuda.synchronize()
        for _ in range(5):
            found = [layer(x) for layer in layers]
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_gradient_through_the_kernel(folder):
    model = load(folder / "nf4")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(2, 3, 512, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(g)
    assert error(x.grad.float(), g.float() @ layer.dequantize(torch.float32)) < 0.02


def test_dequantized_on_the_gpu(folder):
    model = load(folder / "nf4")
    want = logits(model)
    assert error(logits(model.dequantize()), want) < 0.03
