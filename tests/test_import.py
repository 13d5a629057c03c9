"""`import jq` is light: it imports neither torch nor transformers, nor anything beside jax, flax and what they import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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


def test_adds_no_package_to_jax_and_flax():
    code = "import sys, jax, flax.nnx; before = {*sys.modules}; import jq; jq.load_state; jq.NF4"
    added = "{m.partition('.')[0] for m in {*sys.modules} - before} - sys.stdlib_module_names"
    assert run(f"{code}\nprint(sorted({added}))") == "['jq']"


def test_imports_nothing_before_it_is_used():
    assert run("import sys, jq; print({'jax', 'flax', 'numpy'} & {*sys.modules} or 'nothing')") == "nothing"


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


def test_the_adapter_says_that_it_needs_torch():
    code = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
try:
    import jq_torch
except ImportError as error:
    print(error)
"""
    assert "pip install 'jaxq[torch]'" in run(code)


def test_type_checkers_know_every_public_name():
    import jq

    tree = ast.parse(Path(jq.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    told = {(name.asname, node.module) for node in guarded.body for name in node.names}
    assert told == set(jq._PUBLIC.items())
