"""The condition of a row: a weighting of the objectives and a KL coefficient."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.core.errors import ConfigError, shown

KL_CONDITIONING = ("none", "linear", "odds")


@dataclass(frozen=True)
class Conditions:
    """One condition `(w, kl)` per row.

    weights: (rows, M) float32. Each row lies on the simplex, or is all zero for the reference policy.
    kl: (rows,) float32, alpha in [0, 1]. A run configured with beta has beta >= 0 here.
    """

    weights: torch.Tensor
    kl: torch.Tensor

    def __len__(self) -> int:
        return self.weights.shape[0]

    def __getitem__(self, rows: Any) -> Conditions:
        return Conditions(self.weights[rows], self.kl[rows])

    def repeat(self, times: int) -> Conditions:
        """Repeat each row `times` times in succession, for a prompt with `times` completions."""
        return Conditions(self.weights.repeat_interleave(times, 0), self.kl.repeat_interleave(times, 0))

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions(self.weights.to(device), self.kl.to(device))

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        return Conditions(torch.cat([p.weights for p in parts]), torch.cat([p.kl for p in parts]))

    @staticmethod
    def reference(rows: int, num_objectives: int) -> Conditions:
        """Rows with a blend of zero, which is the base model itself."""
        return Conditions(torch.zeros(rows, num_objectives), torch.zeros(rows))


def check_objectives(names: Sequence[str]) -> None:
    """Raises ConfigError unless there is a name, no name occurs twice, and each can be written in a weighting (a=0.7,b=0.3)."""
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"objectives={shown(list(names))}: expected at least one name, no name twice")
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
            raise ConfigError(f"objective {shown(name)}: expected a name, without blanks around it")
        if {"=", ","} & set(name):
            raise ConfigError(
                f"objective {shown(name)}: = and , separate the weights of objectives (a=0.7,b=0.3); give it a name without "
                "them, such as " + repr(re.sub("[=,]+", "_", name))
            )


def blend_coefficients(
    conditions: Conditions,
    kl_conditioning: str = "none",
    *,
    min_kl: float | None = None,
    kl_is_beta: bool = False,
) -> torch.Tensor:
    """Coefficient of each objective's delta: `c(alpha) * w`, (rows, M) float32.

        none    c = 1
        linear  c = 1 - alpha
        odds    c = ((1 - alpha) / alpha) / ((1 - alpha_min) / alpha_min)

    The optimum of a log-linear policy is proportional to `(1 - alpha) / alpha`. The form `odds` is therefore exact for
    such a policy, and `linear` (the form of the CLP paper) is an approximation. A run with beta uses the same forms with
    `alpha = beta / (1 + beta)`.

    min_kl: the smallest KL coefficient of training, at which the odds form has c = 1.
    Raises ValueError for an unknown form. With odds, raises ValueError for a missing min_kl, and for a KL coefficient of
    zero, whose optimum is infinitely far from the reference.
    """
    if kl_conditioning not in KL_CONDITIONING:
        raise ValueError(f"kl_conditioning={kl_conditioning!r}: expected one of {', '.join(KL_CONDITIONING)}")
    if kl_conditioning == "none":
        return conditions.weights
    alpha = conditions.kl / (1 + conditions.kl) if kl_is_beta else conditions.kl
    if kl_conditioning == "linear":
        return conditions.weights * (1 - alpha).unsqueeze(-1)
    if min_kl is None or min_kl <= 0 or (min_kl >= 1 and not kl_is_beta):
        raise ValueError(
            f"kl_conditioning='odds' needs min_kl, the smallest KL coefficient of training: "
            f"{'beta > 0' if kl_is_beta else 'alpha between 0 and 1'}; got {min_kl}"
        )
    # A reference row has no weights, so its alpha is ignored.
    is_reference = (conditions.weights == 0).all(-1)
    if bool(((alpha <= 0) & ~is_reference).any()):
        raise ValueError(
            "kl_conditioning='odds' needs a KL coefficient above 0 in every row; "
            f"got {conditions.kl[~is_reference].min().item():g}"
        )
    alpha_min = min_kl / (1 + min_kl) if kl_is_beta else min_kl
    odds = (1 - alpha) / torch.where(is_reference, 1.0, alpha) * (alpha_min / (1 - alpha_min))
    return conditions.weights * odds.unsqueeze(-1)


def parse_weights(
    weights: Mapping[str, float] | Sequence[float] | torch.Tensor | None,
    objectives: Sequence[str],
    *,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """One weighting on the simplex, (M,) float32.

    weights: a mapping by objective name (an absent name has weight 0), a sequence in the order of `objectives`, or None for
        the uniform weighting. The result is normalised to sum to 1.

    Raises ValueError for unknown names, negative weights, a wrong count, or a sum that differs from 1 by more than `tolerance`.
    """
    if weights is None:
        return torch.full((len(objectives),), 1.0 / len(objectives))
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in objectives]
        if unknown:
            plural = "s" if len(unknown) > 1 else ""
            raise ValueError(
                f"unknown objective{plural} {', '.join(map(repr, unknown))}; "
                f"this policy has {', '.join(objectives)}"
            )
        values = [float(weights.get(name, 0.0)) for name in objectives]
    else:
        values = [float(v) for v in weights]
        if len(values) != len(objectives):
            raise ValueError(
                f"weights has {len(values)} entries; expected {len(objectives)}, "
                f"in the order {', '.join(objectives)}"
            )
    given = ", ".join(f"{n}={v:g}" for n, v in zip(objectives, values))
    if not all(v >= 0 for v in values):  # also catches NaN
        raise ValueError(f"weights must not be negative; got {given}")
    total = sum(values)
    if abs(total - 1) > tolerance:
        raise ValueError(f"weights must sum to 1; got {given}, which sums to {total:g}")
    return torch.tensor(values, dtype=torch.float64).div(total).float()


# The file beside adapters on disk that says how they are blended, and the version of its entries for a stack.
BLEND_FILE, STACK_FORMAT = "clp_blend.json", 1


@dataclass(frozen=True)
class Blending:
    """What makes the coefficients of a policy's deltas out of a user's weights and KL coefficient.

    objectives: their names in order. blended: there is a delta for each of them; otherwise a single delta serves all.
    kl_conditioning, min_kl, kl_is_beta: see `blend_coefficients`.
    default_kl, default_weights: those of a row that names none; None is the uniform weighting.
    """

    objectives: tuple[str, ...]
    blended: bool = True
    kl_conditioning: str = "none"
    min_kl: float | None = None
    default_kl: float = 0.1
    kl_is_beta: bool = False
    default_weights: tuple[float, ...] | None = None

    def conditions(self, weights: Any = None, kl: Any = None, rows: int = 1) -> Conditions:
        """Per-row conditions. weights, kl: as of `SteerableModel.conditions`. Raises ConfigError naming the invalid value."""
        per_row = (
            isinstance(weights, torch.Tensor)
            and weights.dim() == 2
            or isinstance(weights, Sequence)
            and weights
            and not isinstance(weights[0], int | float)
        )
        given = self.default_weights if weights is None else weights
        try:
            parsed = [parse_weights(w, self.objectives) for w in (weights if per_row else [given])]
        except ValueError as error:
            raise ConfigError(str(error)) from None
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"weights={shown(weights)}: expected numbers from 0 to 1 ({error})") from None
        try:
            kls = torch.as_tensor(self.default_kl if kl is None else kl, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"kl={shown(kl)}: expected a number, or one per row ({error})") from None
        for name, count in (("weights", len(parsed)), ("kl", len(kls))):
            if count not in (1, rows):
                raise ConfigError(f"{name} has {count} entries for {rows} rows; expected one, or one per row")
        if not bool(((kls >= 0) & kls.isfinite()).all()) or not self.kl_is_beta and bool((kls > 1).any()):
            raise ConfigError(
                f"kl={shown(kl)}: expected {'beta >= 0' if self.kl_is_beta else 'alpha between 0 and 1'}"
            )
        return Conditions(torch.stack(parsed).expand(rows, -1), kls.expand(rows))

    def coefficients(self, conditions: Conditions) -> torch.Tensor:
        """The blend (rows, D), one coefficient per delta, see `blend_coefficients`. Raises ConfigError if there is none."""
        if not self.blended:
            conditions = Conditions(conditions.weights.any(-1, keepdim=True).float(), conditions.kl)
        try:
            return blend_coefficients(
                conditions, self.kl_conditioning, min_kl=self.min_kl, kl_is_beta=self.kl_is_beta
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
