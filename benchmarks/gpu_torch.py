"""Decode speed of an 8B-shaped Llama through transformers' generate: packed layers of jq beside the peers and bf16.

    python benchmarks/gpu_torch.py [--kinds nf4,rtn,bitsandbytes,gemlite,bf16] [--tokens 128] [--write]

Random weights (speed does not depend on them), bfloat16, batch 1, static cache, transformers' own torch.compile with
CUDA graphs. Tokens/s = tokens / (time of tokens + 1 minus time of 1), the best of three each. nf4: blocks of 64 as
bitsandbytes' own; rtn and gemlite: 4-bit integers, one scale for 128 inputs. A process a kind: they compile at the same
time and are timed one after the other, with nothing else running. `--size tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
    },
}
GROUP = 128


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """{path: (out_features, in_features)} of what is quantized."""
    from torch import nn

    return {
        p: (m.out_features, m.in_features)
        for p, m in model.named_modules()
        if type(m) is nn.Linear and not p.endswith("lm_head")
    }


def jq_layers(model: Any, device: str, kind: str) -> None:
    import jq
    from jq_torch.linear import JqLinear

    method: Any = jq.NF4() if kind == "nf4" else jq.RTN(bits=4, group_size=GROUP)

    def made(shape: tuple[int, int]) -> Any:
        weight = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.02
        return method.quantize(weight).to_numpy()

    layers = linear_layers(model)
    shapes = list(dict.fromkeys(layers.values()))
    with ThreadPoolExecutor(4) as pool:
        tensors = dict(zip(shapes, pool.map(made, shapes), strict=True))
    for path, (n, k) in layers.items():
        layer = JqLinear(k, n)
        layer.put("q", tensors[n, k])
        layer.use(quantize_activations=True, kernels=True)
        model.set_submodule(path, layer.to(device))


def bitsandbytes_layers(model: Any, device: str, kind: str) -> None:
    import bitsandbytes as bnb
    import torch

    for path, (n, k) in linear_layers(model).items():
        options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(k, n, **options, device="meta")  # elsewhere it draws a weight: minutes on a CPU
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model.set_submodule(path, new.to(device))


def gemlite_layers(model: Any, device: str, kind: str) -> None:
    import torch
    from gemlite.helper import A16Wn

    processor = A16Wn(device=device, dtype=torch.bfloat16)
    for path, (n, k) in linear_layers(model).items():
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        scales = torch.full((n * k // GROUP, 1), 0.004, dtype=torch.bfloat16, device=device)
        zeros = torch.full_like(scales, 8)
        model.set_submodule(path, processor.from_weights(codes, scales, zeros, 4, GROUP))


KINDS: dict[str, Any] = {
    "nf4": jq_layers,
    "rtn": jq_layers,
    "bitsandbytes": bitsandbytes_layers,
    "gemlite": gemlite_layers,
    "bf16": lambda model, device, kind: None,
}


def build(kind: str, size: str, device: str) -> Any:
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    KINDS[kind](model, device, kind)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                value = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)
    return model.to(device)


def seconds(model: Any, count: int, device: str) -> float:
    """Time of generating so many tokens after a prompt of 16."""
    import torch

    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(
        ids,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
        eos_token_id=None,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def child(kind: str, options: argparse.Namespace) -> None:
    """Builds, compiles, says "ready", waits for a line, measures, prints one JSON line."""
    import torch

    start = time.perf_counter()
    device, tokens = options.device, options.tokens
    with torch.no_grad():
        model = build(kind, options.size, device)
        built = time.perf_counter() - start
        for count in (tokens + 1, 1, tokens + 1):  # compiles and captures
            seconds(model, count, device)
        row: dict[str, Any] = {"kind": kind, "built_s": round(built, 1)}
        row["ready_s"] = round(time.perf_counter() - start, 1)
        print("ready", flush=True)
        sys.stdin.readline()
        long = [seconds(model, tokens + 1, device) for _ in range(3)]
        short = [seconds(model, 1, device) for _ in range(3)]
    row["tokens_per_s"] = round(tokens / (min(long) - min(short)), 1)
    row["spread"] = round((max(long) - min(long)) / min(long), 3)
    if device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(row), flush=True)


def follow(process: Any, kind: str, events: queue.Queue) -> None:
    for line in process.stdout:
        if line.startswith(("ready", "{")):
            events.put((kind, line.strip()))
    events.put((kind, f"exit {process.wait()}"))


def measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, one a kind; where a kind fails or is not ready in time, its row says so."""
    kinds = options.kinds.split(",")
    events: queue.Queue = queue.Queue()
    processes, rows = {}, {}
    passed = ["--tokens", str(options.tokens), "--device", options.device, "--size", options.size]
    for kind in kinds:
        command = [sys.executable, __file__, "--child", kind, *passed]
        processes[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=follow, args=(processes[kind], kind, events), daemon=True).start()
    ready: list[str] = []
    end = time.monotonic() + options.limit
    while len(ready) + len(rows) < len(kinds):
        try:
            kind, text = events.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            break
        if text == "ready":
            ready.append(kind)
        else:
            rows[kind] = {"kind": kind, "failed": text}
    for kind in kinds:  # those that are late must not run beside the others
        if kind not in ready:
            processes[kind].kill()
            rows.setdefault(kind, {"kind": kind, "failed": f"not ready after {options.limit} s"})
            print(rows[kind], flush=True)
    while options.after and not options.after.exists() and time.monotonic() < end:
        time.sleep(0.2)
    for kind in ready:
        processes[kind].stdin.write("go\n")
        processes[kind].stdin.flush()
        while kind not in rows:
            found, text = events.get()
            if found == kind:
                rows[kind] = json.loads(text) if text.startswith("{") else {"kind": kind, "failed": text}
        processes[kind].wait()
        print(rows[kind], flush=True)
        yield [rows[kind] for kind in kinds if kind in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--limit", type=float, default=600, help="seconds to build and compile")
    parser.add_argument(
        "--after", type=Path, help="time nothing before this file is there (other work goes on until then)"
    )
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    for rows in measure(options):
        if options.write:
            import torch
            from record import write

            device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
            write("gpu_torch", rows, device=device, size=options.size, tokens=options.tokens)


if __name__ == "__main__":
    main()
