"""`jq.inspect` and `jaxq inspect` over every reference directory."""

from __future__ import annotations

import json
from pathlib import Path

import mutations
import pytest
from reference_dirs import directories

import jq
from jq.inspect import size_text

DIRECTORIES = directories()
cases = pytest.mark.parametrize("folder", list(DIRECTORIES.values()), ids=list(DIRECTORIES))


@cases
def test_counts_what_the_state_holds(folder: Path):
    summary = jq.inspect(folder)
    state = jq.load_state(folder)
    quantized = jq.quantized(state)
    assert sum(row.count for row in summary.quantized) == len(quantized)
    assert sum(row.weights for row in summary.quantized) == sum(q.size for q in quantized.values())
    assert sum(row.count for row in summary.rows) == len(state)
    kinds = {q.describe() for q in quantized.values()}
    assert {row.kind for row in summary.quantized} == kinds
    text = str(summary)
    assert all(kind in text for kind in kinds)
    assert json.loads(json.dumps(summary.to_dict()))["quantized_modules"] == len(quantized)


def test_a_known_checkpoint():
    summary = jq.inspect(DIRECTORIES["gptq-4-g32-sym-descact"])
    assert summary.method == "gptq"
    assert summary.layers == 2
    assert summary.architecture == "LlamaForCausalLM"
    up = next(row for row in summary.rows if row.name == "model.layers.*.mlp.up_proj")
    assert (up.count, up.shape, up.tensor) == (2, (256, 128), "Affine")
    assert up.kind == "int4 sym, group 32, act-order"
    # codes 4, scales 16/32, zeros 4/32 and an int32 g_idx for each of 128 inputs of 256 outputs
    assert up.bits_per_weight == pytest.approx(4 + 16 / 32 + 4 / 32 + 32 / 256)


def test_the_command(jaxq, tiny):
    ran = jaxq("inspect", DIRECTORIES["gptq-4-g32-sym-descact"])
    assert ran.code == 0
    assert "int4 sym, group 32, act-order" in ran.out
    assert ran.err == ""
    ran = jaxq("inspect", tiny, "--json")
    assert ran.json["method"] is None
    assert ran.json["bits_per_weight"] == pytest.approx(32, abs=16)


def test_sizes():
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


def test_rows_of_one_name_say_their_layers():
    names = {row.name for row in jq.inspect(directories()["quanto-mixed-f16"]).rows}
    assert {"model.layers.{0}.mlp.down_proj", "model.layers.{1}.mlp.down_proj", "model.layers.*.mlp.up_proj"} <= names


def test_a_bad_config_is_named_with_its_file(tmp_path):
    tensors, config, sides, metadata = mutations.seed_of(directories()["aqlm-2x8"])
    config["quantization_config"]["num_codebooks"] = [2]
    mutations.write(tmp_path, tensors, config, sides, metadata)
    with pytest.raises(jq.errors.FormatError, match=f"{tmp_path.name}.*num_codebooks is \\[2\\]"):
        jq.inspect(tmp_path)
