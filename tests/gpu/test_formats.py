"""Every reference directory on the GPU: each weight that a kernel takes gives the product of its dequantized form."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from reference_dirs import directories, relative_error

import jq

pytestmark = pytest.mark.gpu
DIRECTORIES = directories()


@pytest.mark.parametrize("folder", list(DIRECTORIES.values()), ids=list(DIRECTORIES))
def test_kernels_take_its_weights(folder: Path, cell) -> None:
    import pallas_kernels
    from jq.checkpoint import open_checkpoint
    from jq.formats import detect

    cell(detect(open_checkpoint(folder))[0].name, "GPU kernel")
    reasons, taken = set(), 0
    for name, q in jq.quantized(jq.load_state(folder)).items():
        if q.ndim == 3:  # experts
            q = q[0]
        if q.ndim != 2:
            continue
        try:
            w = pallas_kernels.prepare(q.replace(activation=None))
        except ValueError as error:
            reasons.add(str(error))
            continue
        for rows in (1, 5, 64):
            x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, q.in_features)), jnp.bfloat16)
            reason = pallas_kernels.supports(w, x)
            if reason is not None:
                reasons.add(reason)
                continue
            want = np.asarray(x, np.float32) @ np.asarray(q.dequantize("float32")).T
            # bfloat16 weights inside the product and a bfloat16 result: two roundings of 2**-9 each
            assert relative_error(pallas_kernels.matmul(x, w), want) < 8e-3, (name, rows)
            taken += 1
    if not taken:
        pytest.skip(f"no kernel takes a weight of it: {'; '.join(sorted(reasons)) or 'no matrix is quantized'}")
