"""The methods of a comparison, and the reading of their entries in the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clp_engine.core import ranges
from clp_engine.core.conditions import parse_weights
from clp_engine.core.errors import ConfigError
from clp_engine.objectives.weightings import simplex_lattice

KINDS = ("clp", "specialists", "soup", "logit_mixing", "kl_specialists")
BUDGETS = ("equal", "each")
# A specialist has one weighting: these settings have no effect on it, and must not distinguish two equal specialists.
SAMPLER_SETTINGS = (
    "weight_sampler",
    "concentration",
    "corner_probability",
    "grid_resolution",
    "fixed_weights",
)
Weighting = tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """A method: one row of the report.

    settings: of CLPConfig, where they differ from the shared ones
    weightings: of specialists
    kls, kl_name: of kl_specialists; alpha or beta
    budget: of soup and logit_mixing: one full budget for all specialists ("equal"), or one for each ("each")
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    weightings: tuple[Weighting, ...] = ()
    kls: tuple[float, ...] = ()
    kl_name: str = "alpha"
    budget: str = "equal"

    @property
    def description(self) -> str:
        """The method in a few words: its kind, and the settings that differ."""
        changed = ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items())
        each = "each with a full budget" if self.budget == "each" else "sharing one budget"
        what = {
            "clp": "one conditioned run",
            "specialists": f"{len(self.weightings)} runs, one per weighting",
            "soup": f"a specialist per objective, deltas interpolated, {each}",
            "logit_mixing": f"a specialist per objective, logits mixed while decoding, {each}",
            "kl_specialists": f"{len(self.kls)} runs, one per {self.kl_name}",
        }[self.kind]
        return f"{what} ({changed})" if changed else what


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """`value` with its keys as strings. Raises ConfigError unless it is a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected names and values; got {value!r}")
    return {str(key): entry for key, entry in value.items()}


def read_methods(value: Any, objectives: Sequence[str]) -> tuple[Method, ...]:
    """The methods of the configuration. Raises ConfigError for an invalid one, and for two that would share a folder."""
    if not value:
        raise ConfigError("methods is missing; name at least one, such as 'CLP: {conditioning: lora}'")
    methods = tuple(_method(name, raw or {}, objectives) for name, raw in mapping("methods", value).items())
    slugs: dict[str, str] = {}
    for method in methods:
        other = slugs.setdefault(slug(method.name), method.name)
        if other != method.name:
            raise ConfigError(f"methods {other!r} and {method.name!r} would share a folder; rename one")
    return methods


def _method(name: str, raw: Any, objectives: Sequence[str]) -> Method:
    values = dict(mapping(f"method {name!r}", raw))
    kind = values.pop("kind", "clp")
    if kind not in KINDS:
        raise ConfigError(f"method {name!r}: kind {kind!r}; expected one of {', '.join(KINDS)}")
    taken = [
        s
        for s in ("seed", "output_dir", "max_generated_tokens", "max_steps", "num_train_epochs")
        if s in values
    ]
    if kind != "clp":
        taken += [s for s in ("conditioning", *SAMPLER_SETTINGS) if s in values]
    if taken:
        raise ConfigError(f"method {name!r}: {taken[0]} is set by the comparison itself; leave it out")
    own: dict[str, Any] = {}
    if kind == "specialists":
        own["weightings"] = _weightings(name, values.pop("weightings", None), objectives)
    elif kind in ("soup", "logit_mixing"):
        own["budget"] = values.pop("budget", "equal")
        if own["budget"] not in BUDGETS:
            raise ConfigError(f"method {name!r}: budget {own['budget']!r}; expected {' or '.join(BUDGETS)}")
        if len(objectives) < 2:
            raise ConfigError(
                f"method {name!r}: {kind} takes at least two objectives; there is {objectives[0]}"
            )
    elif kind == "kl_specialists":
        own |= _kls(name, values, objectives)
    return Method(name, kind, values, **own)


def _weightings(name: str, value: Any, objectives: Sequence[str]) -> tuple[Weighting, ...]:
    if value is None:
        value = simplex_lattice(len(objectives), 5 if len(objectives) == 2 else 3).flip(0).tolist()
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"method {name!r}: weightings={value!r}: expected a list, such as [[1, 0], [0, 1]]")
    try:
        parsed = tuple(rounded(parse_weights(w, objectives).tolist()) for w in value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name!r}: {error}") from error
    if len(set(parsed)) < len(parsed):
        raise ConfigError(f"method {name!r}: a weighting occurs twice")
    return parsed


def _kls(name: str, values: dict[str, Any], objectives: Sequence[str]) -> dict[str, Any]:
    """The fields kl_name and kls, from `alphas` or `betas`, which are removed from `values`."""
    given = [(key, values.pop(key)) for key in ("alphas", "betas") if key in values]
    if len(given) != 1 or not isinstance(given[0][1], list | tuple) or not given[0][1]:
        raise ConfigError(f"method {name!r}: expected alphas: [0.01, 0.1, ...], or betas")
    if len(objectives) != 1:
        raise ConfigError(f"method {name!r}: kl_specialists takes one objective; got {', '.join(objectives)}")
    key, kls = given[0]
    ranges.TRAINING[key[:-1]].check(f"method {name!r}: {key}", kls, several=ranges.LISTS)
    return {"kl_name": key[:-1], "kls": tuple(float(k) for k in kls)}


def read_references(value: Any, methods: Sequence[Method]) -> tuple[str, ...]:
    """The names of the baselines: the given ones, else the first soup and the first specialists."""
    if value is None:
        kinds = [{"soup"}, {"specialists", "kl_specialists"}]
        firsts = [next((m.name for m in methods if m.kind in kind), None) for kind in kinds]
        return tuple(name for name in firsts if name is not None)
    if not isinstance(value, str | list | tuple):
        raise ConfigError(f"reference_methods={value!r}: expected names of methods")
    names = [value] if isinstance(value, str) else list(value)
    unknown = [n for n in names if n not in {m.name for m in methods}]
    if unknown:
        raise ConfigError(
            f"reference_methods: unknown method {unknown[0]!r}; the methods are {', '.join(m.name for m in methods)}"
        )
    return tuple(names)


def rounded(weights: Sequence[float]) -> Weighting:
    """Weights with six digits, so that float32 values compare equal."""
    # Six digits, as in reports: weights are float32, and 0.1 should be 0.1 wherever it comes from.
    return tuple(round(float(w), 6) for w in weights)


def slug(text: str) -> str:
    """A name for folders: lower case, with hyphens for other characters than letters, digits, `.` and `+`."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-") or "method"


def weighting_name(weights: Sequence[float]) -> str:
    """A weighting as part of a folder's name, such as 0.25-0.75."""
    return "-".join(f"{w:g}" for w in weights)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
