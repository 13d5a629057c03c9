"""`jaxq quantize`: a float checkpoint in, a quantized one out."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Annotated

import typer

from jq.cli.console import JsonOption, emit, progress
from jq.errors import JqError


def run(
    source: Annotated[str, typer.Argument(help="Float model: directory, .gguf file, or Hugging Face hub id.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="nf4, fp4, int8, rtn, ...: see jaxq quantize --list.")
    ] = "nf4",
    bits: Annotated[int | None, typer.Option(help="Bits of a code.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights along the input axis that share a scale.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Weights that share an absmax (nf4, fp4).")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Without or with zero points.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant/--single-quant", help="Quantize absmax too (nf4, fp4).")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any option of the method, as key=value.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Module name pattern to leave in float; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list", help="List the methods and their options, and stop.", is_eager=True, callback=lambda on: _list(on)
        ),
    ] = False,
) -> None:
    """Quantize the linear layers of a model and write a Hugging Face checkpoint that its original library loads too.

    Example: jaxq quantize HuggingFaceTB/SmolLM2-135M-Instruct ./SmolLM2-int4 --method rtn --bits 4 --group-size 64
    """
    from jq.cli import methods

    scheme = methods.build(
        method,
        settings or [],
        bits=bits,
        group_size=group_size,
        block_size=block_size,
        sym=sym,
        double_quant=double_quant,
    )
    import jq
    from jq.directory import checked
    from jq.inspect import inspect as summary_of

    checked(target)
    start = time.perf_counter()
    try:
        with progress("quantize") as advance:
            made = jq.quantize(jq.load_state(source, lazy=True), scheme, skip=skip or None, advance=advance)
    except JqError:
        raise
    except ValueError as error:  # weights that the method cannot take, nothing left to quantize
        raise JqError(str(error)) from error
    with progress(f"write {target}"):
        jq.save(made, target)
    summary = summary_of(target)
    seconds = time.perf_counter() - start
    text = f"{summary.headline()}\nquantized and written in {seconds:.1f} s; look at it: jaxq inspect {target}"
    result = {"quantized_with": repr(scheme), "seconds": round(seconds, 2), **summary.to_dict()}
    emit(result, text, as_json=as_json)


def _list(on: bool) -> None:
    if not on:
        return
    from jq.cli import methods

    for public in sorted(methods.names().values(), key=str.lower):
        found = methods.find(public)
        options = ", ".join(str(p).partition(":")[0] + _default(p) for p in methods.options_of(found).values())
        only = "" if hasattr(found, "quantize") or not isinstance(found, type) else "   (jaxq convert only)"
        print(f"{public.lower():18} {options}{only}")
    raise typer.Exit


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
