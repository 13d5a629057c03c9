"""`jaxq eval`: perplexity of a model on a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jq.cli.console import DtypeOption, JsonOption, emit, progress, read_text, say


def run(
    model: Annotated[str, typer.Argument(help="Directory, .gguf file, or Hugging Face hub id.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file; without it the bundled start of WikiText-2's raw test split.", exists=True, dir_okay=False
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to take from the start of the text; 0 for all.", min=0)] = 32,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    dtype: DtypeOption = "float32",
    packed: Annotated[
        bool | None, typer.Option("--packed/--dense", help="Keep codes packed, or dequantize once at load.")
    ] = None,
    weight_only: Annotated[bool, typer.Option("--weight-only", help="Leave activations in float.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on non-overlapping windows of a text, no token added.

    Example: jaxq eval ./SmolLM2-nf4 --text wiki.test.raw --windows 32
    """
    import jq
    from jq.report.perplexity import bundled_text, tokens_of

    start = time.perf_counter()
    loaded = jq.load(model, dtype=dtype, packed=packed, quantize_activations=not weight_only)
    load_s = time.perf_counter() - start
    ids = tokens_of(loaded.tokenizer, bundled_text() if text is None else read_text(text))
    if windows:
        ids = ids[: windows * window]
    if len(ids) < window:
        say(f"the text has {len(ids)} tokens, less than one window of {window}: one short window is used")
    with progress("windows") as advance:
        value = jq.perplexity(loaded, ids, window=window, advance=advance)
    count = max(1, len(ids) // window)
    result = {
        "model": model,
        "text": str(text) if text else "bundled (WikiText-2 raw test, start)",
        "perplexity": value,
        "windows": count,
        "window": min(window, len(ids)),
        "dtype": dtype,
        "load_s": round(load_s, 2),
        "seconds": round(time.perf_counter() - start, 2),
    }
    line = f"perplexity {value:.3f}  ({count} windows of {result['window']} tokens, {result['seconds']:.1f} s)"
    emit(result, line, as_json=as_json)
