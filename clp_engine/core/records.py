"""JSON as the dataclass it was written from: every field there and of its type, or a ConfigError that says which is not.

A file that somebody cut, changed or took from elsewhere may hold any JSON. What msgspec makes of it has the types that its
annotations promise, however deep, so that nobody who uses it has to look again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clp_engine.core.errors import ConfigError
from clp_engine.core.files import read_json

AGAIN = "write or copy it again"


def read(path: str | Path, kind: type, remedy: str = AGAIN, known: Mapping[str, Any] | None = None) -> Any:
    """The `kind` in a JSON file; names that `kind` has not are left out. known: values in place of the file's.

    kind: a dataclass, or a NamedTuple, of str, bool, int, float, Any, and of lists, tuples, dicts, unions and further ones of
    such. Raises ConfigError naming the file, and `remedy`.
    """
    return of(kind, {**read_json(path), **(known or {})}, path, remedy)


def of(kind: Any, value: Any, path: str | Path, remedy: str = AGAIN) -> Any:
    """`value`, decoded JSON out of `path`, as `kind`; see `read`."""
    import msgspec  # `clp-engine --help` does without

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "").replace("$.", "")
        said = said[0].lower() + said[1:]
        raise ConfigError(f"{path} is damaged or another's ({said}); {remedy}") from None


def finite(numbers: Mapping[str, float | None], path: str | Path, remedy: str = AGAIN) -> None:
    """Raises ConfigError for the first of the named numbers that is NaN or infinite."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{path} is damaged or another's ({name} is {number}); {remedy}")
