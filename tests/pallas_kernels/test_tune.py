"""`python -m pallas_kernels.tune` without a GPU: what it says there, and the table that it writes from results."""

import json
import subprocess
import sys
import types

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from pallas_kernels import select, tune
from pallas_kernels.timing import Jobs, supervise


def result(kernel, m, us, error=1e-3, **config):
    row = {"kind": "affine", "bits": 4, "n": 256, "k": 512, "m": m, "kernel": kernel, "config": config}
    return row | {"job": f"{kernel} {m} {us}", "us": us, "rel_err": error}


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    monkeypatch.setattr(select, "TABLES", tmp_path)
    return lambda *rows: types.SimpleNamespace(rows=rows, path=tmp_path / "jobs.jsonl")


def test_the_best_of_each_kernel_is_written(jobs, tmp_path):
    first = [result("stream", 1, 5.0), result("direct", 1, 4.0, held=2), result("direct", 1, 4.5)]
    wrong = result("direct", 1, 1.0, error=0.5, held=1)
    path = tune.write(jobs(*first, wrong, result("gemm", 64, 9.0)), "NVIDIA H100 80GB HBM3")
    rows = json.loads(path.read_text())["rows"]
    assert path == tmp_path / "h100.json"
    assert [(r["m"], r["kernel"], r["us"]) for r in rows] == [(1, "direct", 4.0), (1, "stream", 5.0), (64, "gemm", 9.0)]
    # what is measured again takes the place of what was, the rest stays in its order
    tune.write(jobs(result("gemm", 64, 8.0)), "NVIDIA H100 80GB HBM3")
    again = json.loads(path.read_text())["rows"]
    assert again[:2] == rows[:2] and [r["us"] for r in again[2:]] == [8.0]


def test_no_results_change_no_table(jobs, tmp_path):
    with pytest.raises(ValueError, match="no configuration was measured"):
        tune.write(jobs(result("direct", 1, 1.0, error=0.5)), "NVIDIA H100 80GB HBM3")
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so_once(tmp_path):
    command = [sys.executable, "-m", "pallas_kernels.tune", "--jobs", str(tmp_path / "jobs.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("nothing to measure here, the default device is cpu") == 1


def test_a_worker_that_hangs_in_a_job_is_followed_by_another(tmp_path):
    script, path = tmp_path / "worker.py", tmp_path / "jobs.jsonl"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pallas_kernels.timing import Jobs\n"
        "jobs = Jobs(Path(sys.argv[-1]))\n"
        "jobs.run('hangs', lambda: os._exit(9))\n"
        "jobs.run('works', lambda: {'us': 1.0})\n"
    )
    supervise([str(script)], path, 60)
    assert Jobs(path).done("works")["us"] == 1.0 and Jobs(path).done("hangs") is None
