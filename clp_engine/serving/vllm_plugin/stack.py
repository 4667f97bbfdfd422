"""A stack as a server sees it: its clp_blend.json, and the coefficients that a request's weights become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clp_engine.core import records
from clp_engine.core.conditions import BLEND_FILE, STACK_FORMAT, Blending
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import digest, read_json
from clp_engine.core.ranges import parse_assignments

# Keys of a request's extra_args (vllm_xargs): one with everything, or one each.
WHOLE, WEIGHTS, KL = "clp", "clp_weights", "clp_kl"
FIELDS = ("weights", "kl")


_AGAIN = "export the stack again"


@dataclass(frozen=True)
class _Entries:
    """The entries of BLEND_FILE beside a stack."""

    objectives: tuple[str, ...]
    ranks: tuple[int, ...]
    version: str
    blended: bool
    kl_conditioning: str
    min_kl: float | None
    default_kl: float
    kl_is_beta: bool
    default_weights: dict[str, float]


@dataclass(frozen=True)
class Stack:
    """ranks: rows of the stack that each delta has. version: of the weights, equal for equal files."""

    blending: Blending
    ranks: tuple[int, ...]
    version: str

    def coefficients(self, weights: Any = None, kl: Any = None) -> tuple[float, ...]:
        """The coefficient of each delta. Raises ConfigError for weights or a KL coefficient that the policy does not take."""
        return tuple(self.blending.coefficients(self.blending.conditions(weights, kl))[0].tolist())


def read(directory: str | Path) -> Stack | None:
    """The stack in the directory of an adapter. None for an adapter that is none. Raises ConfigError for a damaged file."""
    files = [Path(directory) / name for name in (BLEND_FILE, "adapter_model.safetensors")]
    try:
        states = tuple((found.st_mtime_ns, found.st_size) for found in (path.stat() for path in files))
    except OSError:
        return None
    return _read(*files, states)


@lru_cache(maxsize=256)
def _read(path: Path, weights: Path, states: tuple) -> Stack | None:
    raw = read_json(path)
    if "stack" not in raw:
        return None  # how separate adapters are blended
    if raw["stack"] != STACK_FORMAT:
        raise ConfigError(f"{path} was written by another version of clp-engine; {_AGAIN}")
    entries = records.of(_Entries, raw, path, _AGAIN)
    if entries.version != digest(weights)[:16]:
        raise ConfigError(
            f"{path} is of another adapter than the one beside it; {_AGAIN}, or remove {path.name} to serve the adapter as "
            "it is"
        )
    numbers = {"min_kl": entries.min_kl, "default_kl": entries.default_kl}
    records.finite(numbers, path, _AGAIN)
    if set(entries.default_weights) != set(entries.objectives):
        raise ConfigError(f"{path} is damaged (default_weights is not of its objectives); {_AGAIN}")
    blending = Blending(
        entries.objectives,
        entries.blended,
        entries.kl_conditioning,
        **numbers,
        kl_is_beta=entries.kl_is_beta,
        default_weights=tuple(entries.default_weights[name] for name in entries.objectives),
    )
    try:
        blending.conditions()
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged ({error}); {_AGAIN}") from error
    return Stack(blending, entries.ranks, entries.version)


def asked(extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{"weights": ..., "kl": ...} of a request, each where it was given. None for a request that says nothing about a blend.

    Over HTTP, vllm_xargs carries texts, numbers and lists of them. There "clp" is the JSON text of the object, and
    "clp_weights" the text a=0.7,b=0.3 or a list of numbers in the order of the objectives.

    Raises ConfigError for an unknown key and for a value of another kind.
    """
    given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith("clp")}
    if not given:
        return None
    if unknown := sorted(set(given) - {WHOLE, WEIGHTS, KL}):
        raise ConfigError(f"unknown field {unknown[0]!r}; expected {WHOLE}, or {WEIGHTS} and {KL}")
    if WHOLE in given:
        if len(given) > 1:
            raise ConfigError(f"{WHOLE} has everything; leave out {WEIGHTS} and {KL}, or {WHOLE}")
        return _fields(given[WHOLE])
    fields: dict[str, Any] = {}
    if KL in given:
        fields["kl"] = _number(KL, given[KL])
    if WEIGHTS in given:
        value = given[WEIGHTS]
        fields["weights"] = _weights(
            WEIGHTS, parse_assignments(value, WEIGHTS) if isinstance(value, str) else value
        )
    return fields


def _fields(whole: Any) -> dict[str, Any]:
    if isinstance(whole, str):
        try:
            whole = json.loads(whole)
        except ValueError as error:
            raise ConfigError(
                f"{WHOLE}={shown(whole)}: expected a JSON object with weights and kl ({error})"
            ) from None
    if not isinstance(whole, Mapping):
        raise ConfigError(f"{WHOLE}={shown(whole)}: expected an object with weights and kl")
    if unknown := [name for name in whole if name not in FIELDS]:
        raise ConfigError(f"unknown field {unknown[0]!r}; expected {', '.join(FIELDS)}")
    fields: dict[str, Any] = {}
    if whole.get("weights") is not None:
        fields["weights"] = _weights("weights", whole["weights"])
    if whole.get("kl") is not None:
        fields["kl"] = _number("kl", whole["kl"])
    return fields


def _weights(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _number(f"{name}.{key}", weight) for key, weight in value.items()}
    if isinstance(value, list | tuple):
        return [_number(f"{name}[{i}]", weight) for i, weight in enumerate(value)]
    raise ConfigError(f"{name}={shown(value)}: expected a number for each objective")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={shown(value)}: expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name}={shown(value)}: expected a number") from None
