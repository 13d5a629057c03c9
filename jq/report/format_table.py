"""The table of formats, computed from test results.

`pytest --format-results=FILE` writes how the tests behind each cell ended; the files lie in jq/formats/results, one a
machine (CPU, GPU). Nothing here is typed by hand: a cell without a passed test is "-".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

COLUMNS = ("read", "write", "identical bits", "identical dequantize", "quantize", "GPU kernel", "torch adapter")
_HELD_AGAINST = {
    "reference": "files of the original library",
    "library": "code of the original library",
    "source": "its source alone",
}


@dataclasses.dataclass(frozen=True)
class FormatRow:
    """One format: `cells` has a text for each of `COLUMNS`; `methods` are its values of `quant_method`."""

    name: str
    title: str
    methods: tuple[str, ...]
    held_against: str
    cells: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "methods": list(self.methods), "cells": dict(self.cells)}


def rows() -> list[FormatRow]:
    """A row for each format of the table in `jq.formats`."""
    from jq.formats import table

    counts = merged(stored_results())
    return [
        FormatRow(
            name=fmt.name,
            title=fmt.title,
            methods=fmt.methods,
            held_against=_HELD_AGAINST[fmt.evidence],
            cells={column: cell_text(counts.get(fmt.name, {}).get(column, {})) for column in COLUMNS},
        )
        for fmt in table().values()
    ]


def stored_results() -> list[Mapping[str, Any]]:
    """The result files that lie in the package."""
    folder = resources.files("jq.formats") / "results"
    if not folder.is_dir():
        return []
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return [json.loads(f.read_text("utf-8")) for f in files]


def merged(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Sums the outcome counts of several result files: format -> column -> outcome -> count."""
    total: dict[str, dict[str, dict[str, int]]] = {}
    for result in results:
        for fmt, columns in result["cells"].items():
            for column, counts in columns.items():
                cell = total.setdefault(fmt, {}).setdefault(column, {})
                for outcome, count in counts.items():
                    cell[outcome] = cell.get(outcome, 0) + count
    return total


def cell_text(counts: Mapping[str, int]) -> str:
    """ "yes" where tests passed and none failed, "fails" where one did, "-" where none ran."""
    if counts.get("failed"):
        return "fails"
    return "yes" if counts.get("passed") else "-"


def markdown(table: list[FormatRow]) -> str:
    """The table as GitHub markdown."""
    header = ["format", "`quant_method`", *COLUMNS, "held against"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in table:
        methods = ", ".join(f"`{m}`" for m in row.methods) or "-"
        cells = [row.cells[column] for column in COLUMNS]
        lines.append("| " + " | ".join([short(row.title), methods, *cells, row.held_against]) + " |")
    return "\n".join(lines)


def short(title: str) -> str:
    """A format's title up to its explanation: "HQQ: float zeros, ..." -> "HQQ"."""
    return re.split(r"[:(]", title)[0].strip()
