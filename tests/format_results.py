"""Plugin: the results behind the table of formats (`jaxq formats`, README), which is computed from tests.

A test that proves a cell of the table says so before its assertions:

    def test_identity(folder, cell):
        cell("gptq", "read", "identical bits")

and `pytest --format-results=jq/formats/results/cpu.json` writes what passed, failed and was skipped. Tests over reference
directories need no `cell`: `PROVES` says what each of them shows, and the directory says of which format.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from jq.report.format_table import COLUMNS

# Test function (file under tests/ :: name) with a parameter `folder` -> the columns that it proves.
PROVES = {
    "test_reference.py::test_dequantizes_to_the_same_bits": ("read", "identical dequantize"),
    "test_reference.py::test_saves_every_byte_back": ("write", "identical bits"),
    "test_reference.py::test_dumps_from_arrays_alone": ("identical bits",),
    "jq_torch/test_reference.py::test_nothing_is_missing_and_logits_are_the_librarys": ("torch adapter",),
    "jq_torch/test_reference.py::test_saved_as_it_was": ("torch adapter",),
}


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


def format_of(folder: Path) -> str | None:
    """Name of the format of a checkpoint directory; None where it cannot even be opened."""
    from jq.checkpoint import open_checkpoint
    from jq.errors import JqError
    from jq.formats import detect

    try:
        found = detect(open_checkpoint(folder))
    except JqError:
        return None
    return None if found is None else found[0].name


class FormatResults:
    """Counts outcomes for each cell and writes them at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[tuple[str, str], Counter] = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            file = os.path.relpath(item.path, Path(__file__).parent)
            test = f"{file}::{getattr(item, 'originalname', item.name)}"
            fmt = format_of(item.callspec.params["folder"]) if test in PROVES else None
            if fmt is not None:
                item.user_properties += [("cell", f"{fmt}/{column}") for column in PROVES[test]]

    def pytest_runtest_logreport(self, report):
        if not (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
            return
        for key, value in report.user_properties:
            if key == "cell":
                fmt, column = value.split("/", 1)
                self.counts.setdefault((fmt, column), Counter())[report.outcome] += 1

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):  # a process of pytest-xdist: the main one has all reports
            return
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
