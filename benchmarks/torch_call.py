"""Cost of one packed layer in torch: the layer beside its parts, a dense layer, and the same weight called from JAX.

    python benchmarks/torch_call.py [--device cuda] [--write]

Microseconds a call, the minimum over rounds (other work on the machine only ever adds). `layer`, `dense_torch` and
`jax` are whole calls, waited for. On a CPU `bridge` is what the operator takes beside its two parts, the dequantizing
program and the dense product. On a GPU `device` is the time of a call in a CUDA graph of many, and `host` the time until
a call returns, the GPU being busy with something else and its queue far from full; `host_kernel` is without the module
around the kernel, `host_floor` the driver's own launch of an empty kernel from ctypes.

Cores of virtual machines have phases of half their speed and less, in which an empty loop in Python takes as much longer
as a call does. So the rows are measured several times, one after the other, with such a loop before and after each round.
Beside the minimum stand two medians: `_median` of all rounds, `_median_full_speed` of those whose loops took at most a
quarter longer than the fastest loop of the run; `full_speed` says what share of the rounds that was.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
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


def host_rounds(call: Any, rounds: int = 20, calls: int = 100) -> list[tuple[float, float]]:
    """[(microseconds until a call returns, ns of an empty loop's turn)], while the GPU sleeps: no call waits for it."""
    found = []
    for _ in range(rounds):
        call()
        torch.cuda.synchronize()
        torch.cuda._sleep(6_000_000)  # clock cycles, about 3 ms
        before = pace()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(((time.perf_counter() - start) / calls * 1e6, max(before, pace())))
    torch.cuda.synchronize()
    return found


def pace(turns: int = 3000) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        pass
    return (time.perf_counter() - start) / turns * 1e9


def empty_launch() -> Any:
    """A launch of a kernel that does nothing on torch's current stream."""
    driver = ctypes.CDLL("libcuda.so.1")
    text = b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()
    if driver.cuModuleLoadData(ctypes.byref(module), text) or driver.cuModuleGetFunction(
        ctypes.byref(kernel), module, b"nothing"
    ):
        raise RuntimeError("the driver does not take the empty kernel")
    one, nothing = ctypes.c_uint(1), ctypes.c_void_p()
    start = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))
    sizes = (one,) * 6
    return lambda: start(kernel, *sizes, 0, stream, nothing, nothing)


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


def measure(n: int, k: int, tokens: int, method: Any, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Times of a layer's calls, and on a GPU the calls whose time on the host is still to be measured."""
    calls: dict[str, Any] = {}
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
        kernel = ops.cuda_weight(packed, spec, dtype).of(dtype)  # what the layer calls
        calls["host_kernel"] = lambda: kernel(x)
        calls["host"] = lambda: layer(x)
        calls["host_operator"] = lambda: ops.linear(x, packed, spec, n, None)
        calls["host_dense_torch"] = lambda: dense(x)
        calls["host_floor"] = empty_launch()
        row["device"] = graph_microseconds(lambda: layer(x))
        row["device_dense_torch"] = graph_microseconds(lambda: dense(x))
    else:
        program, leaves = ops._dense_program(spec, "float32"), ops.leaves_of(packed, spec)
        row["dequantize"] = microseconds(lambda: program(leaves), wait)
        row["bridge"] = round(row["operator"] - row["dequantize"] - row["dense_torch"], 1)
    row["jax"] = microseconds(lambda: jitted(xj, qj), wait)
    return row, calls


def measure_host(rows: list[dict[str, Any]], calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds the time on the host of each row's calls: all rows in turn, six times. Returns how the cores ran."""
    found: list[dict[str, list[tuple[float, float]]]] = [{name: [] for name in row} for row in calls]
    for _ in range(6):
        for row, times in zip(calls, found, strict=True):
            for name, call in row.items():
                times[name] += host_rounds(call, rounds=8)
    paces = sorted(turn for times in found for values in times.values() for _, turn in values)
    if not paces:
        return {}
    for row, times in zip(rows, found, strict=True):
        for name, values in times.items():
            full = [took for took, turn in values if turn <= 1.25 * paces[0]]
            row[name] = round(min(took for took, _ in values), 1)
            row[f"{name}_median"] = round(statistics.median(took for took, _ in values), 1)
            row[f"{name}_median_full_speed"] = round(statistics.median(full), 1) if full else None
    share = sum(turn <= 1.25 * paces[0] for turn in paces) / len(paces)
    at = {f"p{percent}": round(paces[len(paces) * percent // 100], 1) for percent in (0, 10, 50, 90)}
    return {"full_speed": round(share, 2), "ns_of_an_empty_loops_turn": at}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    args = parser.parse_args()
    rows, calls = [], []
    for name, method in METHODS.items():
        for n, k, tokens in SHAPES[args.device]:
            row, left = measure(n, k, tokens, method, args.device)
            rows.append({"weight": name, "n": n, "k": k, "tokens": tokens, **row})
            calls.append(left)
    cores = measure_host(rows, calls)
    print(*rows, cores, sep="\n", flush=True)
    if args.write:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        write(f"torch_call_{args.device}", rows, device=device, threads=torch.get_num_threads(), **cores)


if __name__ == "__main__":
    main()
