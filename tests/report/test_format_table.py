"""The table of formats is computed from test results."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jq.report import format_table

pytest_plugins = ["pytester"]


def test_cells():
    assert format_table.cell_text({}) == "-"
    assert format_table.cell_text({"skipped": 3}) == "-"
    assert format_table.cell_text({"passed": 1, "skipped": 3}) == "yes"
    assert format_table.cell_text({"passed": 5, "failed": 1}) == "fails"


def test_results_of_several_machines_are_summed():
    cpu = {"cells": {"gptq": {"read": {"passed": 2}, "GPU kernel": {"skipped": 1}}}}
    gpu = {"cells": {"gptq": {"GPU kernel": {"passed": 1}}}}
    total = format_table.merged([cpu, gpu])["gptq"]
    assert total == {"read": {"passed": 2}, "GPU kernel": {"skipped": 1, "passed": 1}}


def test_rows_cover_every_format(monkeypatch):
    from jq.formats import table

    monkeypatch.setattr(format_table, "stored_results", lambda: [{"cells": {"gptq": {"read": {"passed": 1}}}}])
    rows = {row.name: row for row in format_table.rows()}
    assert rows.keys() == table().keys()
    assert rows["gptq"].cells["read"] == "yes"
    assert rows["gptq"].cells["write"] == "-"
    text = format_table.markdown(list(rows.values()))
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_the_plugin_counts_outcomes(pytester, monkeypatch):
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
    pytester.makeconftest("pytest_plugins = ['format_results']")
    pytester.makepyfile(
        """
        import pytest
        def test_good(cell):
            cell("gptq", "read", "write")
        def test_bad(cell):
            cell("gptq", "write")
            assert False
        def test_absent(cell):
            cell("awq", "read")
            pytest.skip("no file")
        def test_unknown_column(cell):
            with pytest.raises(ValueError):
                cell("gptq", "fly")
        """
    )
    pytester.runpytest_subprocess("--format-results=out.json", "-p", "no:cacheprovider")
    found = json.loads((pytester.path / "out.json").read_text())
    assert found["cells"] == {
        "awq": {"read": {"skipped": 1}},
        "gptq": {"read": {"passed": 1}, "write": {"failed": 1, "passed": 1}},
    }
