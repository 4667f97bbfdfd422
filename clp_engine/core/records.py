"""Read JSON back as the dataclass it was written from, with every field present and of its type.

A JSON file may have been truncated, edited or taken from another program. msgspec checks the types of all annotations, at any
depth, so that callers need no checks. A mismatch raises a ConfigError that names the field.
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
    """The JSON file `path` as a `kind`. Names that `kind` does not have are ignored.

    kind: a dataclass or NamedTuple of str, bool, int, float and Any, and of lists, tuples, dicts, unions, dataclasses and
        NamedTuples of these.
    known: values that replace the file's values.

    Raises ConfigError naming the file and `remedy`.
    """
    return of(kind, {**read_json(path), **(known or {})}, path, remedy)


def of(kind: Any, value: Any, path: str | Path, remedy: str = AGAIN) -> Any:
    """`value`, decoded JSON from `path`, as a `kind`; see `read`."""
    import msgspec  # not needed for `clp-engine --help`

    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError) as error:  # UnicodeError: a lone surrogate
        said = str(error).replace("`", "").replace("$.", "")
        said = said[0].lower() + said[1:]
        raise ConfigError(f"{path} is damaged or another's ({said}); {remedy}") from None


def finite(numbers: Mapping[str, float | None], path: str | Path, remedy: str = AGAIN) -> None:
    """Raises ConfigError for the first of the named numbers that is NaN or infinite."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{path} is damaged or another's ({name} is {number}); {remedy}")
