"""generation_config.json, and the values that options of generation may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jq.errors import CheckpointError
from jq.formats.base import warn_once

# Option -> (what it must be, least, largest).
RANGES: dict[str, tuple[str, float, float]] = {
    "temperature": ("a number, at least 0", 0.0, math.inf),
    "top_k": ("a whole number, at least 0", 0, 2**31 - 1),
    "top_p": ("a number from 0 to 1", 0.0, 1.0),
    "min_p": ("a number from 0 to 1", 0.0, 1.0),
    "repetition_penalty": ("a positive number", 1e-30, math.inf),
    "max_new_tokens": ("a whole number, at least 1", 1, 2**31 - 1),
    "max_length": ("a whole number, at least 1", 1, 2**31 - 1),
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What transformers would do and we do not: option -> values that change nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}


def check(name: str, value: Any) -> None:
    """Raises ValueError where an option's value is not what `RANGES` says."""
    what, least, largest = RANGES[name]
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    whole = "whole" not in what or number.is_integer()
    if not (math.isfinite(number) and least <= number <= largest and whole):
        raise ValueError(f"{name} must be {what}, got {value!r:.80}")


def tokens(name: str, value: Any) -> tuple[int, ...]:
    """Token ids: one, several or none (None); ValueError for anything else."""
    if value is None:
        return ()
    try:
        several = [value] if not hasattr(value, "__iter__") else list(value)
        if any(isinstance(v, bool | str) or int(v) != v or abs(v) >= 2**31 for v in several):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a token id or a list of them, got {value!r:.80}") from None
    return tuple(int(v) for v in several)


def strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings: one, several or none (None); ValueError for anything else and for an empty one."""
    if value is None:
        return ()
    several = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(isinstance(s, str) and s for s in several):
        raise ValueError(f"{name} must be a string that is not empty or a list of such, got {value!r:.80}")
    return tuple(several)


def checked(found: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The options of a file that have a value.

    Args:
      found: contents of generation_config.json, or of config.json for `TOKENS`.
      label: file, for messages.

    Raises:
      CheckpointError: a value that generation cannot use.
    """
    kept = {name: value for name, value in found.items() if value is not None}
    try:
        for name, value in kept.items():
            if name in RANGES:
                check(name, value)
            elif name in TOKENS:
                tokens(name, value)
            elif name == "stop_strings":
                strings(name, value)
            elif name == "do_sample" and not isinstance(value, bool):
                raise ValueError(f"do_sample must be true or false, got {value!r:.80}")
            elif name in _NOT_DONE and value not in _NOT_DONE[name] and value != []:
                warn_once(label, f"{name} = {value!r:.80} is not done here; tokens are chosen without it")
    except ValueError as e:
        raise CheckpointError(f"{label}: {e}") from e
    return kept
