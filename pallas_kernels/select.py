"""Which kernel and configuration multiplies: a plain table from measurements, and an estimate where it is silent.

`tuned/<device>.json` holds rows {"kind", "bits", "n", "k", "m", "kernel", "config"}; a row serves all M up to its `m`
down to the next smaller one of the same weight. Rows of kind "nested" and "mxfp4" go ahead of those of their codes.
Of several rows with one `m` the first that can run is taken: the direct kernel knows no act-order, and a fused product
asks for the streaming kernel. `python -m pallas_kernels.tune` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.form import CHUNK, ROWS, Form
from pallas_kernels.skeletons import direct, gemm, stream

TABLES = Path(__file__).parent / "tuned"
KERNELS: dict[str, Any] = {"direct": direct, "stream": stream, "gemm": gemm}

# Architectures (compute capability) with kernels, and multiprocessors to assume where no device can be asked.
ARCHITECTURES = {"9.0": 132}
# In place of a kind, by type of scales: rows for weights that want other configurations than those of their codes.
SCALED = {"u8": "nested", "e8m0": "mxfp4"}


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


@functools.cache
def measured_rows(device: str) -> dict[tuple, list[tuple[int, Choice]]]:
    """`table` of a device; what was not measured on it is as on an H100."""
    own, common = table(device), table("h100")
    out = {}
    for key in common | own:
        measured = {m for m, _ in own.get(key, ())}
        rows = [*own.get(key, ()), *(row for row in common.get(key, ()) if row[0] not in measured)]
        out[key] = sorted(rows, key=lambda r: r[0])
    return out


def choose(
    m: int,
    n: int,
    k: int,
    form: Form,
    device: str = "h100",
    multiprocessors: int = 132,
    gathered: bool = False,
    kernels: tuple[str, ...] = tuple(KERNELS),
) -> Choice:
    """The kernel for x [m, k] and a weight [n, k].

    Args:
      gathered: an act-order weight and one row of x.
      kernels: names of those to choose among.
    """
    entries = measured_rows(device)
    rows: list[tuple[int, Choice]] = []
    own = [(SCALED[form.scale], form.bits)] if form.scale in SCALED else []
    # where a decode function was not measured, what is best for integers of its width, or for int4, is a good guess
    for key in (*own, form.decode, ("affine", form.bits), ("affine", 4)):
        most = max((largest for largest, _ in rows), default=0)
        rows += [r for r in entries.get((*key, n, k), []) if r[0] > most]
    rows = [(largest, c) for largest, c in rows if m <= largest and c.kernel in kernels]
    for largest, choice in rows:
        if largest == rows[0][0] and fits(choice, m, n, k, form, gathered):
            return choice
    return estimate(m, n, k, form, multiprocessors, gathered, kernels)


def fits(choice: Choice, m: int, n: int, k: int, form: Form, gathered: bool = False) -> bool:
    if choice.kernel == "direct" and gathered:
        return False
    plan = KERNELS[choice.kernel].Plan(m, n, k, form, choice.config, "bf16")
    if gathered and choice.kernel == "stream":
        plan = dataclasses.replace(plan, gathered=True)
    return plan.reason() is None


def candidates(m: int, n: int, k: int, form: Form, multiprocessors: int = 132, gathered: bool = False) -> list[Choice]:
    """Configurations that can run; those for few rows first, in the order of preference."""
    few: list[Choice] = []
    if m <= stream.MAX_ROWS:
        few = [Choice("direct", c) for c in directs(m, n, k, multiprocessors, form)]
        few += [Choice("stream", c) for c in streams(m, n, k, multiprocessors, gathered, form.bits)]
    out = [c for c in few if fits(c, m, n, k, form, gathered)]
    # also where a few rows of x are more than shared memory holds
    if not out or m > 8 or many_rows(m, n, k, form, multiprocessors):
        many = (Choice("gemm", config) for config in tilings(m, form, multiprocessors))
        out += [c for c in many if fits(c, m, n, k, form, gathered)]
    return out


def is_narrow(n: int, multiprocessors: int) -> bool:
    """Whether a weight has few tiles for each multiprocessor."""
    return -(-n // ROWS) <= 4 * multiprocessors


def many_rows(m: int, n: int, k: int, form: Form, multiprocessors: int) -> bool:
    """Whether the wgmma kernel is faster than the streaming one (measured): for more than 8 rows, unless a wide weight is
    decoded by arithmetic, and for 4 rows of a long, narrow one.
    """
    narrow = is_narrow(n, multiprocessors)
    return (m > 8 and (form.kind == "codebook" or narrow)) or (m >= 4 and narrow and k > 128 * CHUNK)


def directs(m: int, n: int, k: int, multiprocessors: int, form: Form) -> Iterator[direct.Config]:
    """Configurations of the direct kernel, the best first, where each block has a tile; the rules are those that the
    shapes of the H100's and the H200's table follow. Two blocks share K where one would load more of x than of the weight.
    As much of x as possible is in registers where it is little or codes are looked up, since shared memory has enough to
    do; parts of K are shorter then. Nested scales want short parts, and of many rows the wgmma kernel.
    """
    nested, looked_up = form.scale == "u8", form.kind == "codebook"
    if nested and m > 8:
        return
    narrow = is_narrow(n, multiprocessors)
    out: list[tuple[tuple[bool, int], direct.Config]] = []
    for warps in (16, 8):
        for cluster in (2, 1) if m > 8 and narrow else (1, 2):
            chunks = -(-k // CHUNK) // (warps * cluster)
            long = chunks > 4
            if not chunks or -(-n // ROWS) * cluster < multiprocessors or (nested and long):
                continue
            # 16 warps of many rows and chunks want more registers than there are, where codes are looked up
            crowded = looked_up and warps > 8 and m > 8 and long
            config = direct.Config(warps, cluster, multiprocessors // cluster * cluster)
            plan = direct.Plan(m, n, k, form, config, "bf16")
            if looked_up or not long:
                most = min(chunks, 4 if m <= 8 or looked_up else 1)
                config = dataclasses.replace(config, held=plan.most_chunks_held(most))
            out.append(((crowded, chunks if looked_up and long else 0), config))
    yield from (config for _, config in sorted(out, key=lambda c: c[0]))


def streams(
    m: int, n: int, k: int, multiprocessors: int, gathered: bool = False, bits: int = 4
) -> Iterator[stream.Config]:
    """Configurations of the streaming kernel, the best first, also such as cannot run.

    Two copies in the ring of a warp are enough, and more are slower (measured): what waits in the copy engine and in L2
    delays x. Every block loads its part of x through L2 at a third more than the speed of the memory, so K is shared by
    as many blocks as keep that short beside the weight.
    """
    tiles = -(-n // ROWS)
    if m == 1 and not gathered:
        # two small blocks a processor end more smoothly, unless their number does not suit the tiles
        even = {blocks: tiles / blocks / -(-tiles // blocks) for blocks in (multiprocessors, 2 * multiprocessors)}
        chunks = (4 if is_narrow(n, multiprocessors) else 8) * 4 // bits
        small = stream.Config(4, 1, chunks, ring(4, chunks, bits), 2 * multiprocessors, unroll=4)
        large = stream.Config(8, 1, chunks, ring(8, chunks, bits), multiprocessors)
        yield from (small, large) if even[2 * multiprocessors] >= even[multiprocessors] else (large, small)
    narrow = is_narrow(n, multiprocessors)
    chunks = (4 if narrow and k <= 128 * CHUNK else 8) * 4 // bits
    share = 1 << 15 if narrow else 1 << 16  # bytes of x that a block should load
    first = 1 if m * k * 2 <= 1 << 15 else next((c for c in (2, 4) if m * k * 2 <= c * share), 4)
    if gathered:
        first, chunks = 2, 8 * 4 // bits  # every block loads the whole row, and orders its part

    def copied(cluster: int) -> int:
        """Chunks of a copy, which must divide those of a block."""
        block = -(-k // CHUNK) // cluster
        return max((c for c in range(1, chunks + 1) if block % c == 0 and block), default=0)

    # below four chunks a copy the copies cost more than x does
    for cluster in sorted(dict.fromkeys((first, 4, 2, 8, 1)), key=lambda c: -min(copied(c), 16 // bits)):
        blocks = whole_clusters(multiprocessors, cluster)
        for piece in (chunks, 16 // bits):
            yield stream.Config(8, cluster, piece, ring(8, piece, bits), blocks)


def ring(warps: int, chunks: int, bits: int = 4) -> int:
    """Bytes for two copies of each warp, of codes and the scales of short groups."""
    return warps * chunks * (256 * bits + 64)


def whole_clusters(blocks: int, cluster: int) -> int:
    """Blocks that run at once in clusters: some processors of an H100 have no three neighbours (30 fours of 33), some
    eights no eighth (14 of 16)."""
    if cluster > 4:
        return blocks * 28 // 33 // cluster * cluster
    return blocks * 10 // 11 if cluster > 2 else blocks // cluster * cluster


def tilings(m: int, form: Form, multiprocessors: int) -> Iterator[gemm.Config]:
    """Configurations of the wgmma kernel, also such as cannot run."""
    tiles = {-(-m // (16 * parts)) * 16 for parts in range(1, 9)} | {t for t in (128, 192, 256) if t < m}
    for tile_m, wn in itertools.product(sorted(tiles), WIDEST):
        if not min(m, 32) <= tile_m <= WIDEST[wn]:
            continue
        one = tile_m > 128 or tile_m * wn > 256 + 128 * (wn < 4) or (form.group and form.group % CHUNK)
        for (share, split, even), ahead in itertools.product(CLUSTERS, (False, True)):
            if ahead and tile_m <= 64:
                continue
            blocks = whole_clusters(multiprocessors, share * split)
            chunks = 1 if one else 2
            for tail in (TAIL // (chunks * CHUNK), 0) if (share, split) == (1, 2) and tile_m >= 96 else (0,):
                yield gemm.Config(tile_m, wn, chunks, 0, share, split, blocks, 0, even, ahead, tail=tail)
        if m <= tile_m <= 128:
            yield from shared_tilings(m, tile_m, wn, multiprocessors)
    if m > 1024:
        for m_group in (2, 4, 8):
            yield gemm.Config(256, 2, 1, 0, 2, 1, whole_clusters(multiprocessors, 2), m_group)


def shared_tilings(m: int, tile_m: int, wn: int, multiprocessors: int) -> Iterator[gemm.Config]:
    """One tile of x, and warpgroups that share units of the weight or have several."""
    for units, split, chunks in itertools.product(UNITS[wn], (1, 2), (2, 3, 4, 8)):
        held = -(-units // wn) * tile_m  # accumulators
        if held <= WIDEST[wn] and tile_m * chunks <= 256 and (chunks == 3) == (wn == 3):
            blocks = multiprocessors // split * split
            yield gemm.Config(tile_m, wn, chunks, 0, 1, split, blocks, ahead=False, units=units)


@functools.lru_cache(4096)
def estimate(
    m: int,
    n: int,
    k: int,
    form: Form,
    multiprocessors: int = 132,
    gathered: bool = False,
    kernels: tuple[str, ...] = tuple(KERNELS),
) -> Choice:
    """The candidate with the smallest estimated time.

    Raises:
      ValueError: no kernel can run this shape.
    """
    choices = [c for c in candidates(m, n, k, form, multiprocessors, gathered) if c.kernel in kernels]
    if not choices:
        raise ValueError(f"no kernel for {m} rows and a weight of {n}x{k}")
    first = choices[0].kernel
    if first == "direct" or (first == "stream" and not many_rows(m, n, k, form, multiprocessors)):
        return choices[0]
    return min(choices, key=lambda c: microseconds(c, m, n, k, form))


# Largest tile of x for 1 to 4 warpgroups: the accumulators stay in registers.
WIDEST = {1: 256, 2: 256, 3: 192, 4: 128}
# Units of a block by its warpgroups, also less than one for each, and more.
UNITS: dict[int, tuple[int, ...]] = {1: (), 2: (1,), 3: (1,), 4: (1, 2, 4, 6, 7)}
# Weights along K that two blocks keep for their own columns each, while sums are on their way (measured).
TAIL = 384
# share, split, even
CLUSTERS = ((1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (1, 4, False), (1, 1, True))
# Measured on an H100: cycles of one k16 step of one warpgroup, decode included, with 1 to 4 warpgroups at work.
CYCLES = {
    1: {16: 40, 32: 45, 64: 56, 96: 68, 128: 80, 160: 95, 192: 110, 256: 145},
    2: {16: 30, 32: 34, 64: 45, 96: 56, 128: 67, 160: 81, 192: 97, 256: 129},
    3: {16: 27, 32: 31, 64: 42, 96: 49, 128: 65, 160: 81, 192: 97},
    4: {16: 26, 32: 30, 64: 40, 96: 51, 128: 68},
}
CLOCK = 1750  # cycles of a microsecond, under load
DRAM, L2 = 2.7e6, 10e6  # bytes of a microsecond
PIECES = {1: 0.75, 2: 1.0}  # share of that in copies of 1 or 2 chunks; longer ones are faster
START = 3.5  # microseconds until the first wgmma, and after the last store


def microseconds(choice: Choice, m: int, n: int, k: int, form: Form) -> float:
    """Rough time of a launch: the slowest of tensor core, L2 and DRAM, and some of the faster ones' time."""
    if choice.kernel != "gemm":
        return float("inf")
    c = choice.config
    plan = gemm.Plan(m, n, k, form, c, "bf16")

    def busy(units: float) -> float:
        """Cycles of a pass in which a block has this many units to multiply, perhaps half a one."""
        whole, half = int(units), units % 1
        out = whole * _cycles(whole, c.tile_m) if whole else 0
        return out + half * ((whole + 1) * _cycles(whole + 1, c.tile_m) - out) if half else out

    if c.even:
        most = -(-plan.units // (plan.tiles // plan.m_tiles)) / 2  # units of a block
        passes, rest = divmod(most, c.wn)
        cycles = passes * busy(c.wn) + busy(rest)
        passes += rest > 0
    else:
        passes = -(-plan.tiles // plan.clusters)
        cycles = passes * plan.block_units * _cycles(c.wn, c.tile_m) / c.split
    tensor = cycles * k / 16 / CLOCK
    weight = n * k * form.bits / 8 * 1.06
    blocks = plan.clusters * plan.cluster
    l2 = passes * k / c.split * (c.tile_m * 2 / c.share + 34 * plan.block_units) * blocks / L2
    dram = weight / DRAM / PIECES.get(c.chunks, 1.15)
    exchange = (900 + (2 if c.tail else 5) * c.tile_m * plan.block_units) if c.split > 1 else 0
    ends = (passes * (900 + 6 * c.tile_m) + exchange + 400 * (plan.depth > 1)) / CLOCK
    return max(tensor, l2, dram) + 0.15 * min(tensor, max(l2, dram)) + ends + START


def _cycles(warpgroups: int, tile_m: int) -> float:
    known = sorted(CYCLES[warpgroups].items())
    for (low, a), (high, b) in itertools.pairwise(known):
        if tile_m <= high:
            return a + (b - a) * max(0, tile_m - low) / (high - low)
    return known[-1][1]
