"""Measures configurations and writes the table that `select` reads: `python -m pallas_kernels.tune`.

    python -m pallas_kernels.tune --jobs tune.jsonl --seconds 300 --rows 1 16 256
    python -m pallas_kernels.tune --jobs tune.jsonl --write "NVIDIA H200"   # results of elsewhere -> tuned/h200.json

Each configuration is checked against float32 before it counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import api, layout, reference, select
from pallas_kernels.decode import DECODES
from pallas_kernels.form import Form, Packed
from pallas_kernels.select import Choice
from pallas_kernels.skeletons import direct, stream
from pallas_kernels.timing import Jobs, copies, median_us, supervise

# Linear layers of 8B and 70B models: square, fused q/k/v, fused gate/up, down, and gate/up of 70B.
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (6144, 4096))
FORMS = {
    ("affine", 4): Form(small=True),
    ("affine", 8): Form(bits=8, zero_point=128),
    ("codebook", 4): Form("codebook", 4, 64, "bf16", table="nf4"),
    ("nested", 4): Form("codebook", 4, 64, "u8", table="nf4"),
    ("mxfp4", 4): Form("codebook", 4, 32, "e8m0", table="e2m1"),
}
ROWS = {
    ("affine", 4): (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096, 8192),
    ("affine", 8): (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    ("codebook", 4): (1, 2, 8, 16, 32, 48, 64, 96, 128),
    ("nested", 4): (1, 2, 8, 16, 32, 48, 64, 96, 128),
    ("mxfp4", 4): (1, 8, 16),
}
MAX_ERROR = 1e-2
TYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_weight(form: Form, n: int, k: int, seed: int = 0) -> Packed:
    """A packed weight of random codes and scales."""
    keys = jax.random.split(jax.random.key(seed), 4)
    most = (1 << form.bits) - 1
    codes = jax.random.bits(keys[0], (n, k), jnp.uint8) & most
    groups = form.groups(k)
    tables = {}
    if form.kind == "codebook" and not form.table:
        tables["table"] = jnp.linspace(-1, 1, 16) ** 3
    codes &= {"e4m3": 0xF7, "e5m2": 0xBF}.get(form.kind, most)  # no NaN, nothing infinite
    if form.scale == "e8m0":
        scales = 120 + (jax.random.bits(keys[1], (n, groups), jnp.uint8) & 7)
    elif form.scale == "u8":
        scales = jax.random.bits(keys[1], (n, groups), jnp.uint8)
        second = jax.random.uniform(keys[2], (-(-n * groups // 256),)) * 0.02 + 0.001
        tables |= {"table2": jnp.linspace(-1, 1, 256) ** 3, "absmax2": second, "offset": jnp.float32(0.03)}
    else:
        scales = (jax.random.uniform(keys[1], (n, groups)) * 0.02 + 0.001).astype(TYPES[form.scale])
    zeros = None
    if form.zero == "u8":
        zeros = layout.pack_rows(jax.random.bits(keys[3], (n, groups), jnp.uint8) & most)
    elif form.zero:
        zeros = layout.pack_rows((jax.random.uniform(keys[3], (n, groups)) * most).astype(TYPES[form.zero]))
    packed = layout.pack_codes(codes, DECODES[form.decode].order)
    return Packed(packed, layout.pack_rows(scales), zeros, tables, None, form, (n, k))


def rotated(w: Packed) -> list[Packed]:
    return [w, *(jax.tree.map(lambda a: a + 0, w) for _ in range(copies(w.codes.nbytes) - 1))]


def configurations(m: int, n: int, k: int, form: Form, sms: int) -> list[Choice]:
    """What is worth measuring at a shape."""
    out: list[Choice] = []

    def put(warps: int, cluster: int, chunks: int, blocks: int, unroll: int = 8, height: int = 1) -> None:
        chunks = chunks * 4 // form.bits  # copies of the same size
        ring = select.ring(warps, chunks * height, form.bits)
        config = stream.Config(warps, cluster, chunks, ring, blocks, unroll=unroll, height=height)
        out.append(Choice("stream", config))

    if m == 1:
        for chunks in (4, 8):
            put(4, 1, chunks, 2 * sms)
            put(8, 1, chunks, sms)
        put(4, 1, 8, 2 * sms, unroll=4)
        put(8, 2, 8, sms)
    elif m <= 16:
        for cluster in (1, 2, 4, 8):
            blocks = select.whole_clusters(sms, cluster)
            for warps, chunks in ((8, 4), (8, 8), (12, 4)):
                put(warps, cluster, chunks, blocks)
            put(8, cluster, 4, blocks, height=2)
        if m > 2:  # rows for which `fused` asks for a configuration of the streaming kernel
            out += best_estimates(m, n, k, form, sms, 6)
    if m <= 16:
        for warps, cluster, held in itertools.product((8, 16), (1, 2), (0, 2, 4)):
            out.append(Choice("direct", direct.Config(warps, cluster, sms // cluster * cluster, held)))
        return [c for c in dict.fromkeys(out) if select.fits(c, m, n, k, form)]
    return best_estimates(m, n, k, form, sms)


def best_estimates(m: int, n: int, k: int, form: Form, sms: int, count: int = 12) -> list[Choice]:
    """The choices of the wgmma kernel with the smallest estimated times, and the one in use."""
    choices = [c for c in select.candidates(m, n, k, form, sms) if c.kernel == "gemm"]
    choices.sort(key=lambda c: select.microseconds(c, m, n, k, form))
    used = select.choose(m, n, k, form, multiprocessors=sms)
    return list(dict.fromkeys([*choices[:count], used]))


def measure(jobs: Jobs, rows: list[int] | None = None, forms: list[str] | None = None) -> None:
    """The worker: every configuration of every shape (of these rows of x and forms, if given) that has no result yet."""
    if reason := api.device_reason():
        raise SystemExit(f"pallas_kernels.tune: nothing to measure here, {reason}")
    device = jax.devices()[0]
    for (kind, bits), form in FORMS.items():
        for n, k in SHAPES if forms is None or f"{kind}{bits}" in forms else ():
            todo = [
                (f"{kind}{bits} {n}x{k} m={m} {c}", m, c)
                for m in ROWS[kind, bits]
                if rows is None or m in rows
                for c in configurations(m, n, k, form, device.core_count)
            ]
            todo = [t for t in todo if jobs.open(t[0])]
            if not todo:
                continue
            w = random_weight(form, n, k)
            sets = rotated(w)
            most = max(m for _, m, _ in todo)
            x = jax.random.normal(jax.random.key(1), (most, k), jnp.bfloat16)
            expected = np.asarray(jax.jit(reference.product)(x[:256], w))
            shapes = jax.eval_shape(lambda w: w, w)

            signal.alarm(90)
            with ThreadPoolExecutor(12) as pool:
                built = list(pool.map(lambda t, shapes=shapes: build(t[1], t[2], shapes), todo))
            for (name, m, choice), kernel in zip(todo, built):
                job = functools.partial(time_one, kernel, x[:m], sets if m < 512 else sets[:3], expected)
                config = dataclasses.asdict(choice.config)
                jobs.run(name, job, 10, kind=kind, bits=bits, n=n, k=k, m=m, kernel=choice.kernel, config=config)


def build(m: int, choice: Choice, weight: Any) -> Any:
    """The compiled kernel for m rows and a weight of these shapes, or what went wrong."""
    x = jax.ShapeDtypeStruct((m, weight.shape[1]), jnp.bfloat16)
    try:
        return jax.jit(api.launch, static_argnames="choice").lower(x, weight, choice=choice).compile()
    except Exception as e:
        return e


def time_one(kernel: Any, x: jax.Array, sets: list[Packed], expected: np.ndarray) -> dict:
    """Time over rotated weights, and error of the first rows on the first weight."""
    if isinstance(kernel, Exception):
        raise kernel
    want = expected[: x.shape[0]]
    got = np.asarray(kernel(x, sets[0])[: want.shape[0]], np.float32)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return {"us": median_us(kernel, [(x, s) for s in sets]), "rel_err": error}


def write(jobs: Jobs, device: str) -> Path:
    """The fastest configuration of each kernel for each shape and M into the device's table, the fastest kernel first: not
    every product can run on each. What was not measured again stays.

    Raises:
      ValueError: nothing was measured.
    """
    path = select.TABLES / f"{select.device_key(device)}.json"
    best: dict[tuple, dict] = {}
    for row in sorted((r for r in jobs.rows if r.get("us") and r["rel_err"] < MAX_ERROR), key=lambda r: r["us"]):
        best.setdefault((*_key(row), row["kernel"]), row)
    if not best:
        raise ValueError(f"{jobs.path}: no configuration was measured, {path} stays as it is")
    measured = {key[:-1] for key in best}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    fields = ("kind", "bits", "n", "k", "m", "kernel", "config", "us")
    rows = [{f: row[f] for f in fields} for row in best.values()] + [r for r in before if _key(r) not in measured]
    head = {"device": device, "date": datetime.date.today().isoformat(), "jax": jax.__version__}
    lines = ",\n  ".join(json.dumps(r) for r in sorted(rows, key=_key))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')
    return path


def _key(row: dict) -> tuple:
    return row["kind"], row["bits"], row["n"], row["k"], row["m"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, default=Path("tune.jsonl"), help="results, one JSON line each")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--write", metavar="DEVICE", help="write the table from the results and end")
    parser.add_argument("--rows", type=int, nargs="+", help=f"rows of x, among {ROWS['affine', 4]}; all by default")
    names = [f"{kind}{bits}" for kind, bits in FORMS]
    parser.add_argument("--forms", nargs="+", choices=names, help="kinds of weights; all by default")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(Jobs(args.jobs), args.rows, args.forms)
        return
    if not args.write:
        only = ["--rows", *map(str, args.rows)] if args.rows else []
        only += ["--forms", *args.forms] if args.forms else []
        supervise(["-m", "pallas_kernels.tune", "--worker", *only], args.jobs, args.seconds)
    device = args.write or jax.devices()[0].device_kind
    try:
        print(write(Jobs(args.jobs), device))
    except ValueError as e:
        raise SystemExit(f"pallas_kernels.tune: {e}") from None


if __name__ == "__main__":
    main()
