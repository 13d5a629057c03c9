"""`jaxq formats`: what each format can do, from the test results."""

from __future__ import annotations

from jq.cli.console import JsonOption, emit


def run(as_json: JsonOption = False) -> None:
    """List the formats and what is tested for each: read, write, identical bits, quantize, kernels, torch.

    Example: jaxq formats --json
    """
    from rich.table import Table

    from jq.report.format_table import COLUMNS, rows

    found = rows()
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("format", "quant_method", *COLUMNS, "held against"):
        table.add_column(title)
    for row in found:
        table.add_row(row.name, ", ".join(row.methods), *(row.cells[c] for c in COLUMNS), row.held_against)
    emit({"formats": [row.to_dict() for row in found]}, table, as_json=as_json)
