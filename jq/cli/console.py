"""What the commands share: where results and progress go."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jq.errors import JqError

DTYPES = ("float32", "bfloat16", "float16")


def _dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(DTYPES)}")
    return name


DtypeOption = Annotated[
    str | None,
    typer.Option(help="Compute dtype: float32, bfloat16 or float16.", callback=_dtype),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def emit(result: dict[str, Any], text: Any, *, as_json: bool) -> None:
    """Prints a command's result on stdout: `result` as JSON, or `text` (a str or a rich renderable)."""
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
        return
    if isinstance(text, str):
        print(text)
        return
    from rich.console import Console

    # Not a terminal: a width that no table of ours exceeds, so that a pipe or a file gets whole lines.
    Console(width=None if sys.stdout.isatty() else 120).print(text)


def say(text: str) -> None:
    """A line for the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def read_text(path: Path) -> str:
    """A text file that an option names.

    Raises:
      JqError: it is no text, or empty.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise JqError(f"{path}: is no UTF-8 text (byte {e.start})") from e
    if not text.strip():
        raise JqError(f"{path}: holds no text")
    return text


# advance(done, total, note): called by whatever runs long.
Advance = Callable[[int, int, str], None]


def _silent(done: int, total: int, note: str = "") -> None:
    """The progress of a run that nobody watches."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Advance]:
    """A progress bar on stderr with an estimate of the time left; silent where stderr is not a terminal.

    Yields:
      advance(done, total, note): sets the bar; may be called from any loop, any number of times.
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance
