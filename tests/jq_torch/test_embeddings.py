"""Packed embeddings: rows, tied output layers, scaled tables, saving, devices, adapters."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import GPTQ, GROUP, SMALL, ids, llama, pack_gptq, same, tensors_of
from transformers import AutoModelForCausalLM

import jq
import jq_torch
from jq.errors import FormatError, UnsupportedError
from jq.models.decoder import _scaled
from jq_torch import bridge
from jq_torch.embedding import JqEmbedding
from jq_torch.linear import JqLinear

GROUPS = {"embedding": {"targets": ["Embedding"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}
INT8 = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": GROUPS, "ignore": []}


def pack_int8(weight):
    """int8 by row, as compressed-tensors stores it: the stored tensors and the dense weight that they mean."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
    codes = torch.round(weight / scale).clamp(-127, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def save_twins(model, folder, tables, *, config=INT8):
    """`folder/packed` with the named tables packed, `folder/dense` with the same numbers as floats."""
    model.save_pretrained(folder / "float")
    packed = load_file(folder / "float" / "model.safetensors")
    dense = dict(packed)
    for name in tables:
        parts, dense[f"{name}.weight"] = pack_int8(packed.pop(f"{name}.weight").float())
        packed |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    plain = json.loads((folder / "float" / "config.json").read_text())
    for kind, tensors, extra in (("packed", packed, {"quantization_config": config}), ("dense", dense, {})):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(plain | extra))
    return folder


def gemma3():
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, head_dim=32, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A Llama whose output layer is its packed embedding."""
    return save_twins(llama(SMALL, tie_word_embeddings=True), tmp_path_factory.mktemp("tied"), ["model.embed_tokens"])


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_twins(llama(SMALL), tmp_path_factory.mktemp("untied"), ["model.embed_tokens"])


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=ids(), **inputs).logits


def agree(packed, dense):
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-5)


def saved_as_it_was(model, folder, out):
    model.save_pretrained(out)
    want, got = tensors_of(folder), tensors_of(out)
    assert want.keys() == got.keys() and all(same(want[n], got[n]) for n in want)
    return out


def test_rows_are_those_of_the_table(untied, enabled):
    model, dense = load(untied / "packed"), load(untied / "dense")
    table, want = model.model.embed_tokens, dense.model.embed_tokens
    assert type(table) is JqEmbedding and isinstance(table, torch.nn.Embedding)
    assert type(model.lm_head) is torch.nn.Linear
    for numbers in (ids(), ids()[0], ids()[:, :1], torch.tensor(5), torch.empty(2, 0, dtype=torch.long), ids().int()):
        assert torch.equal(table(numbers), want(numbers))
    assert torch.equal(table.weight, want.weight) and table.weight.dtype == want.weight.dtype
    assert torch.equal(logits(model), logits(dense))
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    for wrong in (64, -1):
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor([[1, wrong]]))
    assert table(torch.ones(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 64)
    saved_as_it_was(model, untied / "packed", untied / "again")


def test_a_look_at_the_dtype_dequantizes_nothing(untied, enabled, monkeypatch):
    model = load(untied / "packed")
    made = []
    original = JqEmbedding.dequantize
    monkeypatch.setattr(JqEmbedding, "dequantize", lambda self, dtype=None: made.append(1) or original(self, dtype))
    weight = model.model.embed_tokens.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((64, 64), torch.float32, "cpu") and not made
    assert torch.equal(weight[3], torch.from_numpy(weight.numpy()[3])) and made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_come_in_the_models_dtype(untied, enabled, dtype):
    want = load(untied / "dense").model.embed_tokens.weight[ids()].to(dtype)
    asked, moved = load(untied / "packed", dtype=dtype), load(untied / "packed").to(dtype)
    for model in (asked, moved):
        assert model.model.embed_tokens(ids()).dtype == dtype
        assert torch.equal(model.model.embed_tokens(ids()), want)
        assert logits(model).dtype == dtype


def test_a_tied_output_layer_computes_with_the_table(tied, enabled, tmp_path):
    model, dense = load(tied / "packed"), load(tied / "dense")
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, JqLinear) and head.q_codes is table.q_codes
    agree(model, dense)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.config.tie_word_embeddings
    model.tie_weights()
    agree(model, dense)
    agree(load(saved_as_it_was(model, tied / "packed", tmp_path / "saved")), dense)
    plain = model.dequantize()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(dense))
    plain.save_pretrained(tmp_path / "plain")
    assert "lm_head.weight" not in tensors_of(tmp_path / "plain")


def test_copies_stay_tied(tied, enabled):
    model, want = load(tied / "packed"), logits(load(tied / "dense"))
    twin = copy.deepcopy(model)
    assert twin.lm_head.q_codes is twin.model.embed_tokens.q_codes is not model.lm_head.q_codes
    assert twin.lm_head.tied is twin.model.embed_tokens
    torch.testing.assert_close(logits(twin), want, rtol=1e-4, atol=1e-5)
    table = pickle.loads(pickle.dumps(model.model.embed_tokens))
    assert torch.equal(table(ids()), model.model.embed_tokens(ids()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(state)
    torch.testing.assert_close(logits(twin), want, rtol=1e-4, atol=1e-5)


def test_an_output_layer_of_its_own_is_not_tied(tied, enabled, tmp_path):
    """The config calls it tied, the file has it: the file is right, before and after saving."""
    tensors = tensors_of(tied / "packed")
    tensors["lm_head.weight"] = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tied / "packed" / "config.json").read_text())
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


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


PLACES = {
    "table on disk": {"model.embed_tokens": "disk", "": "cpu"},
    "head on disk": {"lm_head": "disk", "": "cpu"},
    "both on disk": {"model.embed_tokens": "disk", "lm_head": "disk", "": "cpu"},
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_on_disk(kind, places, request, enabled, tmp_path):
    folder = request.getfixturevalue(kind)
    names = ["model.layers", "model.norm", "model.rotary_emb", "model.embed_tokens", "lm_head"]
    device_map = {name: places.get(name, "cpu") for name in names}
    model = load(folder / "packed", device_map=device_map, offload_folder=tmp_path / "off")
    for _ in range(2):
        agree(model, load(folder / "dense"))
    saved_as_it_was(model, folder / "packed", tmp_path / "saved")
    torch.testing.assert_close(logits(model.dequantize()), logits(load(folder / "dense")))


def test_a_dense_copy_where_asked(tied, enabled):
    enabled.disable()
    with enabled.enable(packed=False):
        model = load(tied / "packed")
    agree(model, load(tied / "dense"))
    assert model.model.embed_tokens._dense_cache is not None


def test_compiled_and_traced(tied, enabled):
    model = load(tied / "packed")
    table = model.model.embed_tokens
    packed, spec = table.operands()
    arguments = (ids(), packed, spec, 64, 64, torch.bfloat16)
    assert set(torch.library.opcheck(torch.ops.jq.embedding.default, arguments).values()) == {"SUCCESS"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()).logits, logits(model))
    torch.compiler.reset()
    found = model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, load(tied / "dense").generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_groups_across_rows_are_said_to_be_slow(enabled, tmp_path, caplog):
    """GPT-QModel's embeddings have their groups along the vocabulary."""
    model = llama(SMALL)
    model.save_pretrained(tmp_path / "float")
    tensors = tensors_of(tmp_path / "float")
    parts, plain = pack_gptq(tensors.pop("model.embed_tokens.weight").numpy().T.copy())
    tensors |= {f"model.embed_tokens.{part}": tensor for part, tensor in parts.items()}
    (tmp_path / "packed").mkdir()
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    assert 64 % GROUP == 0
    logging.getLogger("transformers").propagate = True
    try:
        packed = load(tmp_path / "packed")
    finally:
        logging.getLogger("transformers").propagate = False
    assert "each look-up dequantizes all 64" in caplog.text
    want = torch.from_numpy(plain.T.copy()).float()
    assert torch.equal(packed.model.embed_tokens(ids()), want[ids()])


def test_another_size_is_refused(tied, enabled):
    model = load(tied / "packed")
    assert model.resize_token_embeddings(64).num_embeddings == 64
    assert model.resize_token_embeddings(pad_to_multiple_of=32).num_embeddings == 64
    for options in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 128}):
        with pytest.raises(UnsupportedError, match="packed with 64 rows"):
            model.resize_token_embeddings(**options)
    plain = model.dequantize()
    plain.resize_token_embeddings(70)
    assert plain(ids()).logits.shape[-1] == 70


def test_a_table_of_another_shape_or_without_its_scale(untied, enabled, tmp_path):
    tensors = tensors_of(untied / "packed")
    (tmp_path / "config.json").write_text((untied / "packed" / "config.json").read_text())
    wrong = tensors | {
        f"model.embed_tokens.{p}": tensors[f"model.embed_tokens.{p}"][:32].contiguous()
        for p in ("weight", "weight_scale")
    }
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"embed_tokens.*\(32, 64\)"):
        load(tmp_path)
    del tensors["model.embed_tokens.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="embed_tokens"):
        load(tmp_path)


@pytest.fixture
def adapted(tied, enabled):
    peft = pytest.importorskip("peft", reason="needs peft")

    def make(folder=tied):
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["embed_tokens"], r=4, init_lora_weights=False)
        return peft.get_peft_model(load(folder / "packed"), config)

    return make


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_adapters_on_the_table(kind, request, adapted, enabled, tmp_path):
    folder = request.getfixturevalue(kind)
    model = adapted(folder)
    loss = model(ids(), labels=ids()).loss
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "embed" in n and p.requires_grad]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)
    want = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_table_that_is_trained_as_a_whole(kind, names, request, enabled, tmp_path):
    """peft's modules_to_save: a float copy trains, the packed table stays; merged, the copy is the table."""
    peft = pytest.importorskip("peft", reason="needs peft")
    folder = request.getfixturevalue(kind)
    base, want = load(folder / "packed"), logits(load(folder / "dense"))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=names, r=4))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert not torch.allclose(trained, want, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder / "packed"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged.model.embed_tokens) is torch.nn.Embedding
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-5)


def test_tables_that_write_into_their_rows_are_refused():
    with pytest.raises(UnsupportedError, match="max_norm"):
        JqEmbedding.in_place_of(torch.nn.Embedding(4, 4, max_norm=1.0))


def test_a_table_on_another_device_is_an_error(untied, enabled):
    table = load(untied / "packed").model.embed_tokens
    packed, spec = table.operands()
    assert bridge.array_of(packed[0]).shape[0] == 64
    with pytest.raises(RuntimeError, match="token numbers on"):
        from jq_torch import rows

        rows._embedding(ids().to("meta"), packed, spec, 64, 64, torch.float32)


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
