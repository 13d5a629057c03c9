"""Kernel times from CUPTI over rotated operands, and jobs that may hang in processes that may die."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

# Over 300 MB, six times the L2 cache of an H100, scales stay in the cache from launch to launch, because the codes ask to
# be evicted first, and some codes do: up to 5 % faster than a model ever is (measured; no change beyond 1 GB).
ROTATE_BYTES = 1 << 30

# Kernels of milliseconds, one behind the other for longer, can drive a GPU to its power limit, where its clocks fall.
LONGEST_S = 0.03


def copies(nbytes: int, most: int = 128) -> int:
    """How many copies of a weight make ROTATE_BYTES, so that no launch finds its weight in the cache."""
    return max(1, min(most, -(-ROTATE_BYTES // nbytes)))


def median_us(function: Callable, arguments: Sequence[tuple]) -> float:
    """Median over calls of the summed time of all kernels of a call, in microseconds.

    The collector sees every kernel of the process, also those of torch and CuPy; their functions must end with a
    synchronization. Results are dropped as they come, so that the next ones lie where they lay: in the cache, as in a
    model.
    """
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext

    def run(calls: int) -> None:
        for a in itertools.islice(itertools.cycle(arguments), calls):
            result = function(*a)
        jax.block_until_ready(result)

    run(len(arguments))
    start = time.perf_counter()
    run(len(arguments))
    rounds = min(16 // len(arguments), int(LONGEST_S / (time.perf_counter() - start)))
    calls = max(2, rounds) * len(arguments)
    cupti._cupti_init()
    try:
        run(calls)
    finally:
        times = [ms * 1e3 for _, ms in cupti._cupti_get_timings(True)]
    if len(times) % calls:
        raise RuntimeError(f"{len(times)} kernels for {calls} calls")
    per = len(times) // calls
    return statistics.median(sum(times[i * per : (i + 1) * per]) for i in range(calls))


class Jobs:
    """Results of named jobs in a JSON-lines file. A job that is in the file is not run again.

    A kernel that hangs cannot be stopped: the alarm ends the process, and `supervise` starts another one, which goes on
    behind the job that hung.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.started = {r["job"] for r in self.rows}

    def done(self, name: str) -> dict | None:
        """The result of a job that succeeded."""
        found = [r for r in self.rows if r["job"] == name and not r.get("started") and "error" not in r]
        return found[-1] if found else None

    def open(self, name: str) -> bool:
        return name not in self.started

    def run(self, name: str, job: Callable[[], dict], limit_s: int = 20, **info: Any) -> None:
        if not self.open(name):
            return
        self._write({"job": name, "started": True, **info})
        signal.alarm(limit_s)
        try:
            result = job()
        except Exception as e:
            result = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        signal.alarm(0)
        self._write({"job": name, **info, **result})

    def _write(self, row: dict) -> None:
        self.started.add(row["job"])
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        if not row.get("started"):
            print(json.dumps(row), flush=True)


def supervise(arguments: Sequence[str], jobs: Path, seconds: float) -> None:
    """Runs `python arguments... --jobs <jobs>` again until it ends well, or the time is over.

    Raises:
      SystemExit: it failed without having begun a job.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 5:
        before = jobs.stat().st_size if jobs.exists() else 0
        try:
            command = [sys.executable, *arguments, "--jobs", str(jobs)]
            code = subprocess.run(command, timeout=left, env=dict(os.environ)).returncode
        except subprocess.TimeoutExpired:
            print("out of time", flush=True)
            return
        if code == 0:
            return
        if (jobs.stat().st_size if jobs.exists() else 0) == before:
            raise SystemExit(code)
        print(f"worker ended with {code}; going on", flush=True)
