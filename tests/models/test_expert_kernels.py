"""gpt-oss' stacked experts in the order of the GPU kernels, with the kernels' arithmetic in plain JAX in their place."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from reference_dirs import directories, stored

import jq

NAME = "mxfp4-gptoss"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Weights go into the kernels' order as on a GPU; the shapes of x that the stand-in multiplied."""
    import pallas_kernels
    from jq.models import reader
    from pallas_kernels import reference, tensors

    seen = []

    def matmul(x, w, *, layer):
        seen.append(x.shape)
        packed = jax.tree.map(lambda a: a[layer], tensors.packed(w.replace(extras={}, activation=None, source=None)))
        return reference.product(x, packed).astype(x.dtype)

    monkeypatch.setattr(pallas_kernels, "matmul", matmul, raising=False)
    monkeypatch.setattr(reader, "prepared", lambda w, _: w if tensors.refusal(w) else tensors.prepare(w))
    return seen


def test_experts_multiply_in_the_kernels_order(kernels: list, tmp_path: Path) -> None:
    folder = directories()[NAME]
    few, many = np.arange(3, 4)[None], np.arange(3, 27)[None]
    dense = jq.load(folder, dtype="bfloat16")
    want = [np.asarray(dense(ids)) for ids in (few, many)]
    packed = jq.load(folder, dtype="bfloat16", packed=True)
    for ids, logits in zip((few, many), want):
        kernels.clear()
        np.testing.assert_allclose(np.asarray(packed(ids)), logits, atol=2e-2 * np.abs(logits).max())
        assert {rows for rows, _ in kernels} == {1 if ids is few else 24}
    jq.save(packed, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(folder)
