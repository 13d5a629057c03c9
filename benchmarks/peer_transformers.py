"""transformers, alone and with bitsandbytes: perplexity and decode speed, one JSON line a method.

    python benchmarks/peer_transformers.py perplexity MODEL METHOD... --text FILE [--windows 32]
    python benchmarks/peer_transformers.py speed MODEL METHOD... [--new 64]

METHOD: float32, nf4, nf4-dq, fp4, int8. Runs in an environment of its own (torch, transformers, bitsandbytes).
4-bit perplexities are of the library's own dequantized weights in plain Linear layers: its 4-bit kernel on a CPU
sums in another order, and dequantizes at each call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

PROMPT = (
    "The history of the lighthouse begins in antiquity , when fires were built on hills near the shore so that sailors "
    "could find the harbour at night , and"
)


def load(method: str, path: str) -> torch.nn.Module:
    """The model in float32 compute, quantized by bitsandbytes where the method says so."""
    config = None
    if method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif method != "float32":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method[:3],
            bnb_4bit_use_double_quant=method.endswith("-dq"),
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).eval()


@torch.inference_mode()
def dense(model: torch.nn.Module) -> torch.nn.Module:
    """Plain Linear layers with bitsandbytes' dequantized weights in place of its 4-bit ones."""
    import bitsandbytes.functional as functional

    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(module.bias.float(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


@torch.inference_mode()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean loss over non-overlapping windows [n, T]."""
    total, count = 0.0, 0
    for row in windows:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        total += loss.double().sum().item()
        count += loss.numel()
    return math.exp(total / count)


@torch.inference_mode()
def speed(model: torch.nn.Module, tokenizer, new: int, runs: int) -> dict:
    """Greedy decode of `new` tokens after the prompt: tokens/s of the whole call, median of `runs`."""
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])

    def generate(count: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    generate(4)
    rates = []
    for _ in range(runs):
        start = time.perf_counter()
        generate(new)
        rates.append(new / (time.perf_counter() - start))
    return {"tokens_per_s": statistics.median(rates), "runs": rates, "prompt_tokens": ids.shape[1], "new_tokens": new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["perplexity", "speed"])
    parser.add_argument("model")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for method in args.methods:
        model = load(method, args.model)
        row = {"peer": "transformers" + ("" if method == "float32" else " + bitsandbytes"), "method": method}
        start = time.perf_counter()
        if args.what == "perplexity":
            text = Path(args.text).read_text("utf-8")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.windows * args.window]
            windows = torch.tensor(ids).view(-1, args.window)
            row |= {"perplexity": perplexity(dense(model), windows), "windows": len(windows)}
        else:
            row |= speed(model, tokenizer, args.new, args.runs)
        row |= {"seconds": round(time.perf_counter() - start, 1), "load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps(row), flush=True)
        del model


if __name__ == "__main__":
    main()
