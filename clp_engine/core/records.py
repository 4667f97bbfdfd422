"""JSON as the dataclass it was written from: every field there and of its type, or a ConfigError that says which is not.

A file that somebody cut, changed or took from elsewhere may hold any JSON. What is built here has the types that its
annotations promise, however deep, so that nobody who uses it has to look again.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import read_json

AGAIN = "write or copy it again"
_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null", dict: "an object"}


class _Misfit(Exception):
    """What does not fit, in words."""


def read(path: str | Path, kind: type, remedy: str = AGAIN, known: Mapping[str, Any] | None = None) -> Any:
    """The `kind` in a JSON file; names that `kind` has not are left out. known: values in place of the file's.

    kind: a dataclass, or a NamedTuple, of str, bool, int, float, Any, and of lists, tuples, dicts, unions and further ones of
    such. Raises ConfigError naming the file, and `remedy`.
    """
    return of(kind, {**read_json(path), **(known or {})}, path, remedy)


def of(kind: Any, value: Any, path: str | Path, remedy: str = AGAIN) -> Any:
    """`value`, decoded JSON out of `path`, as `kind`; see `read`."""
    try:
        return _built(kind, value, "")
    except _Misfit as error:
        raise ConfigError(f"{path} is damaged or another's ({error}); {remedy}") from None


def _built(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _first(arguments, value, where)
    if origin is list and isinstance(value, list):
        return [_built(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list):  # tuple[x, ...]
        return tuple(_built(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _built(arguments[1], item, _within(where, name)) for name, item in value.items()}
    if hasattr(kind, "_fields") and isinstance(value, list):
        hints = typing.get_type_hints(kind)
        if len(value) == len(hints):
            return kind(*(_built(hint, v, _within(where, name)) for (name, hint), v in zip(hints.items(), value)))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _object(kind, value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    elif kind in _WORDS and type(value) is kind:
        return value
    raise _Misfit(f"{where or 'it'} is {shown(value)}, expected {_word(kind)}")


def _first(options: tuple, value: Any, where: str) -> Any:
    """As the first option that fits; what is wrong with the last is told where none does."""
    for option in options:
        if option is type(None) and value is None:
            return None
    options = tuple(option for option in options if option is not type(None))
    for option in options[:-1]:
        try:
            return _built(option, value, where)
        except _Misfit:
            continue
    return _built(options[-1], value, where)


def _object(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given[field.name] = _built(hints[field.name], value[field.name], _within(where, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _Misfit(f"{_within(where, field.name)} is missing")
    return kind(**given)


def _within(where: str, name: str) -> str:
    name = name if name.isidentifier() else shown(name)
    return f"{where}.{name}" if where else name


def _word(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (list, tuple) or hasattr(kind, "_fields"):
        return "a list"
    return _WORDS[dict] if origin is dict or dataclasses.is_dataclass(kind) else _WORDS[kind]


def finite(numbers: Mapping[str, float | None], path: str | Path, remedy: str = AGAIN) -> None:
    """Raises ConfigError for the first of the named numbers that is NaN or infinite."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{path} is damaged or another's ({name} is {number}); {remedy}")
