"""torchao's files: metadata of one and of many shards, and the output matrix that `untie_embedding_weights` leaves out."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same
from reference_dirs import directories

import jq
from jq.errors import CheckpointError
from jq.formats import torchao
from jq.safetensors_file import read_header, write

BF = ml_dtypes.bfloat16
CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "AnyConfig", "_version": 2, "_data": {}}}}


def test_a_quantized_state_is_saved_with_its_metadata(tmp_path):
    state = jq.State({"a.weight": np.ones((8, 64), BF), "norm.weight": np.ones(8, BF)}, {"model_type": "none"})
    method = jq.TorchAO("int8_weight_only")
    made = jq.State({**state, "a.weight": method.quantize(state["a.weight"])}, {"quantization_config": method.config()})
    jq.save(made, tmp_path / "out")
    _, metadata = read_header(tmp_path / "out" / "model.safetensors")
    assert json.loads(metadata["tensor_names"]) == ["a.weight", "norm.weight"]
    assert json.loads(metadata["a.weight"])["_type"] == "Int8Tensor"
    again = jq.load_state(tmp_path / "out")
    assert_same(again["a.weight"].dequantize(), made["a.weight"].dequantize())


def test_metadata_of_all_shards_is_merged_and_kept(tmp_path):
    made = {f"m{i}.weight": jq.TorchAO("int8_weight_only").quantize(np.eye(8, dtype=BF)) for i in range(2)}
    for i, (name, q) in enumerate(made.items()):
        tensors = {torchao.join(f"m{i}", s): a for s, a in torchao.dump(q).items()}
        items = [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()]
        metadata = {"tensor_names": json.dumps([name]), name: q.source.get("entry")}
        write(tmp_path / f"model-0000{i}.safetensors", items, metadata | {"tensor_names": json.dumps(list(made))})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    state = jq.load_state(tmp_path)
    assert list(jq.quantized(state)) == ["m0", "m1"]
    jq.save(state, tmp_path / "out")
    for file in sorted(tmp_path.glob("*.safetensors")):
        assert read_header(tmp_path / "out" / file.name)[1] == read_header(file)[1]


def untied(folder, *, setting: bool = True):
    """A reference directory as transformers saves it with `untie_embedding_weights`: the output matrix is listed only."""
    source = directories()["torchao-int8da-int4w"]
    entries, metadata = read_header(source / "model.safetensors")
    tensors = {name: np.array(entry.read()) for name, entry in entries.items() if name != "lm_head.weight"}
    folder.mkdir()
    items = [(k, (v.dtype, v.shape), lambda v=v: v) for k, v in tensors.items()]
    write(folder / "model.safetensors", items, metadata)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["untie_embedding_weights"] = setting
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return config


def test_an_output_matrix_that_was_the_embedding_when_it_was_saved(tmp_path):
    config = untied(tmp_path / "in")
    ids = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
    found = jq.load(tmp_path / "in")
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "model.safetensors").write_bytes((tmp_path / "in" / "model.safetensors").read_bytes())
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    np.testing.assert_array_equal(np.asarray(found(ids)), np.asarray(jq.load(tmp_path / "tied")(ids)))
    jq.save(found, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "in" / "model.safetensors").read_bytes()
    untied(tmp_path / "lost", setting=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing"):
        jq.load(tmp_path / "lost")


def test_so_it_is_behind_transformers(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    import jq_torch

    untied(tmp_path / "in")
    with jq_torch.enable():
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "in", output_loading_info=True)
        assert not info["missing_keys"]
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path / "out")
    assert (
        read_header(tmp_path / "out" / "model.safetensors")[0].keys()
        == read_header(tmp_path / "in" / "model.safetensors")[0].keys()
    )
