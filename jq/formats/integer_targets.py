"""The table of storages that hold integer weights (`jq.formats.integers`) as they are. A new storage is one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jq.errors import UnsupportedError
from jq.formats.integer_codes import to_eetq, to_hqq, to_quanto, to_torchao
from jq.formats.integer_words import to_awq, to_compressed_tensors, to_gptq
from jq.formats.integers import Summary, Target, need

# format name -> (method object or format name, weights, source's quantization_config, source's format) -> Target.
# Each raises UnsupportedError that names the first weight it cannot hold, and why.
TARGETS: dict[str, Callable[[Any, list[Summary], Mapping[str, Any], str], Target]] = {
    "gptq": to_gptq,
    "awq": to_awq,
    "compressed-tensors": to_compressed_tensors,
    "hqq": to_hqq,
    "torchao": to_torchao,
    "quanto": to_quanto,
    "eetq": to_eetq,
}


def target_of(to: Any, weights: list[Summary], source: Mapping[str, Any], source_format: str) -> Target:
    """The storage that `to` names, after a check that it can hold every weight.

    Raises:
      UnsupportedError: it cannot; the message names the weight, the reason and what can.
    """
    name = to if isinstance(to, str) else getattr(to, "format", None)
    if name not in TARGETS:
        raise UnsupportedError(
            f"{to!r}: weights can be re-encoded as {', '.join(TARGETS)} (jq.GPTQ(), jq.AWQ(), 'compressed-tensors'); other "
            "formats round differently. jq.quantize makes them from a float model"
        )
    if name in ("gptq", "awq"):
        _check_asked(to, weights)
    return TARGETS[name](to, weights, source, source_format)


def _asked(to: Any, field: str, found: Any, name: str) -> None:
    """An option of the target that was given must be what the weights have: `convert` changes no weight."""
    wanted = getattr(to, field, None)
    need(
        wanted is None or wanted == found,
        f"{name}: has {field} {found}, {type(to).__name__} asks for {wanted}; convert changes no weight. Leave it out, or "
        "quantize the float model",
    )


def _check_asked(to: Any, weights: list[Summary]) -> None:
    for w in weights:
        _asked(to, "bits", w.bits, w.name)
        wanted = getattr(to, "group_size", None)
        if wanted is not None and not (w.whole and (wanted == -1 or wanted >= w.in_features)):
            _asked(to, "group_size", w.group_size, w.name)
