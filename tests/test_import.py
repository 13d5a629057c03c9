"""`import jq` is light: it imports neither torch nor transformers, and costs little beside jax and flax."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


HEAVY = "print([m for m in ('torch', 'transformers', 'accelerate', 'huggingface_hub', 'gguf') if m in sys.modules])"


@pytest.mark.parametrize(
    "use", ["", "jq.load_state; jq.NF4; jq.formats()", "import jq.cli; jq.cli.build()", "jq.inspect; jq.load"]
)
def test_neither_torch_nor_transformers(use):
    assert run(f"import sys, jq\n{use}\n{HEAVY}") == "[]"


def test_costs_less_than_a_second_beside_jax_and_flax():
    code = (
        "import jax, flax.nnx, time; t = time.process_time(); import jq; jq.load_state; print(time.process_time() - t)"
    )
    assert min(float(run(code)) for _ in range(3)) < 1.0


def test_loads_and_generates_without_torch(tmp_path):
    """A checkpoint runs where importing torch fails."""
    from reference_dirs import directories

    folder = directories()["gptq-4-g32-sym-descact"]
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "accelerate"):
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
import jq
model = jq.load({str(folder)!r})
print(model.generate([[1, 2, 3]], 4, do_sample=False).shape)
"""
    assert run(code) == "(1, 7)"
