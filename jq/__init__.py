"""Quantized Hugging Face models in JAX: load, run, make, convert and save them, bit for bit."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from jq import errors as errors
from jq._clash import JSON_TOOL_NAMES, SHADOWED

if TYPE_CHECKING:  # what type checkers and editors know of the names below
    from jq.convert import convert as convert
    from jq.inspect import inspect as inspect
    from jq.load import load as load
    from jq.matmul import matmul as matmul
    from jq.qtensor import Affine as Affine
    from jq.qtensor import Codebook as Codebook
    from jq.qtensor import NarrowFloat as NarrowFloat
    from jq.qtensor import QTensor as QTensor
    from jq.qtensor import VectorCodebook as VectorCodebook
    from jq.quantize import quantize as quantize
    from jq.report.perplexity import perplexity as perplexity
    from jq.state import State as State
    from jq.state import load_state as load_state
    from jq.state import quantized as quantized
    from jq.state import save as save

__version__ = "0.1.0"

# Public name -> module that has it. Loaded at first use, so that `import jq` stays light.
_PUBLIC = {
    "load": "jq.load",
    "load_state": "jq.state",
    "State": "jq.state",
    "save": "jq.state",
    "quantized": "jq.state",
    "quantize": "jq.quantize",
    "convert": "jq.convert",
    "inspect": "jq.inspect",
    "matmul": "jq.matmul",
    "perplexity": "jq.report.perplexity",
    "Affine": "jq.qtensor",
    "Codebook": "jq.qtensor",
    "NarrowFloat": "jq.qtensor",
    "VectorCodebook": "jq.qtensor",
    "QTensor": "jq.qtensor",
}
_MODULES = ("nn", "qtensor", "bits", "exact", "models", "algorithms", "report")


def formats() -> Any:
    """The table of storage formats: name -> `jq.formats.Format`."""
    return importlib.import_module("jq.formats").table()


def _method(name: str) -> Any:
    """A quantization method class (`jq.NF4`, ...), found in the table of formats."""
    for fmt in formats().values():
        if name in fmt.methods_table:
            return fmt.methods_table[name]
    return None


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        return importlib.import_module(f"jq.{name}")
    elif name[:1].isupper() and (method := _method(name)) is not None:
        value = method
    elif name in JSON_TOOL_NAMES:
        raise AttributeError(SHADOWED.format(name=name))
    else:
        raise AttributeError(f"module 'jq' has no attribute {name!r}")
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """The package, where a public function keeps its name although a submodule has the same one (`jq.matmul`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and (name in _PUBLIC or name == "formats"):
            return  # the import system binds submodules to the package; `from jq.matmul import ...` needs no binding
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    methods = [m for fmt in formats().values() for m in fmt.methods_table]
    return sorted({*globals(), *_PUBLIC, *_MODULES, *methods})
