"""PyPI's `jq` has our import name: what is said where the two meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import jq

ROOT = Path(jq.__file__).parents[1]


def test_the_other_jq_in_our_place_is_explained(tmp_path):
    (tmp_path / "jq.py").write_text("def compile(program): ...\n")
    (tmp_path / "jaxq.py").write_text((ROOT / "jaxq.py").read_text())
    ran = subprocess.run(
        [sys.executable, "jaxq.py"], cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert ran.returncode == 1
    assert "PyPI's `jq`" in ran.stderr and "pip uninstall jq" in ran.stderr and str(tmp_path / "jq.py") in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ours_in_the_place_of_the_other_is_explained():
    with pytest.raises(AttributeError, match="JSON tool"):
        jq.compile  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        jq.nonsense  # noqa: B018
