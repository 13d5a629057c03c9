"""Which kernel and configuration multiplies: a plain table from measurements, and an estimate where it is silent.

`tuned/<device>.json` holds rows {"kind", "bits", "n", "k", "m", "kernel", "config"}; a row serves all M up to its `m`
down to the next smaller one of the same weight. `python -m pallas_kernels.tune` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from pallas_kernels.form import CHUNK, Form
from pallas_kernels.skeletons import gemm, stream

TABLES = Path(__file__).parent / "tuned"
KERNELS: dict[str, Any] = {"stream": stream, "gemm": gemm}
M_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# Architectures (compute capability) with kernels, and multiprocessors to assume where no device can be asked.
ARCHITECTURES = {"9.0": 132}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and its configuration; hashable, so that equal choices compile once."""

    kernel: str
    config: Any


def device_key(kind: str) -> str:
    """Name of the table of a device, e.g. "NVIDIA H100 80GB HBM3" -> "h100"."""
    name = kind.lower()
    for known in ("h100", "h200"):
        if known in name:
            return known
    return name.replace(" ", "_")


@functools.cache
def table(device: str) -> dict[tuple, list[tuple[int, Choice]]]:
    """(kind, bits, n, k) -> [(largest M, choice)], ascending."""
    path = TABLES / f"{device}.json"
    out: dict[tuple, list[tuple[int, Choice]]] = {}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            config = KERNELS[row["kernel"]].Config(**row["config"])
            key = (row["kind"], row["bits"], row["n"], row["k"])
            out.setdefault(key, []).append((row["m"], Choice(row["kernel"], config)))
    for rows in out.values():
        rows.sort(key=lambda r: r[0])
    return out


def choose(
    m: int, n: int, k: int, form: Form, device: str = "h100", multiprocessors: int = 132, gathered: bool = False
) -> Choice:
    """The kernel for x [m, k] and a weight [n, k]. `gathered`: an act-order weight and one row of x."""
    entries = table(device) or table("h100")  # a Hopper card that was not measured
    own = entries.get((form.kind, form.bits, n, k), [])
    measured = max((largest for largest, _ in own), default=0)
    # where a decode function was not measured, what is best for int4 is a good guess
    other = [r for r in entries.get(("affine", form.bits, n, k), []) if r[0] > measured]
    choice = next((c for largest, c in [*own, *other] if m <= largest), None)
    if choice is not None and fits(choice, m, n, k, form, gathered):
        return choice
    return estimate(m, n, k, form, multiprocessors, gathered)


def fits(choice: Choice, m: int, n: int, k: int, form: Form, gathered: bool = False) -> bool:
    if choice.kernel == "gemm" and form.scale == "u8":
        form = dataclasses.replace(form, scale="bf16")
    plan = KERNELS[choice.kernel].Plan(m, n, k, form, choice.config, "bf16")
    if gathered and choice.kernel == "stream":
        plan = dataclasses.replace(plan, gathered=True)
    return plan.reason() is None


def candidates(m: int, n: int, k: int, form: Form, multiprocessors: int = 132, gathered: bool = False) -> list[Choice]:
    """Configurations that can run, in no order."""
    out = []
    if m <= stream.MAX_ROWS:
        for warps, cluster, ring in ((8, 1, 96), (8, 2, 96), (4, 1, 48), (16, 1, 128), (4, 4, 48)):
            blocks = multiprocessors * (2 if warps == 4 and cluster == 1 else 1)
            if cluster == 4:  # some processors of an H100 have no three neighbours: 30 clusters fit, not 33
                blocks = blocks * 10 // 11
            blocks = blocks // cluster * cluster
            parts = -(-k // CHUNK) // (warps * cluster)
            room = (ring << 10) // warps // 3  # three copies on their way at least
            sizes = [c for c in (8, 14, 7, 4, 2, 1) if parts % c == 0 and c * 544 <= room] or [4]
            out.append(Choice("stream", stream.Config(warps, cluster, sizes[0], ring << 10, blocks)))
    if not out or m > 8:
        for tile_m in (16, 32, 64, 128, 192, 256):
            for wn in (1, 2, 4) if tile_m <= 128 else (2,):
                for split in (1, 2):
                    chunks = 1 if tile_m > 128 or (form.group and form.group % CHUNK) else 2
                    out.append(
                        Choice("gemm", gemm.Config(tile_m, wn, chunks, 0, 1, split, multiprocessors // split * split))
                    )
    return [c for c in out if fits(c, m, n, k, form, gathered)]


@functools.lru_cache(4096)
def estimate(m: int, n: int, k: int, form: Form, multiprocessors: int = 132, gathered: bool = False) -> Choice:
    """The candidate with the smallest estimated time.

    Raises:
      ValueError: no kernel can run this shape.
    """
    choices = candidates(m, n, k, form, multiprocessors, gathered)
    if not choices:
        raise ValueError(f"no kernel for {m} rows and a weight of {n}x{k}")
    if m <= stream.MAX_ROWS and choices[0].kernel == "stream":
        return choices[0]
    return min(choices, key=lambda c: _cycles(c, m, n, k, form, multiprocessors))


def _cycles(choice: Choice, m: int, n: int, k: int, form: Form, multiprocessors: int) -> float:
    """Rough cycles of a launch: the slower of tensor core, L2 and DRAM over the turns of the busiest block."""
    if choice.kernel == "stream":
        return float("inf")
    c = choice.config
    plan = gemm.Plan(m, n, k, dataclasses.replace(form, scale="bf16") if form.scale == "u8" else form, c, "bf16")
    turns = -(-plan.tiles // plan.clusters)
    tensor = c.wn * c.tile_m * 2 * c.chunks + (160 if c.wn > 1 else 260)
    l2 = plan.stage_bytes / 48
    dram = plan.code_bytes * min(plan.clusters * plan.cluster, multiprocessors) / 1750
    step = max(tensor, l2, dram)
    exchange = c.tile_m * c.wn * 64 * 4 / 24 if c.split > 1 else 0
    return turns * (step * -(-plan.steps // c.split) + 1500 + exchange)
