"""How a quantization method is named on the command line: the arguments of its class are the options.

The methods are those of the formats' tables (`jq.NF4`, `jq.RTN`, ...), found by name whatever the case. An option that
the method does not have is wrong use (exit code 2), and the message lists those that it has.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import typer


def names() -> dict[str, str]:
    """Name as it may be typed (lower case, no underscores) -> public name (attribute of `jq`) of every method."""
    from jq.formats import table

    return {plain(name): name for fmt in table().values() for name in fmt.methods_table}


def plain(name: str) -> str:
    """The name as it is looked up: lower case, without marks."""
    return name.lower().replace("-", "").replace("_", "")


def find(name: str) -> Callable[..., Any]:
    """The method of a name as typed: a class, or a function that makes one (presets).

    Raises:
      typer.BadParameter: there is none; the message lists the methods.
    """
    import jq

    known = names()
    if plain(name) not in known:
        raise typer.BadParameter(f"no method {name!r}; methods: {', '.join(sorted(known.values(), key=str.lower))}")
    return getattr(jq, known[plain(name)])


def options_of(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The method's options by name."""
    return dict(inspect.signature(method).parameters)


def build(name: str, settings: list[str], *, sym: bool | None = None, **given: Any) -> Any:
    """A method object from its name, `key=value` settings and options that were given (None: not given).

    Args:
      name: as typed.
      settings: `key=value` texts.
      sym: without or with zero points; methods call it `sym`, `symmetric`, or the contrary `zero_point`.
      given: other options.

    Raises:
      typer.BadParameter: unknown method or option, a value that the method refuses.
    """
    method = find(name)
    known = options_of(method)
    values = {key: value for key, value in given.items() if value is not None}
    if sym is not None:
        key = next((key for key in ("sym", "symmetric", "zero_point") if key in known), "sym")
        values[key] = not sym if key == "zero_point" else sym
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r}: settings have the form key=value")
        values[key.replace("-", "_")] = _value(text)
    unknown = sorted(set(values) - set(known))
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        raise typer.BadParameter(f"{name} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    try:
        return method(**values)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{name}: {error}") from error


def _value(text: str) -> Any:
    """A Python literal, true/false, or the text itself."""
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
