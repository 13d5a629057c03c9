"""peft on packed layers: train, save, reload, merge; the base never moves."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import jq
import jq_torch
from jq.errors import UnsupportedError
from jq_torch.linear import JqLinear

peft = pytest.importorskip("peft", reason="LoRA tests need peft")

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


@pytest.fixture(scope="module")
def folder(gptq_pair):
    return gptq_pair


def load(folder, kind="packed", **options):
    with jq_torch.enable():
        return AutoModelForCausalLM.from_pretrained(folder / kind, **options)


def adapted(folder, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(load(folder), peft.LoraConfig(**{"target_modules": "all-linear", **LORA, **options}))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def test_all_linear_finds_packed_layers_and_training_lowers_the_loss(folder):
    model = adapted(folder, init_lora_weights=True)
    layers = [m for m in model.modules() if isinstance(m, JqLinear)]
    assert len(layers) == 14
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if "lora_" not in n})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_gradients_equal_those_on_the_dense_base(folder):
    packed = adapted(folder)
    torch.manual_seed(1)
    dense = peft.get_peft_model(load(folder, "dense"), peft.LoraConfig(target_modules="all-linear", **LORA))
    for model in (packed, dense):
        model(ids(), labels=ids()).loss.backward()
    other = dict(dense.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=2e-3, atol=1e-6)


def test_adapter_is_saved_and_loaded(folder, tmp_path):
    model = adapted(folder)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(folder), tmp_path)), want)
    plain = load(folder)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), want)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(folder, safe):
    model = adapted(folder)
    want = logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert sum(isinstance(m, JqLinear) for m in model.modules()) == 14
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), want, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, JqLinear) for m in merged.modules())


def test_dora_reads_the_dequantized_weight(folder):
    model = adapted(folder, use_dora=True)
    want = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-3, atol=1e-4)


TUNERS = {
    "OFTConfig": {"r": 0, "oft_block_size": 8},
    "VeraConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "AdaLoraConfig": {"r": 4, "total_step": 10},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": []},
    "FourierFTConfig": {"n_frequency": 10},
    "RandLoraConfig": {"r": 4},
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_other_tuners_merge(folder, tuner):
    torch.manual_seed(2)
    model = peft.get_peft_model(load(folder), getattr(peft, tuner)(target_modules=["q_proj"], **TUNERS[tuner])).eval()
    base = logits(load(folder))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    want = logits(model)
    assert (want - base).abs().max() > 1e-5
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want) and any(isinstance(m, JqLinear) for m in model.modules())
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tuner", ["LoraConfig", *TUNERS])
def test_a_merge_keeps_the_dtype_of_the_model(folder, tuner):
    """Adapters stay in float32 beside a bfloat16 base: what peft makes of the dense model is the measure."""
    options, made = {"LoraConfig": LORA, **TUNERS}[tuner], {}
    for kind in ("packed", "dense"):
        base = load(folder, kind, dtype=torch.bfloat16)
        model = peft.get_peft_model(base, getattr(peft, tuner)(target_modules=["q_proj"], **options)).eval()
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # AdaLoRA's count of ranks
                torch.nn.init.normal_(parameter, std=0.2)
        model.merge_adapter()
        while_merged = logits(model)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        dtypes = {name: p.dtype for name, p in merged.named_parameters() if "q_proj" in name}
        made[kind] = while_merged, logits(merged), dtypes
    (first, second, dtypes), (first_dense, second_dense, dense) = made["packed"], made["dense"]
    assert dtypes == dense and set(dtypes.values()) == {torch.bfloat16}
    for got, want in ((first, first_dense), (second, second_dense)):
        assert got.dtype == want.dtype == torch.bfloat16
        assert (got - want).float().norm() <= 0.02 * want.float().norm()


def test_the_dtype_of_a_merge_follows_the_model(folder):
    model = adapted(folder, target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert layer.float_dtype == torch.float32
    layer._apply(lambda tensor: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    assert layer.float_dtype == torch.bfloat16


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "corda"])
def test_starts_that_change_the_base_are_refused(folder, start):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    with pytest.raises(UnsupportedError, match="writes into the base weight"):
        peft.get_peft_model(load(folder), config)


def test_preparation_for_kbit_training_keeps_the_packed_bits(folder):
    model = load(folder)
    want = logits(model)
    before = {n: p.clone() for n, p in model.named_parameters() if ".q_" in n}
    prepared = peft.prepare_model_for_kbit_training(model)
    after = dict(prepared.named_parameters())
    assert before and all(after[n].dtype == p.dtype and torch.equal(after[n], p) for n, p in before.items())
    assert torch.equal(logits(prepared), want)
    prepared.gradient_checkpointing_enable()
    prepared.enable_input_require_grads()
    trained = peft.get_peft_model(prepared, peft.LoraConfig(target_modules=["q_proj"], **LORA)).train()
    trained(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_trainer_refuses_the_bare_base_and_trains_adapters(folder, tmp_path):
    options = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=2, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in ids()]
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=load(folder), args=options, train_dataset=data)
    assert Trainer(model=adapted(folder), args=options, train_dataset=data).train().training_loss > 0


def test_a_merged_model_is_saved_dense_and_loads_again(folder, tmp_path):
    merged = adapted(folder, target_modules=["q_proj"]).merge_and_unload()
    want = logits(merged)
    merged.save_pretrained(tmp_path)
    with jq_torch.enable():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(m, JqLinear) for m in again.modules()) == 12
    assert torch.equal(logits(again), want)


def test_quantized_while_loading_then_trained(folder):
    with jq_torch.enable():
        config = jq_torch.JqConfig(jq.RTN(group_size=32))
        base = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["v_proj"], **LORA))
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
