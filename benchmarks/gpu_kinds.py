"""Times the kernels for weights beside int4 and NF4 on an NVIDIA GPU: 8-bit integers, 8-bit floats, MXFP4.

    python benchmarks/gpu_kinds.py --out benchmarks/results [--seconds 200]

Protocol as in `gpu_matmul.py`, whose parts run here: CUPTI time, rotated weights, a bare read of the same bytes, torch's
bf16 matmul (cuBLAS).
"""

from __future__ import annotations

import argparse
import functools
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_matmul as common

from pallas_kernels.timing import Jobs, copies, supervise

ROWS = (1, 8, 64, 256, 4096)
MORE = (1, 8, 16, 64, 128, 256, 512, 1024, 4096)
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
GPT_OSS = ((5760, 2880), (2880, 2880))  # an expert of gpt-oss: gate and up, down


def forms() -> dict:
    """name -> (form, shapes, rows of x)."""
    from pallas_kernels.form import Form

    return {
        "mxfp4": (Form("codebook", 4, 32, "e8m0", table="e2m1"), (*SHAPES, *GPT_OSS), ROWS),
        "e4m3_row": (Form("e4m3", 8, 0, "f32"), SHAPES, ROWS),
        "w8a16_g128": (Form(bits=8, zero_point=128), SHAPES, MORE),
        "w8a16_row": (Form(bits=8, group=0, scale="f32", zero_point=128), SHAPES[:1], ROWS),
        "w8a16_g128_asym": (Form(bits=8, zero="u8"), SHAPES[:1], ROWS),
        "e5m2_row": (Form("e5m2", 8, 0, "f32"), SHAPES[:1], ROWS),
    }


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
    groups = []
    with ThreadPoolExecutor(14) as pool:
        for name, (form, shapes, rows) in forms().items():
            for n, k in shapes:
                todo = [(f"{name} {n}x{k} m={m}", m) for m in rows]
                todo = [t for t in todo if jobs.open(t[0])]
                weight = jax.eval_shape(functools.partial(tune.random_weight, form, n, k))
                choices = [choose(m, n, k, form, key, device.core_count) for _, m in todo]
                built = [pool.submit(tune.build, m, c, weight) for (_, m), c in zip(todo, choices)]
                groups.append((name, form, n, k, todo, choices, built))
        dense: dict[tuple[int, int], list] = {}
        for name, form, n, k, todo, choices, built in groups:
            if not todo:
                continue
            w = tune.random_weight(form, n, k)
            sets = tune.rotated(w)
            nbytes = w.codes.nbytes + w.scales.nbytes + (0 if w.zeros is None else w.zeros.nbytes)
            x = jax.random.normal(jax.random.key(1), (max(m for _, m in todo), k), jnp.bfloat16)
            expected = np.asarray(jax.jit(reference.product)(x[:256], w))
            if (n, k) not in dense:
                dense.clear()
                first = jnp.asarray(jax.jit(reference.dense)(w), jnp.bfloat16)
                dense[n, k] = [torch.from_dlpack(first + 0) for _ in range(copies(n * k * 2))]
            for (job_name, m), choice, kernel in zip(todo, choices, built):
                signal.alarm(90)
                measured = functools.partial(row, kernel.result(), choice, x[:m], sets, expected, nbytes, dense[n, k])
                jobs.run(job_name, measured, 25, kernel=name, m=m, n=n, k=k)


def row(kernel, choice, x, sets, expected, nbytes, dense) -> dict:
    """One row of the results; arguments as those of `gpu_matmul.row`."""
    import torch

    out = common.row("", kernel, choice, x, sets, expected, nbytes, [], None)
    tx, few = torch.from_dlpack(x), slice(None if x.shape[0] < 512 else 3)
    del out["peers"]
    return out | {"cublas_us": common.torch_us(lambda a, b: a @ b.T, [(tx, b) for b in dense[few]])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--jobs", type=Path, default=Path("/tmp/gpu_kinds.jsonl"))
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Jobs(args.jobs))
        return
    supervise([__file__, "--worker"], args.jobs, args.seconds)
    print(common.collect(Jobs(args.jobs), args.out, "gpu_kinds"))


if __name__ == "__main__":
    main()
