"""Mixtures of experts: packed, loaded from per-expert files, saved back under the same names."""

from __future__ import annotations

import pytest
import torch
from tiny import GPTQ, ids, same, save_pair, tensors_of
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import jq_torch
from jq.errors import CheckpointError, FormatError
from jq_torch.experts import JqExperts

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def mixtral(**more):
    return MixtralForCausalLM(MixtralConfig(**(COMMON | {"intermediate_size": 128, "num_local_experts": 4} | more)))


def qwen(**more):
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(COMMON | sizes | more)))


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    torch.manual_seed(0)
    save_pair(FAMILIES[request.param](), tmp_path, lambda name: ".experts." in name)
    return tmp_path


def test_experts_stay_packed_and_compute_the_same(folder, enabled):
    model, info = AutoModelForCausalLM.from_pretrained(folder / "packed", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    experts = [m for m in model.modules() if isinstance(m, JqExperts)]
    assert len(experts) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-6)
    assert model.num_parameters() == dense.num_parameters()
    assert model.get_memory_footprint() < 0.5 * dense.get_memory_footprint()
    assert model.generate(ids(batch=1), max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_saved_under_the_files_names(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    model.save_pretrained(folder / "saved")
    want, got = tensors_of(folder / "packed"), tensors_of(folder / "saved")
    assert want.keys() == got.keys()
    assert all(same(want[name], got[name]) for name in want)


def test_dequantize_gives_the_models_own_experts(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed").dequantize()
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_gradient_reaches_the_input_through_packed_experts(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    found = []
    for m in (model, dense):
        embedded = m.get_input_embeddings()(ids()).detach().requires_grad_()
        m(inputs_embeds=embedded).logits.square().mean().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_compiles_without_a_break(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    with torch.no_grad():
        want = model(ids()).logits
        experts = next(m for m in model.modules() if isinstance(m, JqExperts))
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        x, index = torch.randn(6, 64), torch.randint(0, 4, (6, 2))
        weights = torch.rand(6, 2)
        torch.testing.assert_close(compiled(x, index, weights), experts(x, index, weights))
        assert torch.isfinite(want).all()


def test_opcheck(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    module = next(m for m in model.modules() if isinstance(m, JqExperts))
    packed, spec = module.operands("down_proj_0")
    n, k = module.shapes["down_proj"][1:]
    expert = torch.tensor([0, 3, 4, 1, 3])  # 4: an expert elsewhere
    x = torch.randn(5, k, requires_grad=True)
    for op, arguments in (
        (torch.ops.jq.experts.default, (x, expert, packed, spec, n)),
        (torch.ops.jq.experts_dx.default, (torch.randn(5, n), expert, packed, spec, k)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_multiply_experts(family, tmp_path, enabled):
    """On the GPU in the kernels' order, once; a decode step in a CUDA graph; saved byte for byte."""
    torch.manual_seed(0)
    wide = {"moe_intermediate_size": 256} if family == "qwen3_moe" else {}
    model = FAMILIES[family](hidden_size=256, intermediate_size=512, **wide)
    save_pair(model, tmp_path, lambda name: ".experts." in name)
    load = AutoModelForCausalLM.from_pretrained
    host, model = (load(tmp_path / "packed", dtype=torch.bfloat16, device_map=d) for d in ("cpu", "cuda"))
    experts = [m for m in model.modules() if isinstance(m, JqExperts)]
    assert all("mma16_codes" in " ".join(dict(m.named_parameters())) for m in experts)
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in host.parameters())
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for count in (1, 12, 40):
            tokens = ids(count)
            want, found = host(tokens).logits.float(), model(tokens.cuda()).logits.float().cpu()
            assert (found - want).norm() < 0.03 * want.norm()
        for seed in range(4):
            tokens = torch.randint(3, 64, (1, 1), generator=torch.Generator().manual_seed(seed))
            found = step(tokens.cuda(), use_cache=False).logits.float().cpu()
            want = host(tokens).logits.float()
            assert (found - want).norm() < 0.03 * want.norm()
    torch.compiler.reset()
    model.save_pretrained(tmp_path / "saved")
    want, got = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "saved")
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want if ".experts." in n)


def test_a_missing_expert_is_named(folder, enabled):
    from safetensors.torch import save_file

    tensors = tensors_of(folder / "packed")
    gone = {n: t for n, t in tensors.items() if ".experts.2." not in n}
    save_file(gone, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((FormatError, CheckpointError), match=r"experts.*\[2\]"):
        AutoModelForCausalLM.from_pretrained(folder / "packed")


def test_config_is_kept(folder, enabled):
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert model.config.quantization_config.to_dict() == GPTQ


def test_quantized_while_loading(folder, enabled):
    import jq

    config = enabled.JqConfig(jq.RTN(group_size=32), skip=["lm_head", "gate", "self_attn"])
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(isinstance(m, JqExperts) for m in model.modules()) == 2
    with torch.no_grad():
        want = model(ids()).logits
    model.save_pretrained(folder / "made")
    names = tensors_of(folder / "made").keys()
    assert any(".experts.3." in name and name.endswith(".qweight") for name in names)
    again = AutoModelForCausalLM.from_pretrained(folder / "made")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, want)
    dense = AutoModelForCausalLM.from_pretrained(folder / "float")
    assert model.num_parameters() == dense.num_parameters()


def fused_scales(model, folder):
    """As transformers 5.23 saves experts that it quantized to FP8: weights one by one, scales [E, ., .] of fused ones.

    Beside the router, which is not quantized, lies a scale that means nothing. `folder/dense` has the same numbers.
    """
    import json

    from safetensors.torch import save_file

    model.save_pretrained(folder / "float")
    tensors, dense = tensors_of(folder / "float"), {}
    scales: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    halves = {"gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    halves |= {"w3": ("gate_up_proj", 1), "down_proj": ("down_proj", 0), "w2": ("down_proj", 0)}
    for name, value in list(tensors.items()):
        if ".experts." not in name:
            continue
        stem, expert, leaf = name.removesuffix(".weight").rsplit(".", 2)
        fused, half = halves[leaf]
        n, k = value.shape
        blocks = value.reshape(n // 32, 32, k // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.reshape(n, k)
        dense[name] = (codes.float() * scale[:, None, :, None]).reshape(n, k)
        scales.setdefault(f"{stem}.{fused}_scale_inv", {})[int(expert), half] = scale
    for name, parts in scales.items():
        count = 1 + max(e for e, _ in parts)
        rows = [torch.cat([s for (i, _), s in sorted(parts.items()) if i == e]) for e in range(count)]
        tensors[name] = torch.stack(rows)
    router = next(n for n in tensors if n.endswith(".gate.weight"))
    tensors[f"{router}_scale_inv"] = torch.full((1, 2), float("nan"))
    (folder / "packed").mkdir()
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, folder / "packed" / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "float" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["self_attn", "gate", "lm_head"],
    }
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    del config["quantization_config"]
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    dense = {**tensors_of(folder / "float"), **dense}
    save_file({n: t.contiguous() for n, t in dense.items()}, folder / "dense" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_experts_that_share_stored_scales(family, tmp_path):
    torch.manual_seed(0)
    fused_scales(FAMILIES[family](), tmp_path)
    with jq_torch.enable(quantize_activations=False):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", dtype=torch.float32, output_loading_info=True
        )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, plain(ids()).logits, rtol=1e-4, atol=1e-6)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    want, got = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "saved")
    assert want.keys() == got.keys()
    packed = [n for n in want if ".experts." in n]
    assert len(packed) == 28 and all(same(want[n], got[n]) for n in packed)


@pytest.mark.parametrize("container", ["mlp", "block_sparse_moe"])
def test_mixtral_under_the_names_of_other_mixtures(container, tmp_path, enabled):
    """GPT-QModel and AutoRound take Mixtral apart into modules with the names of most families, and save these."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_pair(mixtral(), tmp_path, lambda name: ".experts." in name)
    names = {"block_sparse_moe": container, ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    renamed = {}
    for name, value in tensors_of(tmp_path / "packed").items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    save_file(renamed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    got = tensors_of(tmp_path / "saved")
    assert got.keys() == renamed.keys() and all(same(renamed[n], got[n]) for n in renamed)
