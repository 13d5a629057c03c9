"""The name `jq` on PyPI belongs to another project, bindings of the JSON tool. What to say where the two meet."""

from __future__ import annotations

# Names that the JSON bindings have and we don't: somebody who asks us for one wanted the other package.
JSON_TOOL_NAMES = ("compile", "first", "text", "all", "iter", "transform")

SHADOWED = (
    "module 'jq' has no attribute {name!r}: this is the jq of jaxq (quantized models). The bindings of the JSON tool, "
    "PyPI's `jq`, have the same import name and cannot be used in the same environment"
)
