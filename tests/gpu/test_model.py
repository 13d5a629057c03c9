"""Real quantized checkpoints on the GPU: the same greedy tokens as on the CPU in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference_dirs import directories

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:some weights have no GPU kernel")]
# more checkpoints, by the paths of JAXQ_GPU_CHECKPOINTS
MORE = [Path(p) for p in os.environ.get("JAXQ_GPU_CHECKPOINTS", "").split(os.pathsep) if p]
REFERENCE = {**directories(), **{p.name: p for p in MORE}}
NAMES = [
    n
    for n in (
        "gptq-4-g128-sym",
        "gptq-3-g128-sym",
        "gptq-4-g32-sym-descact",
        "bnb-nf4",
        "bnb-nf4-dq-bf16storage",
        "awq-gemm-g64",
        "eetq-int8",
        "mxfp4-gptoss",
    )
    if n in REFERENCE
] + [p.name for p in MORE]

SCRIPT = """
import json, sys
import numpy as np
import jq
model = jq.load(sys.argv[1])
ids = np.arange(3, 27)[None]
tokens = np.asarray(model.generate(ids, 24, do_sample=False, eos_token_id=[]))
logits = np.asarray(model(tokens))[0, 23:-1]
print(json.dumps({"tokens": tokens[0, 24:].tolist(), "top": np.sort(logits, -1)[:, -2:].tolist()}))
"""


def on_cpu(folder: Path) -> dict:
    root = Path(__file__).parent.parent.parent
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_the_cpu(name: str, dtype: str) -> None:
    import jq

    want = on_cpu(REFERENCE[name])
    model = jq.load(REFERENCE[name], dtype=dtype)
    got = np.asarray(model.generate(np.arange(3, 27)[None], 24, do_sample=False, eos_token_id=[]))[0, 24:]
    differ = np.flatnonzero(got != want["tokens"])
    if len(differ):
        second, first = want["top"][differ[0]]
        # Rounding of the compute dtype, over the depth of the model: the two tokens must have been a near tie.
        margin = 1e-4 if dtype == "float32" else 0.05 * abs(first)
        assert first - second < margin, f"token {differ[0]}: {first} against {second}"


@pytest.mark.parametrize("name", NAMES)
def test_saves_byte_for_byte_from_the_kernels_order(name: str, tmp_path: Path) -> None:
    from reference_dirs import stored

    import jq

    jq.save(jq.load(REFERENCE[name], dtype="bfloat16"), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(REFERENCE[name])
