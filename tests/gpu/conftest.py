"""GPU tests: run on a machine with an NVIDIA GPU by `pytest -m gpu tests/gpu`; elsewhere they are skipped."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pallas_kernels"))


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"no GPU: JAX's backend is {jax.default_backend()}"))
