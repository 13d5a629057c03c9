"""`jaxq report`: how far a quantized checkpoint is from the float one, layer by layer, as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jq.cli.console import JsonOption, emit, progress, say
from jq.errors import JqError


def run(
    model: Annotated[str, typer.Argument(help="Quantized model: directory, .gguf file, or Hugging Face hub id.")],
    against: Annotated[str, typer.Option(help="The float model that it was made from.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file to write.", dir_okay=False)] = None,
    perplexity: Annotated[
        int, typer.Option(help="Windows of the bundled text to measure perplexity on; 0 for none.", min=0)
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare a quantized model with its float original: error of each layer, bits, and perplexity if asked.

    Example: jaxq report ./SmolLM2-nf4 --against ./SmolLM2 -o report.html --perplexity 4
    """
    from rich.table import Table

    from jq.report.layers import layer_errors
    from jq.report.page import write_page
    from jq.report.perplexity import of_path

    if output is not None and not output.absolute().parent.is_dir():
        raise JqError(f"{output}: there is no such directory")
    with progress("layers") as advance:
        errors = layer_errors(model, against, advance=advance)
    values = {}
    for name in (against, model) if perplexity else ():
        with progress(f"perplexity of {name}") as advance:
            values[name] = of_path(name, windows=perplexity, advance=advance)
    if output is not None:
        write_page(output, model, against, errors, values)
        say(f"wrote {output}")
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("module")
    for title in ("bits/weight", "relative error", "largest error"):
        table.add_column(title, justify="right")
    for e in errors:
        table.add_row(e.module, f"{e.bits_per_weight:.2f}", f"{e.relative:.4f}", f"{e.largest:.4g}")
    result = {"model": model, "against": against, "layers": [e.to_dict() for e in errors], "perplexity": values}
    emit(result, table, as_json=as_json)
    if not as_json:
        for name, value in values.items():
            print(f"perplexity {value:.3f}  {name}")
