"""Packed layers in two processes, over gloo or nccl: FSDP2 trains as one process does, tensor parallelism computes the same."""

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
from tiny import SMALL, llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import jq_torch

pytest.importorskip("peft", reason="LoRA needs peft")
HERE = Path(__file__).parent


def packed(folder: Path, **options: Any) -> str:
    """The directory of a tiny NF4 model."""
    llama(SMALL).save_pretrained(folder / "float")
    with jq_torch.enable():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
        model.save_pretrained(folder / "nf4")
    return str(folder / "nf4")


def two(modes: str, device: str, folder: str) -> list[dict[str, Any]]:
    """What each of two processes printed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "2"}
    environment |= {"JAX_PLATFORMS": "cpu"} if device == "cpu" else {}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "distributed_worker.py"), modes, device, folder]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    return [json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in processes]


# torch 2.11 makes every parameter that it shards require a gradient for a moment, which integers cannot
SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])])
def ran(request, tmp_path_factory):
    """(device, folder, what each process found in every mode): the processes start once."""
    folder = packed(tmp_path_factory.mktemp("two"), bnb_4bit_use_double_quant=True)
    return request.param, folder, two(f"{'fsdp,half,' if SHARDS else ''}whole,tensor,refused", request.param, folder)


@pytest.mark.skipif(not SHARDS, reason="fully_shard takes integer parameters from torch 2.13 on")
@pytest.mark.parametrize("mode, limit", [("fsdp", 1e-4), ("half", 3e-2)])
def test_two_processes_train_as_one(ran, mode, limit):
    import distributed_worker

    device, folder, rows = ran
    model = distributed_worker.adapted(folder, device, torch.float32 if mode == "fsdp" else torch.bfloat16)
    alone = [loss.item() for loss in distributed_worker.losses(model, 0, 1)]
    for row in rows:
        torch.testing.assert_close(row[mode]["losses"], alone, rtol=limit, atol=1e-5)
        assert row[mode]["held"] < 0.55 and row[mode]["same"]


def test_adapters_are_sharded_beside_whole_packed_layers(ran):
    """`ignored_params`: what torch before 2.13 needs."""
    import distributed_worker

    device, folder, rows = ran
    alone = [loss.item() for loss in distributed_worker.losses(distributed_worker.adapted(folder, device), 0, 1)]
    for row in rows:
        torch.testing.assert_close(row["whole"]["losses"], alone, rtol=1e-4, atol=1e-5)
        assert row["whole"]["same"]


def test_a_tensor_parallel_plan_leaves_packed_layers_whole(ran):
    for row in ran[2]:
        assert row["tensor"]["error"] < 2e-5
        assert {"lm_head.weight"} <= set(row["tensor"]["sharded"]) <= {"lm_head.weight", "model.embed_tokens.weight"}


def test_sharding_while_loading_is_refused(ran):
    for row in ran[2]:
        assert "fully_shard" in row["refused"]["message"] and "_proj" in row["refused"]["message"]
