"""The settings that turn a base model into a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clp_engine.core import ranges, records
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import read_json

SPEC_FILE = "clp_config.json"


@dataclass(frozen=True)
class PolicySpec:
    """The settings that turn a base model into a policy. They are saved beside the adapters, and suffice to build it again.

    base_model: name or path as given. objectives: names in order. ranks, lora_alphas: one per delta.
    target_modules: exact names of the layers with low-rank factors. conditioning, carrier: see `models.forms`.
    min_kl: the smallest KL coefficient of training, for kl_conditioning "odds".
    kl_is_beta: whether `kl` means beta (objective w.R - beta KL) instead of alpha ((1 - alpha) w.R - alpha KL).
    default_kl: the KL coefficient of a row without one.
    prompt_template: the text that prompt conditioning writes into the prompt, see `prompt_conditioning`. None without it.
    """

    base_model: str
    objectives: tuple[str, ...]
    ranks: tuple[int, ...]
    lora_alphas: tuple[float, ...]
    target_modules: tuple[str, ...]
    conditioning: str = "lora"
    kl_conditioning: str = "none"
    min_kl: float | None = None
    default_kl: float = 0.1
    kl_is_beta: bool = False
    carrier: str = "lora"
    prompt_template: str | None = None

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.lora_alphas, self.ranks))


def read_spec(path: Path) -> PolicySpec:
    raw = read_json(path)
    names = {field.name for field in dataclasses.fields(PolicySpec)}
    if unknown := sorted(set(raw) - names):
        raise ConfigError(
            f"{path} has settings this version does not know ({', '.join(unknown)}); it was written by a newer one"
        )
    spec = records.of(PolicySpec, raw, path, "write or copy the policy again")
    try:
        ranges.ADAPTER["rank"].check("ranks", spec.ranks, several=ranges.LISTS)
        ranges.ADAPTER["lora_alpha"].check("lora_alphas", spec.lora_alphas, several=ranges.LISTS)
        ranges.check(ranges.ADAPTER, default_kl=spec.default_kl)
        if spec.min_kl is not None:
            ranges.check(ranges.ADAPTER, min_kl=spec.min_kl)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged ({error}); write or copy the policy again") from error
    return spec


def per_delta(value, deltas: Sequence[str], name: str) -> tuple:
    """One value for each delta. deltas: the names of the objectives, or one name if there is a single delta."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(deltas)
    if len(values) != len(deltas):
        raise ConfigError(
            f"{name} has {len(values)} entries for {len(deltas)} objectives ({', '.join(deltas)})"
        )
    return values
