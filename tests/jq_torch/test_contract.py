"""transformers' contract on one small packed model: dtypes, devices, offload, compile, copies, sizes, clean-up."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import GPTQ, ids, same, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import jq_torch
from jq_torch import ops
from jq_torch.linear import JqLinear


@pytest.fixture(scope="module")
def folder(gptq_pair):
    return gptq_pair


@pytest.fixture
def model(folder, enabled):
    return AutoModelForCausalLM.from_pretrained(folder / "packed")


@pytest.fixture(scope="module")
def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "dense")


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def test_same_as_the_dense_twin(model, dense):
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() < 0.5 * dense.get_memory_footprint()
    assert model.is_quantized and model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
    assert model.generate(ids(batch=1), max_new_tokens=3, do_sample=False).equal(
        dense.generate(ids(batch=1), max_new_tokens=3, do_sample=False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
def test_dtypes(folder, enabled, dense, dtype, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    y = logits(model)
    assert y.dtype == wanted and model.dtype == wanted
    torch.testing.assert_close(y.float(), logits(dense), rtol=0.1, atol=0.02)
    model.save_pretrained(tmp_path)
    want, got = tensors_of(folder / "packed"), tensors_of(tmp_path)
    assert want.keys() == got.keys()
    assert all(same(want[n], got[n]) for n in want if "_proj" in n)


def test_casting_the_model_is_refused_and_never_touches_packed_bits(model):
    want = logits(model)
    for cast in (model.half, model.float, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match=r"cast|dtype"):
            cast()
    before = {n: p.clone() for n, p in model.named_parameters() if ".q_" in n}
    torch.nn.Module.to(model, torch.bfloat16)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    torch.nn.Module.to(model, torch.float32)
    torch.testing.assert_close(logits(model), want, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(folder, enabled, dense, device_map):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", device_map=device_map)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)


DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
DISK |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("buffers", [False, True])
def test_disk_offload(folder, enabled, dense, tmp_path, buffers):
    model = AutoModelForCausalLM.from_pretrained(
        folder / "packed", device_map=DISK, offload_folder=tmp_path / "off", offload_buffers=buffers
    )
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, JqLinear) and not layer.is_packed
    assert all(p.device.type == "meta" for p in layer.parameters())
    assert model.model.layers[0].mlp.up_proj.is_packed
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    want, got = tensors_of(folder / "packed"), tensors_of(tmp_path / "saved")
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want if "_proj" in n)


@pytest.mark.parametrize("room", ["packed", "half"])
def test_memory_is_estimated_by_packed_bytes(folder, enabled, dense, tmp_path, room):
    """ "auto" puts a packed model where the float one would not fit, and what does not fit on disk."""
    bytes_of = sum(t.nbytes for t in tensors_of(folder / "packed").values())
    limit = int(1.3 * bytes_of) if room == "packed" else bytes_of // 2
    assert limit < dense.get_memory_footprint()
    model = AutoModelForCausalLM.from_pretrained(
        folder / "packed", device_map="auto", max_memory={"cpu": limit}, offload_folder=tmp_path
    )
    assert ("disk" in getattr(model, "hf_device_map", {}).values()) == (room == "half")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    quantizer = model.hf_quantizer
    assert quantizer.adjust_max_memory({"cpu": limit}) == {"cpu": limit}
    assert quantizer.param_element_size(model, "lm_head.weight", model.lm_head.weight) == 4


def test_offloaded_eight_bit_layers_stay_packed(folder, enabled):
    """`llm_int8_enable_fp32_cpu_offload` keeps layers on the CPU in float where bitsandbytes does; here it needs not."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    made = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config, device_map=places)
    assert sum(isinstance(m, JqLinear) for m in made.modules()) == 14
    assert made.config.quantization_config.llm_int8_enable_fp32_cpu_offload
    want = logits(AutoModelForCausalLM.from_pretrained(folder / "float"))
    assert (logits(made) - want).norm() < 0.05 * want.norm()


def test_copies_and_pickles(model):
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("packed", [True, False])
def test_state_dict_goes_round(model, folder, packed):
    with jq_torch.enable(packed=packed):
        other = AutoModelForCausalLM.from_pretrained(folder / "packed")
    logits(other)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-7)


def test_dequantize_cleans_up(model, dense):
    plain = model.dequantize()
    for name in ("hf_quantizer", "quantization_method"):
        assert not hasattr(plain, name)
    assert not hasattr(plain.config, "quantization_config") and not plain.is_quantized
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    for name, parameter in dense.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name
    assert logits(plain.to(torch.float16)).dtype == torch.float16


def test_kept_dense_on_request(folder, dense):
    with jq_torch.enable(packed=False):
        model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-6)
    assert model.model.layers[0].mlp.up_proj._dense_cache is not None


def test_opcheck(model):
    layer = model.model.layers[0].mlp.up_proj
    packed, spec = layer.operands()
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    for bias in (None, torch.randn(layer.out_features, requires_grad=True)):
        found = torch.library.opcheck(torch.ops.jq.linear.default, (x, packed, spec, layer.out_features, bias))
        assert set(found.values()) == {"SUCCESS"}
    y = torch.randn(3, 5, layer.out_features)
    found = torch.library.opcheck(torch.ops.jq.linear_dx.default, (y, packed, spec, layer.in_features))
    assert set(found.values()) == {"SUCCESS"}


def test_gradient(model):
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    weight = torch.randn(2, 3, layer.out_features)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ layer.dequantize(torch.float32), rtol=1e-4, atol=1e-5)


def test_gradient_of_a_bias(model):
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    x, weight = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(layer.bias.grad, weight.sum((0, 1)))


def test_a_copy_of_a_compiled_layer_is_its_own(model):
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    layer.compile(backend="eager")
    x = torch.randn(2, layer.in_features)
    want, twin = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        twin.bias += 1
    torch.testing.assert_close(twin(x), want + 1)
    assert torch.equal(layer(x), want)


def test_odd_inputs(model):
    layer = model.model.layers[0].mlp.up_proj
    w = layer.dequantize(torch.float32)
    wide = torch.randn(7, 2 * layer.in_features)
    with torch.inference_mode():
        for x in (wide[:0, :64], wide[:, ::2], wide[0, :64], wide[:, :64][:, None, None]):
            torch.testing.assert_close(layer(x), x @ w.T, rtol=1e-4, atol=1e-5)


def test_on_the_meta_device_shapes_alone(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", device_map="meta")
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, model.config.vocab_size)


@pytest.mark.parametrize("kwargs", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_double_precision(folder, enabled, kwargs):
    """Of activations: torch casts no packed bits, and JAX has no float64."""
    config = BitsAndBytesConfig(**kwargs)
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    want = logits(model)
    model.double()
    x = ids()
    assert logits(model).dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), want, rtol=1e-3, atol=1e-4)
    assert model.model.layers[0].mlp.up_proj.dequantize(torch.float64).dtype == torch.float64
    embedded = model.get_input_embeddings()(x).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.dtype == torch.float64 and embedded.grad.isfinite().all()


def test_autocast_as_a_linear_layer(model):
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16


def test_whole_model_compiles_without_a_break(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()).logits, logits(model))


def test_static_cache_generation(model, dense):
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert model.generate(ids(batch=1), **options).equal(dense.generate(ids(batch=1), **options))


def test_export_keeps_the_operator(model):
    layer = model.model.layers[0].mlp.up_proj
    exported = torch.export.export(layer, (torch.randn(2, layer.in_features),))
    assert any("jq.linear" in str(node.target) for node in exported.graph.nodes)


def test_from_config_makes_a_float_model(folder, enabled):
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "packed"))
    assert not any(isinstance(m, JqLinear) for m in made.modules())


def test_layers_share_programs(model):
    specs = {m.operands()[1] for m in model.modules() if isinstance(m, JqLinear)}
    assert len(specs) == 1
    assert [ops.bucket(n) for n in (0, 1, 2, 3, 5, 64, 65, 4096, 4097)] == [1, 1, 2, 4, 8, 64, 128, 4096, 8192]


def test_config_is_kept_through_save(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == GPTQ


def test_memory_is_aligned_once(model):
    pointers = [p.data_ptr() % 64 for n, p in model.named_parameters() if ".q_" in n]
    assert pointers and not any(pointers)
