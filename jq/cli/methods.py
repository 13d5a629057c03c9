"""How a quantization method is named on the command line: its class's fields are the options.

The methods are those of the formats' tables (`jq.NF4`, `jq.RTN`, ...), found by name whatever the case. An option that
the method does not have is wrong use (exit code 2), and the message lists those that it has.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import typer


def names() -> dict[str, str]:
    """Lower-case name -> public name (attribute of `jq`) of every method."""
    from jq.formats import table

    return {name.lower(): name for fmt in table().values() for name in fmt.methods_table}


def find(name: str) -> type:
    """The method class of a name as typed.

    Raises:
      typer.BadParameter: there is none; the message lists the methods.
    """
    import jq

    known = names()
    key = name.lower().replace("-", "").replace("_", "")
    if key not in known:
        raise typer.BadParameter(f"no method {name!r}; methods: {', '.join(sorted(known))}")
    return getattr(jq, known[key])


def build(name: str, settings: list[str], **given: Any) -> Any:
    """A method object from its name, `key=value` settings and options that were given (None: not given).

    Raises:
      typer.BadParameter: unknown method or option, a value that the method refuses.
    """
    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values = {key: value for key, value in given.items() if value is not None}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r}: settings have the form key=value")
        values[key.replace("-", "_")] = _value(text)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise typer.BadParameter(f"{cls.__name__} has no option {unknown[0]!r}; it has: {', '.join(fields) or 'none'}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{cls.__name__}: {error}") from error


def _value(text: str) -> Any:
    """A Python literal, true/false, or the text itself."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
