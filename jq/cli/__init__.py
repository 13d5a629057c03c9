"""Command line: `python -m jq` and `jaxq` are the same program.

Each command is a module of this package with one function `run`, whose signature is its options and whose docstring
is its help. `COMMANDS` is the table; a new command is a new file and a row. Results go to stdout (a table, or JSON with
`--json`), progress and errors to stderr.

Exit codes: 0 done; 1 failed, with one line that says why; 2 wrong use; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from jq import __version__
from jq.errors import JqError

# Name -> module with `run`. The order is that of `--help`: from the first thing to try to the last.
COMMANDS = {
    "demo": "jq.cli.demo",
    "inspect": "jq.cli.inspect",
    "formats": "jq.cli.formats",
    "quantize": "jq.cli.quantize",
    "convert": "jq.cli.convert",
    "generate": "jq.cli.generate",
    "eval": "jq.cli.eval",
    "report": "jq.cli.report",
}


def build() -> typer.Typer:
    """The program: one typer command for each row of `COMMANDS`."""
    app = typer.Typer(
        name="jaxq",
        help="Quantized Hugging Face models in JAX: load, run, make, convert. Start with: jaxq demo",
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    for name, module in COMMANDS.items():
        app.command(name)(importlib.import_module(module).run)

    @app.callback()
    def common(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
        ] = False,
    ) -> None:
        """Quantized Hugging Face models in JAX: load, run, make, convert. Start with: **jaxq demo**"""

    return app


def _version(on: bool) -> None:
    if on:
        print(f"jaxq {__version__}")
        raise typer.Exit


def _fail(text: str, code: int = 1) -> int:
    """Prints a failure as one line on stderr and gives its exit code."""
    print("jaxq: error: " + " ".join(text.split()), file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      arguments: words after the program's name; None for those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = build()(args=words or ["--help"], prog_name="jaxq", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except (BrokenPipeError, SystemExit):  # `jaxq inspect ... | head`; click turns most of them into an exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except JqError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong use; newer typer has no public name for click's classes
            command = f"jaxq {words[0]}" if words and words[0] in COMMANDS else "jaxq"
            return _fail(f"{error.format_message()} (see: {command} --help)", 2)
        if os.environ.get("JAXQ_TRACEBACK"):
            raise
        kind = type(error).__name__
        return _fail(f"{kind}: {error} (unexpected; set JAXQ_TRACEBACK=1 to see where it comes from)")
