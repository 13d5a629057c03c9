"""Packed embeddings: rows, tied output layers, scaled tables, saving, devices, adapters."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import GPTQ, GROUP, SMALL, ids, llama, pack_gptq, same, tensors_of
from transformers import AutoModelForCausalLM

from jq.errors import FormatError, UnsupportedError
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
