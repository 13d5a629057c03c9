"""The whole decode step over packed weights lowers for CUDA on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11 (Python 3.12)")
@pytest.mark.parametrize("weights", ["bf16", "w4a16_g128", "nf4"])
def test_decode_step_lowers_for_cuda(weights: str) -> None:
    script = ROOT / "benchmarks" / "gpu_decode.py"
    command = [sys.executable, str(script), "--lower", "--weights", weights, "--head", "w4", "--batch", "1", "32"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    # Equal kernels of the two layers are one. Batch 1: six of a layer, norms made inside (the first without a sum),
    # the last norm and the output matrix. Batch 32: XLA's products where weights are dense, norms of their own.
    most = {("1", "bf16"): 9, ("32", "bf16"): 5}
    for line in lines:
        batch = line.split(" batch ")[1].split()[0]
        count = int(line.split(" custom calls")[0].split()[-1])
        assert count in (limit := most.get((batch, weights), 9), limit - 1), line
