"""PolicyGradient: the policy gradient of J = reward_scale * w.R - kl_coef * KL(pi || pi_ref), as `LossSettings` estimate it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.objectives.advantages import rescale_rewards
from clp_engine.objectives.coefficients import (
    DIFFERENTIATED,
    Coefficients,
    RewardedTokens,
    advantages,
    coefficients,
    needs_reference,
    objective_scales,
    returns_to_go,
)
from clp_engine.objectives.importance import Correction
from clp_engine.objectives.losses import loss_weights
from clp_engine.objectives.objective import ForwardPass, Needs
from clp_engine.objectives.value_head import ValueHead, explained_variance
from clp_engine.objectives.variance_mix import MixController

_VALUE = "value."  # in front of the value head's tensors


@dataclass(frozen=True)
class LossSettings:
    """How the gradient of J is estimated; a function in the right column says what each setting does.

    kl_estimator, epsilon, epsilon_high, delta                  `coefficients.coefficients`
    baseline, scale_rewards                                     `advantages.baselined`, `advantages.rescale_rewards`
    loss_type, max_completion_length                            `losses.loss_weights`
    correction                                                  `importance.importance_weights`, None for none
    kl_is_beta, log_kl                                          `coefficients.objective_scales`, `coefficients.needs_reference`
    mask_truncated: completions that never ended are left out of the loss, not out of the baseline.
    """

    kl_estimator: str = "return"
    baseline: str = "leave_one_out"
    scale_rewards: str = "none"
    loss_type: str = "sequence"
    max_completion_length: int | None = None
    mask_truncated: bool = False
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    kl_is_beta: bool = False
    log_kl: bool = False
    correction: Correction | None = Correction()


@dataclass(frozen=True)
class Learned:
    """What a micro-batch leaves for the end of its step, on its device.

    mix_sums: (2,), what `MixController.update` takes. targets, predictions: (N,), what the value head is fitted to and what it
    said, of the tokens that have a return. None where the objective has no use for them.
    """

    mix_sums: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


class PolicyGradient:
    """An `Objective`: it owns the value head of baseline "value" and the share of `exact` in estimator "mixed"."""

    def __init__(self, settings: LossSettings | None = None, value_head: ValueHead | None = None):
        self.settings = settings or LossSettings()
        self.value_head = value_head
        self.mix_controller = MixController()

    @property
    def mix(self) -> float:
        """The share of `exact` in `mixed` in the present step."""
        return self.mix_controller.mix

    @property
    def needs(self) -> Needs:
        s = self.settings
        return Needs(
            exact_kl="kl" in DIFFERENTIATED[s.kl_estimator],
            group=s.baseline in ("leave_one_out", "group_mean"),
            value=self.value_head is not None,
            hidden_gradient=s.kl_estimator == "mixed",
        )

    def uses_reference(self, kl: torch.Tensor) -> bool:
        return needs_reference(kl, self.settings.log_kl)

    def scales(self, kl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return objective_scales(kl, self.settings.kl_is_beta)

    def prepared(
        self, rewards: torch.Tensor, group_size: int, mask: torch.Tensor, terminated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.settings
        counted = mask & terminated.unsqueeze(-1) if s.mask_truncated else mask
        weights = loss_weights(counted, s.loss_type, s.max_completion_length)
        return rescale_rewards(rewards, group_size, s.scale_rewards), weights

    def predictions(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        reward_scale: torch.Tensor,
        kl_coef: torch.Tensor,
    ) -> torch.Tensor | None:
        if self.value_head is None:
            return None
        return self.value_head(hidden, self.value_head.features(weights, reward_scale, kl_coef)[rows])

    def coefficients(
        self, rewarded: RewardedTokens, estimator: str | None = None, baseline: str | None = None
    ) -> Coefficients:
        """The coefficients of the settings' estimator and baseline, or of others."""
        s, baseline = self.settings, baseline or self.settings.baseline
        if baseline != "value":
            rewarded = dataclasses.replace(rewarded, values=None)
        return coefficients(
            rewarded,
            estimator=estimator or s.kl_estimator,
            baseline=baseline,
            mix=self.mix,
            epsilon=s.epsilon,
            epsilon_high=s.epsilon_high,
            delta=s.delta,
            correction=s.correction,
        )

    def advantages(self, rewarded: RewardedTokens) -> torch.Tensor:
        s = self.settings
        scaled = rescale_rewards(rewarded.rewards, rewarded.group_size, s.scale_rewards)
        return advantages(
            dataclasses.replace(rewarded, rewards=scaled), estimator=s.kl_estimator, baseline=s.baseline
        )

    def learn(self, forward: ForwardPass, step_tokens: int | torch.Tensor) -> Learned:
        sums = self._mix_sums(forward) if self.settings.kl_estimator == "mixed" else None
        if self.value_head is None:
            return Learned(sums)
        assert forward.predicted is not None  # by the head
        tokens = forward.rewarded.tokens
        returns = returns_to_go(forward.rewarded, estimator=self.settings.kl_estimator, mix=self.mix)
        fitted = (forward.counted & ~returns.isnan())[tokens.mask]
        targets, predicted = returns[tokens.mask][fitted], forward.predicted[fitted]
        (self.value_head.loss(predicted, targets) / step_tokens).backward()
        return Learned(sums, targets, predicted.detach())

    def _mix_sums(self, forward: ForwardPass) -> torch.Tensor:
        by_return, by_exact = (
            torch.autograd.grad(
                forward.loss(self.coefficients(forward.rewarded, name)), forward.hidden, retain_graph=True
            )[0]
            for name in ("return", "exact")
        )
        gap = by_return - by_exact
        return torch.stack(((by_return * gap).sum(), gap.square().sum()))

    def metrics(self, learned: Sequence[Learned], first: bool) -> dict[str, torch.Tensor]:
        found = {}
        if self.value_head is not None:
            targets, predictions = (
                torch.cat([getattr(part, name) for part in learned]) for name in ("targets", "predictions")
            )
            found["value_loss"] = (targets - predictions).square().mean()
            found["explained_variance"] = explained_variance(predictions, targets)
            if first:
                self.value_head.observe(targets)
        if self.settings.kl_estimator == "mixed":
            sums = (part.mix_sums for part in learned if part.mix_sums is not None)
            found["mix_dot"], found["mix_norm"] = functools.reduce(torch.add, sums).unbind()
        return found

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.settings.kl_estimator != "mixed":
            return metrics
        logged = {name: value for name, value in metrics.items() if name not in ("mix_dot", "mix_norm")}
        logged["kl_mix"] = self.mix
        self.mix_controller.update(metrics["mix_dot"], metrics["mix_norm"])
        return logged

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        if self.value_head is None:
            return {}
        return {f"{_VALUE}{name}": p for name, p in self.value_head.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        head = {} if self.value_head is None else self.value_head.state_dict()
        return {
            "mix_controller": self.mix_controller.state_dict(),
            **{f"{_VALUE}{name}": tensor for name, tensor in head.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"the state of this objective has no {', '.join(sorted(missing))}")
        self.mix_controller.load_state_dict(state["mix_controller"])
        if self.value_head is not None:
            own = {name.removeprefix(_VALUE): t for name, t in state.items() if name.startswith(_VALUE)}
            self.value_head.load_state_dict(own)
