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
    # Two layers share the kernels of their four products; the output matrix has one of its own.
    assert all(f"{1 if weights == 'bf16' else 5} custom calls" in line for line in lines), lines
