"""Cost of one packed layer in torch: the operator beside its parts, a dense layer, and jq.matmul in JAX.

    python benchmarks/torch_call.py [--device cuda] [--out FILE]

Prints microseconds a call, the minimum over rounds (other work on the machine only ever adds).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import jq
from jq_torch import ops
from jq_torch.linear import JqLinear


def microseconds(call: Any, wait: Any, rounds: int = 30, calls: int = 5) -> float:
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            found = call()
        wait(found)
        best = min(best, (time.perf_counter() - start) / calls)
    return round(best * 1e6, 1)


def layer_of(method: Any, n: int, k: int) -> JqLinear:
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32) * 0.02
    layer = JqLinear(k, n)
    layer.put("q", method.quantize(weight))
    layer.use(quantize_activations=True, kernels=True)
    return layer


@torch.no_grad()
def measure(n: int, k: int, tokens: int, method: Any, device: str) -> dict[str, float]:
    layer = layer_of(method, n, k).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, k, device=device, dtype=dtype)
    dense = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    packed, spec = layer.operands()

    def wait(found: Any = None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        elif isinstance(found, jax.Array):
            found.block_until_ready()

    q = layer.qtensor().to_jax()
    jitted = jax.jit(jq.matmul)
    xj = jax.numpy.asarray(np.zeros((tokens, k), np.float32), "bfloat16" if device == "cuda" else "float32")
    return {
        "layer": microseconds(lambda: layer(x), wait),
        "operator": microseconds(lambda: ops.linear(x, packed, spec, n), wait),
        "dequantize": microseconds(lambda: ops.dense(packed, spec, dtype), wait),
        "dense_torch": microseconds(lambda: dense(x), wait),
        "jq_matmul_jax": microseconds(lambda: jitted(xj, q), wait),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes = [(128, 128, 1), (1024, 1024, 1), (1024, 1024, 16), (2048, 2048, 16)]
    if args.device == "cuda":
        shapes = [(4096, 4096, 1), (14336, 4096, 1), (4096, 14336, 1), (4096, 4096, 64)]
    methods = {"rtn_g128": jq.RTN(), "nf4": jq.NF4()}
    found: dict[str, Any] = {"torch": torch.__version__, "jax": jax.__version__, "threads": torch.get_num_threads()}
    for name, method in methods.items():
        for n, k, tokens in shapes:
            row = measure(n, k, tokens, method, args.device)
            found[f"{name} {n}x{k} M={tokens}"] = row
            print(f"{name} {n}x{k}, {tokens} tokens: {row}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
