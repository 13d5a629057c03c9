"""Times the 4-bit matmul kernels on an NVIDIA GPU against their limits and their peers.

    python benchmarks/gpu_matmul.py --out benchmarks/results [--seconds 400]
    python benchmarks/gpu_matmul.py --plot benchmarks/results/gpu_matmul_h100.json

Protocol: CUPTI kernel time, summed over all kernels of a call, median over calls; weights rotate over at least 1 GB, so
that neither codes nor scales are found in the L2 cache, while x and y are in it, as in a model. "bare_read_us" is a plain
CUDA kernel that reads as many bytes as the weight has for the kernel (codes, scales, zeros), the best of ten grids, in the
same process; "cublas_us" the faster of XLA's and torch's bf16 matmul (at M outside the main table torch's alone). From 256
rows of x on, where clocks change with the load, both are measured twice in turn, and of each the faster time counts. Every
row's error is against float32 with the dequantized weight. Rows run through `pallas_kernels.api.launch` with the committed
table, as a user's call does.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pallas_kernels.timing import ROTATE_BYTES, Jobs, copies, median_us, supervise

MAIN = (1, 8, 16, 64, 256, 4096)
SWEEP = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096, 8192)
LOOKED_UP = ("nf4_b64", "nf4_b64_dq", "fp4_b64")
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192))
GRIDS = ((132, 1024), (264, 1024), (264, 512), (528, 512), (132, 512), (396, 512), (528, 256), (1056, 256), (1056, 512),
         (2112, 256))  # fmt: skip

BARE = r"""
extern "C" __global__ void __launch_bounds__(1024) bare(const uint4* p, size_t n, uint4* out) {
  size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x;
  uint4 a = {0, 0, 0, 0};
  for (; i + 7 * step < n; i += 8 * step) {
    uint4 v[8];
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] = __ldg(p + i + j * step);
    #pragma unroll
    for (int j = 0; j < 8; j++) { a.x ^= v[j].x; a.y ^= v[j].y; a.z ^= v[j].z; a.w ^= v[j].w; }
  }
  for (; i < n; i += step) { uint4 v = __ldg(p + i); a.x ^= v.x; a.y ^= v.y; a.z ^= v.z; a.w ^= v.w; }
  if ((a.x ^ a.y ^ a.z ^ a.w) == 0x12345) out[0] = a;
}
"""


def forms() -> dict:
    from pallas_kernels.form import Form

    return {
        "w4a16_g128": Form(small=True),
        "nf4_b64": Form(
            "codebook", 4, 64, "bf16", table="nf4"
        ),  # float32 absmax: the kernel reads its rounded upper half
        "nf4_b64_dq": Form("codebook", 4, 64, "u8", table="nf4"),
        "fp4_b64": Form("codebook", 4, 64, "bf16", table="fp4"),
        "w4a16_g128_asym": Form(zero="u8"),
        "w4a16_actorder": Form(small=True),
        "w4a16_g32": Form(group=32, small=True),
        "hqq_g64": Form(group=64, scale="f16", zero="f16"),
    }


@functools.cache
def bare_kernel():
    import cupy

    return cupy.RawKernel(BARE, "bare", options=("-std=c++17",)), cupy.zeros(16, cupy.uint32)


@functools.cache
def bare_us(nbytes: int) -> float:
    """Best time of a plain read of `nbytes`."""
    import cupy
    import numpy as np

    kernel, scratch = bare_kernel()
    buffers = [cupy.zeros(nbytes // 16 * 4, cupy.uint32) for _ in range(copies(nbytes))]
    best = float("inf")
    for grid, block in GRIDS:

        def read(buffer, grid=grid, block=block):
            kernel((grid,), (block,), (buffer, np.uint64(nbytes // 16), scratch))
            cupy.cuda.Device().synchronize()

        best = min(best, median_us(read, [(b,) for b in buffers]))
    del buffers
    cupy.get_default_memory_pool().free_all_blocks()
    return best


def torch_us(function, arguments) -> float:
    import torch

    def call(*a):
        out = function(*a)
        torch.cuda.synchronize()
        return out is None

    return median_us(call, arguments)


def worker(jobs: Jobs) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from pallas_kernels import reference, tune
    from pallas_kernels.select import choose, device_key

    device = jax.devices()[0]
    key = device_key(device.device_kind)
    jobs.run("card", lambda: {"card": device.device_kind, "jax": jax.__version__, "torch": torch.__version__})
    jobs.run("roofline", lambda: {"roofline_gbs": (4 << 30) / bare_us(4 << 30) * 1e-3}, 60)
    dot = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    groups = []
    # Compilation runs ahead of the measurements on other cores: CUPTI's times are the device's.
    with ThreadPoolExecutor(14) as pool:
        for n, k in SHAPES:
            for name, form in forms().items():
                rows = SWEEP if name == "w4a16_g128" else (1, 8, 16, 64) if name in LOOKED_UP else (1,)
                todo = [(f"{name} {n}x{k} m={m}", m) for m in rows]
                todo = [t for t in todo if jobs.open(t[0])]
                shapes = jax.eval_shape(functools.partial(tune.random_weight, form, n, k))
                gathered = name == "w4a16_actorder"
                if gathered:
                    shapes = shapes.replace(perm=jax.ShapeDtypeStruct((k,), jnp.int32))
                choices = [choose(m, n, k, form, key, device.core_count, gathered and m == 1) for _, m in todo]
                built = [pool.submit(tune.build, m, c, shapes) for (_, m), c in zip(todo, choices)]
                groups.append((name, form, n, k, todo, choices, built))
        for name, form, n, k, todo, choices, built in groups:
            if not todo:
                continue
            w = tune.random_weight(form, n, k)
            if name == "w4a16_actorder":
                w = w.replace(perm=jax.random.permutation(jax.random.key(9), k).astype(jnp.int32))
            sets = tune.rotated(w)
            nbytes = sum(a.nbytes for a in (w.codes, w.scales, *(() if w.zeros is None else (w.zeros,))))
            x = jax.random.normal(jax.random.key(1), (max(m for _, m in todo), k), jnp.bfloat16)
            plain = jax.jit(reference.product, compiler_options={"xla_gpu_autotune_level": 0})  # only its values count
            expected = np.asarray(plain(x[:256], w))
            torch_bf16 = []
            if name == "w4a16_g128":
                first = jnp.asarray(jax.jit(reference.dense)(w), jnp.bfloat16)
                torch_bf16 = [torch.from_dlpack(first + 0) for _ in range(copies(n * k * 2))]
            for (job_name, m), choice, kernel in zip(todo, choices, built):
                dense = torch_bf16 if name == "w4a16_g128" else []
                signal.alarm(90)
                job = functools.partial(row, name, kernel.result(), choice, x[:m], sets, expected, nbytes, dense, dot)
                jobs.run(job_name, job, 25, kernel=name, m=m, n=n, k=k)


def row(name, kernel, choice, x, sets, expected, nbytes, dense, dot) -> dict:
    """One row of the results.

    Args:
      name: of the weight's form.
      dense: bf16 weights as torch arrays for the comparison with cuBLAS, or [].
      dot: XLA's matmul, jitted.
    """
    import jax
    import numpy as np
    import torch

    from pallas_kernels import tune

    m, k = x.shape
    few = slice(None if m < 512 else 3)
    out = tune.time_one(kernel, x, sets[few], expected)
    runs = [np.asarray(kernel(x, sets[0])[:256], np.float32) for _ in range(2)]
    out |= {"repeatable": bool((runs[0] == runs[1]).all()), "bare_read_us": bare_us(nbytes), "peers": {}}
    out |= {"choice": f"{choice.kernel} {choice.config}", "bytes": nbytes}
    if dense:
        tx = torch.from_dlpack(x)
        timers = {"torch": lambda: torch_us(lambda a, b: a @ b.T, [(tx, b) for b in dense[few]])}
        if m in MAIN:
            timers["xla"] = lambda: median_us(dot, [(x, jax.dlpack.from_dlpack(b)) for b in dense[few]])
        cublas = {name: timer() for name, timer in timers.items()}
        if m >= 256:  # the tensor cores' clocks change: all once more, and of each the faster time
            out["us"] = min(out["us"], median_us(kernel, [(x, w) for w in sets[few]]))
            cublas = {name: min(us, timers[name]()) for name, us in cublas.items()}
        out |= {"cublas_us": min(cublas.values()), "cublas": cublas}
        if m <= 16:
            out["peers"] = {"cublas_bf16": min(cublas.values())}
        if m in (1, 8, 16):
            out["peers"]["tinygemm_bf16_int4_g128"] = tinygemm_us(tx, dense[0].shape[0], k)
    if name == "nf4_b64" and importlib.util.find_spec("bitsandbytes"):
        try:
            out["peers"]["bitsandbytes_nf4"] = bitsandbytes_us(torch.from_dlpack(x), sets[0].shape[0], k)
        except Exception as e:  # a peer that fails leaves our figure as it is
            print(f"bitsandbytes {sets[0].shape} M={m}: {type(e).__name__}: {e}", file=sys.stderr)
    return out


def tinygemm_us(x, n: int, k: int) -> float:
    """torch's own int4 kernel on random codes of the same shape."""
    import torch

    def weight():
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.full((k // 128, n, 2), 0.004, dtype=torch.bfloat16, device="cuda")
        return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales

    sets = [weight() for _ in range(copies(n * k // 2))]
    return torch_us(lambda w, s: torch.ops.aten._weight_int4pack_mm(x, w, 128, s), sets)


def bitsandbytes_us(x, n: int, k: int) -> float:
    """bitsandbytes' NF4 product on random weights of the same shape."""
    import bitsandbytes
    import torch

    def weight():
        dense = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        return bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")

    sets = [weight() for _ in range(copies(n * k // 2))]
    return torch_us(lambda w, state: bitsandbytes.matmul_4bit(x, w.t(), quant_state=state), sets)


def collect(jobs: Jobs, out: Path, name: str = "gpu_matmul") -> Path:
    """The rows of a run of benchmarks/<name>.py as <name>_<card>.json."""
    from pallas_kernels.select import device_key

    card = jobs.done("card") or {}
    rows = [r for r in jobs.rows if "us" in r]
    fields = ("kernel", "m", "n", "k", "us", "bare_read_us", "cublas_us", "peers", "rel_err", "repeatable", "bytes", "cublas", "choice")  # fmt: skip
    lines = ",\n  ".join(json.dumps({f: r[f] for f in fields if f in r}) for r in rows)
    head = {
        "card": card.get("card"),
        "date": datetime.date.today().isoformat(),
        "versions": {k: card.get(k) for k in ("jax", "torch")},
        "command": f"python benchmarks/{name}.py",
        "rotated_bytes": ROTATE_BYTES,
    }
    if roofline := jobs.done("roofline"):
        head["roofline_gbs"] = roofline["roofline_gbs"]
    path = out / f"{name}_{device_key(card.get('card') or 'unknown')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')
    return path


def plot(path: Path) -> None:
    """Share of the limit against M: the limit is the slower of a bare read and the tensor core's best bf16 rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    rows = [r for r in data["rows"] if r["kernel"] == "w4a16_g128"]
    rate = max(2e-6 * r["m"] * r["n"] * r["k"] / r["cublas_us"] for r in rows if r.get("cublas_us"))  # TFLOP/s
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for n, k in SHAPES:
        mine = sorted((r for r in rows if (r["n"], r["k"]) == (n, k)), key=lambda r: r["m"])
        ms = [r["m"] for r in mine]
        limit = [max(r["bare_read_us"], 2e-6 * r["m"] * n * k / rate) for r in mine]
        axes[0].plot(ms, [b / r["us"] for b, r in zip(limit, mine)], marker="o", ms=3, label=f"{n}x{k}")
        axes[1].plot(ms, [r["cublas_us"] / r["us"] for r in mine], marker="o", ms=3, label=f"{n}x{k}")
    for axis, title in zip(axes, ("share of the limit (bare read or tensor core)", "times the speed of cuBLAS bf16")):
        axis.set(xscale="log", xlabel="rows of x (M)", title=title)
        axis.grid(alpha=0.3)
        axis.axhline(1, color="black", lw=0.8)
    axes[0].set_ylim(0, 1.05)
    axes[0].legend()
    figure.suptitle(
        f"int4 g128, {data['card']}, {data['date']}, jax {data['versions']['jax']}; limit {rate:.0f} TFLOP/s"
    )
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--jobs", type=Path, default=Path("/tmp/gpu_matmul.jsonl"))
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--collect", action="store_true", help="only write the JSON from --jobs")
    parser.add_argument("--plot", type=Path, help="only draw the plot of a result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
    elif args.worker:
        worker(Jobs(args.jobs))
    else:
        if not args.collect:
            supervise([__file__, "--worker"], args.jobs, args.seconds)
        print(collect(Jobs(args.jobs), args.out))


if __name__ == "__main__":
    main()
