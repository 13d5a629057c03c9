"""Decode speed of an 8B-shaped Llama through transformers' generate: packed layers of jq beside bitsandbytes and bf16.

    python benchmarks/gpu_torch.py [--kinds nf4,rtn,bitsandbytes,bf16] [--tokens 128] [--out FILE]

Random weights (speed does not depend on them), batch 1, static cache, transformers' own torch.compile with CUDA graphs.
Tokens/s = tokens / (time of tokens + 1 minus time of 1). `bitsandbytes` needs that library. `--tiny --device cpu` tries the
script itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}


def packed_layers(model: Any, method: Any) -> None:
    """Every projection as a packed layer; layers of one shape share random numbers, not memory."""
    from jq_torch.linear import JqLinear

    made: dict[tuple[int, int], Any] = {}
    for path, old in list(model.named_modules()):
        if type(old) is not nn.Linear or path == "lm_head":
            continue
        shape = (old.out_features, old.in_features)
        if shape not in made:
            weight = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.02
            made[shape] = method.quantize(weight).to_numpy()
        layer = JqLinear(shape[1], shape[0])
        layer.put("q", made[shape].arrays(np.copy))
        layer.use(quantize_activations=True, kernels=True)
        model.set_submodule(path, layer)


def bitsandbytes_layers(model: Any) -> None:
    import bitsandbytes as bnb

    for path, old in list(model.named_modules()):
        if type(old) is nn.Linear and path != "lm_head":
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            weight = torch.randn(old.out_features, old.in_features, dtype=torch.bfloat16) * 0.02
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, new)


def build(kind: str, sizes: dict[str, int], device: str) -> Any:
    config = LlamaConfig(**sizes, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if kind in ("nf4", "rtn"):
        import jq

        packed_layers(model, jq.NF4() if kind == "nf4" else jq.RTN(bits=4, group_size=128))
    elif kind == "bitsandbytes":
        bitsandbytes_layers(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model.to(device)


@torch.no_grad()
def tokens_per_second(model: Any, tokens: int, device: str) -> float:
    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}

    def run(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for count in (tokens + 1, 1, tokens + 1):  # compiles and captures
        run(count)
    best = min(run(tokens + 1) for _ in range(3)) - min(run(1) for _ in range(3))
    return round(tokens / best, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="nf4,rtn,bitsandbytes,bf16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "tokens": args.tokens}
    if args.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    for kind in args.kinds.split(","):
        model = build(kind, TINY if args.tiny else EIGHT_B, args.device)
        found[kind] = {"tokens_per_s": tokens_per_second(model, args.tokens, args.device)}
        if args.device == "cuda":
            found[kind]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()
        print(kind, found[kind], flush=True)
        del model
        torch.compiler.reset()
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
