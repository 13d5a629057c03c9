"""`jaxq convert`: the same weights in another format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jq.cli.console import JsonOption, emit, progress


def run(
    source: Annotated[str, typer.Argument(help="Quantized model: directory, .gguf file, or Hugging Face hub id.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[
        str, typer.Option("--to", help="Format to write: gptq, awq, compressed-tensors, hqq, torchao, quanto or eetq.")
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any option of the target, as key=value.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Re-encode a checkpoint in another format where every weight stays the same to the bit; else say why it cannot be.

    Example: jaxq convert ./model-gptq ./model-awq --to awq
    """
    from jq.cli import methods
    from jq.formats.integer_targets import TARGETS

    if to not in TARGETS and methods.plain(to) not in methods.names():
        raise typer.BadParameter(f"--to {to!r} is none of {', '.join(TARGETS)}")
    # A format's name alone takes bits and groups of the source; a method has a scheme of its own.
    scheme = methods.build(to, settings or []) if settings or to not in TARGETS else to
    import jq
    from jq.inspect import inspect

    start = time.perf_counter()
    with progress("convert") as advance:
        jq.convert(source, target, to=scheme, advance=advance)
    summary = inspect(target)
    seconds = time.perf_counter() - start
    result = {
        "converted_to": scheme if isinstance(scheme, str) else repr(scheme),
        "seconds": round(seconds, 2),
        **summary.to_dict(),
    }
    emit(result, f"{summary.headline()}\nconverted in {seconds:.1f} s", as_json=as_json)
