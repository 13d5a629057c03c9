"""Plugin: the results behind the table of formats (`jaxq formats`, README), which is computed from tests.

A test that proves a cell of the table says so before its assertions:

    def test_identity(folder, cell):
        cell("gptq", "read", "identical bits")

and `pytest --format-results=jq/formats/results/cpu.json` writes what passed, failed and was skipped.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from jq.report.format_table import COLUMNS


def pytest_addoption(parser):
    parser.addoption("--format-results", metavar="FILE", help="write the results behind the table of formats")


@pytest.fixture
def cell(request):
    """cell(format, *columns): this test proves these cells of the table of formats."""

    def record(fmt: str, *columns: str) -> None:
        unknown = set(columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"unknown columns {sorted(unknown)}; known: {COLUMNS}")
        request.node.user_properties += [("cell", f"{fmt}/{column}") for column in columns]

    return record


class FormatResults:
    """Counts outcomes for each cell and writes them at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[tuple[str, str], Counter] = {}

    def pytest_runtest_logreport(self, report):
        if not (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
            return
        for key, value in report.user_properties:
            if key == "cell":
                fmt, column = value.split("/", 1)
                self.counts.setdefault((fmt, column), Counter())[report.outcome] += 1

    def pytest_sessionfinish(self):
        cells: dict[str, dict[str, dict[str, int]]] = {}
        for (fmt, column), counts in sorted(self.counts.items()):
            cells.setdefault(fmt, {})[column] = dict(sorted(counts.items()))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        made = {"commit": commit.stdout.strip(), "python": platform.python_version(), "machine": platform.machine()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"made": made, "cells": cells}, indent=1) + "\n")


def pytest_configure(config):
    path = config.getoption("--format-results")
    if path:
        config.pluginmanager.register(FormatResults(Path(path)))
