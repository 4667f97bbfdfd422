"""The request of POST /api/generate, checked. A field that is missing, unknown or out of range raises a ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clp_engine.core.errors import ConfigError, shown

MAX_CHARACTERS = 200_000
MAX_NEW_TOKENS = 2048
MAX_TEMPERATURE = 5.0
_COLDEST = 1e-30


@dataclass(frozen=True)
class GenerateRequest:
    """The request for a completion.

    text: the prompt. weights: weight by objective; an objective that is left out weighs 0, and None weighs all equally.
    kl: the KL coefficient, where the policy is conditioned on it. temperature: of sampling; 0 takes the likeliest token.
    max_new_tokens: the most tokens that the completion may have. seed: of sampling; one seed always gives one completion.
    chat: whether the text is the user's message in the tokenizer's chat template. base: whether the base model's completion
    is wanted as well.
    """

    text: str
    weights: dict[str, float] | None = None
    kl: float | None = None
    temperature: float = 0.0
    max_new_tokens: int = 64
    seed: int = 0
    chat: bool = False
    base: bool = True

    @classmethod
    def parse(cls, raw: Any) -> GenerateRequest:
        """A request from decoded JSON. Raises ConfigError unless `raw` is an object of these fields, each in its range."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"the request is {kind(raw)}; expected an object with a text")
        known = [f.name for f in fields(cls)]
        unknown = [name for name in raw if name not in known]
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}; expected {', '.join(known)}")
        if "text" not in raw:
            raise ConfigError("text is missing")
        checked = {name: _CHECKS[name](name, value) for name, value in raw.items()}
        return cls(**checked)


def kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {kind(value)}; expected a text")
    if not value.strip():
        raise ConfigError("the text is empty; write or paste one, or choose an example")
    if len(value) > MAX_CHARACTERS:
        raise ConfigError(f"the text has {len(value):,} characters; at most {MAX_CHARACTERS:,} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        raise ConfigError("the text holds a character that is none (half of a surrogate pair)") from None
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {kind(value)}; expected a number")
    if not low <= value <= high:  # also catches NaN; an integer too large for a float compares as it is
        given = f"{value:g}" if isinstance(value, float) else shown(value)
        raise ConfigError(f"{name}={given}: expected {low:g} to {high:g}")
    return float(value)


def temperature(name: str, value: Any, high: float) -> float:
    """A temperature. One so small that float32 does not hold the logits divided by it becomes 0, its limit."""
    given = number(name, value, 0.0, high)
    return given if given >= _COLDEST else 0.0


def whole(name: str, value: Any, low: int, high: int) -> int:
    given = number(name, value, low, high)
    if given != int(given):
        raise ConfigError(f"{name}={value}: expected a whole number")
    return int(given)


def _weights(name: str, value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {kind(value)}; expected an object with a number for each objective")
    return {str(key): number(f"{name}.{key}", weight, 0.0, 1.0) for key, weight in value.items()}


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {kind(value)}; expected true or false")
    return value


_CHECKS = {
    "text": _text,
    "weights": _weights,
    # Its range depends on the policy, which checks it.
    "kl": lambda name, value: None if value is None else number(name, value, 0.0, 1e6),
    "temperature": lambda name, value: temperature(name, value, MAX_TEMPERATURE),
    "max_new_tokens": lambda name, value: whole(name, value, 1, MAX_NEW_TOKENS),
    "seed": lambda name, value: whole(name, value, 0, 2**31 - 1),
    "chat": flag,
    "base": flag,
}
