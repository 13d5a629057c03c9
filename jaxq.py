"""The command `jaxq`, and the check that `import jq` means this project.

PyPI's `jq` (bindings of the JSON tool) has the same import name. Where it is found first, `jq.cli` cannot be imported
and Python's own message explains nothing; this module has a name of its own, so that it can.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def require_jq() -> ModuleType:
    """Our `jq`.

    Raises:
      ImportError: another `jq` is found in its place; the message names the file and the way out.
    """
    module = importlib.import_module("jq")
    if not hasattr(module, "__path__") or "errors" not in vars(module):
        raise ImportError(
            f"`import jq` found {getattr(module, '__file__', None) or 'another package'}: that is PyPI's `jq`, the "
            "bindings of the JSON tool, not the jq of jaxq. Both have the same import name, so one environment can hold "
            "only one: `pip uninstall jq`, or install jaxq in an environment of its own",
            name="jq",
        )
    return module


def main() -> int:
    """The console script; see `jq.cli`."""
    try:
        require_jq()
    except ImportError as error:
        print(f"jaxq: error: {error}", file=sys.stderr)
        return 1
    from jq.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
