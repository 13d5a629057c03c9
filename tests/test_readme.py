"""The README: its figures are those of the results, its snippets run, its commands are CI's."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
titles = [
    next((line for line in text.splitlines() if "jq." in line or "jq_torch." in line), text)[:60] for text in SNIPPETS
]


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A directory with the checkpoints that the README talks about, all of a tiny model."""
    import shutil

    import jq

    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny, folder / "SmolLM2")
    (folder / "SmolLM2" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    state = jq.load_state(folder / "SmolLM2")
    for name in ("jaxq-demo/nf4", "SmolLM2-nf4"):
        jq.save(jq.quantize(state, jq.NF4()), folder / name)
    jq.save(jq.quantize(state, jq.RTN(bits=4, group_size=64)), folder / "SmolLM2-int4")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=titles)
def test_snippets_run(snippet, place, monkeypatch):
    monkeypatch.chdir(place)
    if "jq_torch" in snippet:
        pytest.importorskip("torch")
        pytest.importorskip("accelerate")
    try:
        exec(compile(snippet, "README.md", "exec"), {})
    finally:
        if "jq_torch" in snippet:
            import jq_torch

            jq_torch.disable()


def test_commands_run(place, monkeypatch, capsys):
    from jq.cli import main

    monkeypatch.chdir(place)
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "jaxq"
        assert main(words) == 0, f"{command}: {capsys.readouterr().err}"
    assert (place / "report.html").read_text().startswith("<!doctype html>")


def test_figures_are_up_to_date():
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "scripts" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.filled(README) == README, "run: python scripts/readme_figures.py"


def test_the_two_commands_are_one_line_each():
    assert len(re.findall(r"^pip install -e \"\.\[demo\]\".* && python -m jq demo$", README, re.MULTILINE)) == 1
    assert (
        len(re.findall(r"^pip install -e \"\.\[test\]\".* && pytest -n 2 --dist loadfile$", README, re.MULTILINE)) == 1
    )
    assert "grep -m1 -E '^pip install .* && pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_demo_names_the_package_that_the_readme_installs():
    from jq.cli.demo import INSTALL

    assert INSTALL in README
