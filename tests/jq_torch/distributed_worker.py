"""One process of `test_distributed.py`: a packed model shared by several, over gloo or nccl; prints {mode: result} as JSON.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python distributed_worker.py MODES DEVICE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import jq_torch
from jq.errors import UnsupportedError


def adapted(folder: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    with jq_torch.enable():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def losses(model: Any, rank: int, world: int, steps: int = 4) -> list[torch.Tensor]:
    """Losses of this process's rows; the mean over processes is that of the whole batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(3))[rank::world]
    ids = ids.to(next(model.parameters()).device)
    found = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def fsdp(folder: str, device: str, dtype: torch.dtype = torch.float32, *, whole: bool = False) -> dict[str, Any]:
    """whole: every process holds all packed tensors, only float ones are sharded."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = adapted(folder, device, dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    mesh = init_device_mesh(device.partition(":")[0], (world,))
    ignored = {p for p in model.parameters() if whole and not p.is_floating_point()}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    found = torch.stack(losses(model, rank, world)).float()
    dist.all_reduce(found)
    full = {
        n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for n, p in model.named_parameters()
        if n in before
    }
    same = len(full) == len(before) and all(torch.equal(full[n], before[n]) for n in before)
    return {"losses": (found / world).tolist(), "held": held / total, "same": same}


def half(folder: str, device: str) -> dict[str, Any]:
    """In bfloat16, which on a GPU the kernels compute."""
    return fsdp(folder, device, torch.bfloat16)


def whole(folder: str, device: str) -> dict[str, Any]:
    return fsdp(folder, device, whole=True)


def tensor(folder: str, device: str) -> dict[str, Any]:
    ids = torch.arange(3, 15, device=device)[None]
    with jq_torch.enable(), torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder, device_map=device)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        found = model(ids).logits
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    sharded = [n for n, p in model.named_parameters() if hasattr(p, "full_tensor")]
    return {"error": (found - want).abs().max().item(), "sharded": sharded}


def refused(folder: str, device: str) -> dict[str, Any]:
    from transformers.distributed import DistributedConfig

    try:
        with jq_torch.enable():
            AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    except UnsupportedError as e:
        return {"message": str(e)}
    return {"message": ""}


def main() -> None:
    modes, device, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    known = {"fsdp": fsdp, "half": half, "whole": whole, "tensor": tensor, "refused": refused}
    print(json.dumps({mode: known[mode](folder, device) for mode in modes.split(",")}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
