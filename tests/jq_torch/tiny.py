"""Tiny checkpoints for the adapter's tests: a second, obvious GPTQ packer, and models of many families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

# of a Llama: matrices that groups of 128 divide, and half of that where tests are many
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 64}
SMALL = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "format": "gptq"}


def llama(sizes: dict[str, Any], **more: Any) -> Any:
    """A float32 Llama, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | more)))


def pack_gptq(weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """4-bit symmetric GPTQ (v1) of a weight [N, K] by rounding: the stored tensors and the dense weight they mean."""
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    scale = (np.maximum(np.abs(groups).max(2), 1e-6) / 7).astype(np.float16)
    codes = np.clip(np.rint(groups / scale[..., None].astype(np.float32)) + 8, 0, 15).astype(np.uint32)
    dense = ((codes.astype(np.int32) - 8).astype(np.float16) * scale[..., None]).reshape(n, k)
    shifts = np.arange(8, dtype=np.uint32) * 4
    words = np.bitwise_or.reduce(codes.reshape(n, k).T.reshape(k // 8, 8, n) << shifts[None, :, None], 1)
    zeros = np.full((k // GROUP, n // 8), 0x77777777, np.uint32)  # v1 stores the zero 8 as 7
    parts = {
        "qweight": words.view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": (np.arange(k) // GROUP).astype(np.int32),
    }
    return {name: torch.from_numpy(a.copy()) for name, a in parts.items()}, dense


def save_pair(model: Any, folder: Path, wanted, *, transposed: bool = False, quantization: dict | None = None) -> None:
    """Writes `folder/packed` (GPTQ where `wanted(name)`) and `folder/dense` (the same numbers as float32).

    Args:
      model: a float model.
      folder: where to write.
      wanted: name of a `.weight` -> whether to pack it.
      transposed: the weights are [K, N] (Conv1D).
      quantization: quantization_config; default 4-bit GPTQ.
    """
    float_dir = folder / "float"
    model.save_pretrained(float_dir)
    tensors: dict[str, torch.Tensor] = {}
    for file in float_dir.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    packed, dense = {}, {}
    for name, value in tensors.items():
        if name.endswith(".weight") and wanted(name):
            weight = value.numpy().T if transposed else value.numpy()
            parts, plain = pack_gptq(np.ascontiguousarray(weight, np.float32))
            packed |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
            plain = plain.astype(np.float32)
            dense[name] = torch.from_numpy(np.ascontiguousarray(plain.T if transposed else plain))
        else:
            packed[name] = dense[name] = value
    config = json.loads((float_dir / "config.json").read_text())
    for kind, found, extra in (("packed", packed, {"quantization_config": quantization or GPTQ}), ("dense", dense, {})):
        (folder / kind).mkdir()
        save_file(found, folder / kind / "model.safetensors", metadata={"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(config | extra))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def ids(count: int = 12, vocabulary: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, count), generator=torch.Generator().manual_seed(42))
