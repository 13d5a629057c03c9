"""`jaxq inspect`: what a checkpoint holds."""

from __future__ import annotations

from typing import Annotated

import typer

from jq.cli.console import JsonOption, emit


def run(
    model: Annotated[str, typer.Argument(help="Directory, weight file (.gguf too), or Hugging Face hub id.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the hub repository.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint: layers, kinds, bits per weight, groups, size. Reads headers, loads no model.

    Example: jaxq inspect ./SmolLM2-nf4
    """
    from rich.table import Table

    from jq.inspect import inspect

    summary = inspect(model, revision=revision)
    header, *rows = summary.table_rows()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in zip(header, (False, True, True, False, True, True)):
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not as_json:
        print(summary.headline() + "\n")
    emit(summary.to_dict(), table, as_json=as_json)
