"""Errors that a user can act on. The command line prints each as one line; in Python they are ordinary ValueErrors."""

from __future__ import annotations

import reprlib
from typing import Any


class ConfigError(ValueError):
    """A setting, file or argument that cannot be used. The message says what was given, what was expected, what to do."""


class DrawingFailed(RuntimeError):
    """Another program that draws completions was lost, and did not come back in time. What was trained before is whole."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """The repr of a value for an error message, shortened if it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return f"a number of {value.bit_length() * 3 // 10:,} digits"
