"""Packed layers under FSDP2: two processes over gloo train the same adapters as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import jq_torch

pytest.importorskip("peft", reason="LoRA needs peft")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64}
HERE = Path(__file__).parent


@pytest.mark.parametrize("double", [False, True])
def test_two_processes_train_as_one(tmp_path, double):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "float")
    with jq_torch.enable():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(
            tmp_path / "nf4"
        )
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "fsdp_worker.py"), str(tmp_path / "nf4")]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    rows = [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in processes]
    import fsdp_worker

    alone = [loss.item() for loss in fsdp_worker.losses(fsdp_worker.adapted(str(tmp_path / "nf4")), 0, 1)]
    for row in rows:
        torch.testing.assert_close(row["losses"], alone, rtol=1e-4, atol=1e-5)
        assert row["held"] < 0.55 and row["same"]
