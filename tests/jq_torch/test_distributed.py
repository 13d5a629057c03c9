"""Packed layers in two processes over gloo: FSDP2 trains as one process does, tensor parallelism computes the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import jq_torch

pytest.importorskip("peft", reason="LoRA needs peft")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64}
HERE = Path(__file__).parent


def packed(folder: Path, **options: Any) -> str:
    """The directory of a tiny NF4 model."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "float")
    with jq_torch.enable():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
        model.save_pretrained(folder / "nf4")
    return str(folder / "nf4")


def two(mode: str, folder: str) -> list[dict[str, Any]]:
    """What each of two processes printed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "distributed_worker.py"), mode, folder]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    return [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in processes]


@pytest.mark.parametrize("double", [False, True])
def test_two_processes_train_as_one(tmp_path, double):
    folder = packed(tmp_path, bnb_4bit_use_double_quant=double)
    rows = two("fsdp", folder)
    import distributed_worker

    alone = [loss.item() for loss in distributed_worker.losses(distributed_worker.adapted(folder), 0, 1)]
    for row in rows:
        torch.testing.assert_close(row["losses"], alone, rtol=1e-4, atol=1e-5)
        assert row["held"] < 0.55 and row["same"]


def test_a_tensor_parallel_plan_leaves_packed_layers_whole(tmp_path):
    for row in two("tensor", packed(tmp_path)):
        assert row["error"] < 1e-5
        assert sorted(row["sharded"]) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_sharding_while_loading_is_refused(tmp_path):
    for row in two("refused", packed(tmp_path)):
        assert "fully_shard" in row["message"] and "_proj" in row["message"]
