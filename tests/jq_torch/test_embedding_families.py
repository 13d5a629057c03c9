"""Packed embeddings of families that scale them, share them or tie more than weights: Gemma, T5, BERT."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from test_embeddings import GROUPS, INT8, agree, load, logits, pack_int8, save_twins, saved_as_it_was
from tiny import SMALL, ids, tensors_of

import jq
import jq_torch
from jq.models.decoder import _scaled
from jq_torch import bridge
from jq_torch.embedding import JqEmbedding
from jq_torch.linear import JqLinear


def gemma3():
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, head_dim=32, tie_word_embeddings=True))


def test_a_scaled_table_keeps_its_scale(enabled, tmp_path):
    """Gemma's class multiplies the rows; it stays what the module is, also pickled and dequantized."""
    folder = save_twins(gemma3(), tmp_path, ["model.embed_tokens"])
    model, dense = load(folder / "packed"), load(folder / "dense")
    table = model.model.embed_tokens
    assert isinstance(table, JqEmbedding) and isinstance(table, type(dense.model.embed_tokens))
    assert torch.equal(table(ids()), dense.model.embed_tokens(ids()))
    agree(model, dense)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin(ids()), table(ids())) and type(twin) is type(table)
    half = load(folder / "packed", dtype=torch.bfloat16)
    assert torch.equal(
        half.model.embed_tokens(ids()), load(folder / "dense", dtype=torch.bfloat16).model.embed_tokens(ids())
    )
    saved_as_it_was(model, folder / "packed", tmp_path / "saved")
    plain = model.dequantize()
    assert type(plain.model.embed_tokens) is type(dense.model.embed_tokens)
    torch.testing.assert_close(logits(plain), logits(dense))


def test_a_table_that_three_modules_share(enabled, tmp_path):
    torch.manual_seed(0)
    config = hf.T5Config(d_model=64, d_ff=128, d_kv=32, num_layers=1, num_heads=2, vocab_size=64)
    groups = {"g": {**GROUPS["embedding"], "targets": ["re:.*shared$"]}}
    folder = save_twins(
        hf.T5ForConditionalGeneration(config), tmp_path, ["shared"], config=INT8 | {"config_groups": groups}
    )
    model, dense = (hf.AutoModelForSeq2SeqLM.from_pretrained(folder / kind) for kind in ("packed", "dense"))
    tables = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens]
    assert all(isinstance(table, JqEmbedding) and table.q_codes is model.shared.q_codes for table in tables)
    assert model.lm_head.q_codes is model.shared.q_codes
    with torch.no_grad():
        found, want = (m(input_ids=ids(), decoder_input_ids=ids()[:, :5]).logits for m in (model, dense))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert model.num_parameters() == dense.num_parameters()
    saved_as_it_was(model, folder / "packed", tmp_path / "saved")


@pytest.mark.parametrize("own", ["lm_head", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_one_of_the_layers_that_share_a_table_has_its_own(own, enabled, tmp_path):
    torch.manual_seed(0)
    config = hf.T5Config(d_model=64, d_ff=128, d_kv=32, num_layers=1, num_heads=2, vocab_size=64)
    groups = {"g": {**GROUPS["embedding"], "targets": ["re:.*shared$"]}}
    folder = save_twins(
        hf.T5ForConditionalGeneration(config), tmp_path, ["shared"], config=INT8 | {"config_groups": groups}
    )
    tensors = tensors_of(folder / "packed")
    tensors[f"{own}.weight"] = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    save_file(tensors, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(folder / "packed")
    for path in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens"):
        layer = model.get_submodule(path)
        assert (getattr(layer, "tied", None) is model.shared) == (path != own), path
    assert torch.equal(model.get_submodule(own).weight, tensors[f"{own}.weight"])
    want = logits(model, decoder_input_ids=ids()[:, :5])
    again = hf.AutoModelForSeq2SeqLM.from_pretrained(saved_as_it_was(model, folder / "packed", tmp_path / "saved"))
    assert torch.equal(logits(again, decoder_input_ids=ids()[:, :5]), want)
    plain = model.dequantize()
    assert torch.equal(plain.get_submodule(own).weight, tensors[f"{own}.weight"])


def test_a_packed_output_layer_keeps_a_bias_that_is_tied(enabled, tmp_path):
    """BERT's decoder has the bias of the module around it, which is not a weight to be untied."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=64, max_position_embeddings=64))
    torch.nn.init.normal_(model.cls.predictions.bias)
    groups = {"g": {**GROUPS["embedding"], "targets": ["re:.*decoder$"]}}
    folder = save_twins(model, tmp_path, [], config=INT8 | {"config_groups": groups})
    parts, _ = pack_int8(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))
    tensors = tensors_of(folder / "packed") | {f"cls.predictions.decoder.{p}": t for p, t in parts.items()}
    save_file(tensors, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    packed = hf.AutoModelForMaskedLM.from_pretrained(folder / "packed").cls.predictions
    assert isinstance(packed.decoder, JqLinear)
    assert packed.decoder.bias is packed.bias and torch.equal(packed.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_own_tables_as_transformers_computes_them(dtype, tmp_path):
    """The factor is not rounded to the rows' dtype there: 96 ** 0.5 is no bfloat16. In JAX too."""
    pytest.importorskip("transformers.integrations.gemma_quant", reason="transformers has no gemma_quant")
    sizes = SMALL | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    torch.manual_seed(0)
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, head_dim=32, tie_word_embeddings=False)).to(dtype)
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, weight in tensors_of(tmp_path).items():
        module = name.removesuffix(".weight")
        if "_proj" in name:
            parts, _ = pack_int8(weight.float())
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            tensors |= {f"{module}.{side}_activation_scale": torch.zeros(()) for side in ("input", "output")}
        elif "embed_tokens" in name:
            parts, _ = pack_int8(weight.float())
            tensors[f"{module}.embedding_quantized"] = parts["weight"]
            tensors[f"{module}.embedding_scale"] = parts["weight_scale"]
        else:
            tensors[name] = weight
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gemma", "num_bits": 8, "quantize_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = load(tmp_path, dtype=dtype)
    assert type(theirs.model.embed_tokens).__name__ == "QuantizedEmbedding"
    with jq_torch.enable():
        ours = load(tmp_path, dtype=dtype)
    table = ours.model.embed_tokens
    for one in (table, pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert torch.equal(one(ids()), theirs.model.embed_tokens(ids()))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    rows = jq.load(tmp_path, dtype=str(dtype).removeprefix("torch.")).model.embed_tokens
    scaled = _scaled(rows(ids().numpy()), 96**0.5, wide=rows.scale_in_float32)
    assert torch.equal(bridge.tensor_of(scaled), theirs.model.embed_tokens(ids()))
    assert type(ours.dequantize().model.embed_tokens).__name__ == "Gemma3TextScaledWordEmbedding"
