"""Exceptions and warnings of jaxq.

Each exception is also the builtin that a caller would expect (`ValueError`, `NotImplementedError`), so that code
which does not know jaxq catches the right thing. Messages name the file and tensor, what was found, what was
expected, and what to do.
"""

from __future__ import annotations


class JqError(Exception):
    """Base of everything that jaxq raises on purpose."""


class CheckpointError(JqError, ValueError):
    """A file is damaged, incomplete, hostile, or disagrees with itself."""


class FormatError(JqError, ValueError):
    """A quantization config or its tensors do not describe what the format allows."""


class UnsupportedError(JqError, NotImplementedError):
    """Known, well-formed, and not done here; the message names the nearest thing that works."""


class CalibrationError(JqError, ValueError):
    """Calibration data or statistics that cannot be used."""


class JqWarning(UserWarning):
    """Something a user should know once: an ignored option, a slower path with the same numbers."""
