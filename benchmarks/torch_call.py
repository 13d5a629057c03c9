"""Cost of one packed layer in torch: the layer beside its parts, a dense layer, and the same weight called from JAX.

    python benchmarks/torch_call.py [--device cuda] [--write]

Microseconds a call, the minimum over rounds (other work on the machine only ever adds). `layer`, `dense_torch` and
`jax` are whole calls, waited for. On a CPU `bridge` is what the operator takes beside its two parts, the dequantizing
program and the dense product. On a GPU `host` is the time until a call returns, the GPU being busy with something else,
and `device` the time of a call in a CUDA graph of many; `host_kernel` is without the module around the kernel.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np
import torch
from record import write

import jq
from jq_torch import bridge, ops
from jq_torch.linear import JqLinear

SHAPES = {
    "cpu": [(64, 64, 1), (128, 128, 1), (1024, 1024, 1), (1024, 1024, 16), (2048, 2048, 16)],
    "cuda": [(4096, 4096, 1), (14336, 4096, 1), (4096, 14336, 1), (4096, 4096, 16), (4096, 4096, 64)],
}
METHODS = {"rtn_g128": jq.RTN(group_size=128), "nf4": jq.NF4()}


def microseconds(call: Any, wait: Any, rounds: int = 30, calls: int = 5) -> float:
    for _ in range(3):
        wait(call())
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            found = call()
        wait(found)
        best = min(best, (time.perf_counter() - start) / calls)
    return round(best * 1e6, 1)


def host_microseconds(call: Any, rounds: int = 40, calls: int = 100) -> float:
    """Time until a call returns, measured while the GPU sleeps, so that no call waits for it."""
    best = float("inf")
    for _ in range(rounds):
        call()
        torch.cuda.synchronize()
        torch.cuda._sleep(6_000_000)  # clock cycles, about 3 ms
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return round(best * 1e6, 1)


def graph_microseconds(call: Any, calls: int = 50) -> float:
    """Time of a call on the device: a CUDA graph of many, replayed."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return round(microseconds(graph.replay, lambda _: torch.cuda.synchronize(), 10, 4) / calls, 1)


def layer_of(method: Any, n: int, k: int) -> JqLinear:
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32) * 0.02
    layer = JqLinear(k, n)
    layer.put("q", method.quantize(weight).to_numpy())
    layer.use(quantize_activations=True, kernels=True)
    return layer


@torch.inference_mode()
def measure(n: int, k: int, tokens: int, method: Any, device: str) -> dict[str, float]:
    layer = layer_of(method, n, k)
    q = layer.qtensor()
    layer.to(device)  # into the kernels' order, where there is a GPU
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, k, device=device, dtype=dtype)
    dense = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    packed, spec = layer.operands()

    def wait(found: Any) -> None:
        if isinstance(found, jax.Array):
            found.block_until_ready()
        elif device == "cuda":
            torch.cuda.synchronize()

    row: dict[str, Any] = {"layer": microseconds(lambda: layer(x), wait)}
    row["operator"] = microseconds(lambda: ops.linear(x, packed, spec, n, None), wait)
    row["dense_torch"] = microseconds(lambda: dense(x), wait)
    xj, jitted = jax.numpy.zeros((tokens, k), bridge.numpy_dtype(dtype)), jax.jit(jq.matmul)
    qj = q.to_jax()
    if device == "cuda":
        import pallas_kernels

        qj = pallas_kernels.prepare(qj)
        kernel = ops.cuda_weight(packed, spec, dtype)
        row["host_kernel"] = host_microseconds(lambda: kernel(x))
        row["host"] = host_microseconds(lambda: layer(x))
        row["host_operator"] = host_microseconds(lambda: ops.linear(x, packed, spec, n, None))
        row["host_dense_torch"] = host_microseconds(lambda: dense(x))
        row["device"] = graph_microseconds(lambda: layer(x))
        row["device_dense_torch"] = graph_microseconds(lambda: dense(x))
    else:
        program, leaves = ops._dense_program(spec, "float32"), ops._leaves(packed, spec)
        row["dequantize"] = microseconds(lambda: program(leaves), wait)
        row["bridge"] = round(row["operator"] - row["dequantize"] - row["dense_torch"], 1)
    row["jax"] = microseconds(lambda: jitted(xj, qj), wait)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    rows = []
    for name, method in METHODS.items():
        for n, k, tokens in SHAPES[args.device]:
            rows.append(
                {"weight": name, "n": n, "k": k, "tokens": tokens, **measure(n, k, tokens, method, args.device)}
            )
            print(rows[-1], flush=True)
    if args.write:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        write(f"torch_call_{args.device}", rows, device=device, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
