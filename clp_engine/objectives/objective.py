"""Objective: the seam between rewards and gradients. The trainer knows an objective by these methods alone.

A step of training asks an objective, in this order:

    needs               which statistics of the tokens it reads, and which are differentiated
    prepared            (rewards, weights) of the whole optimiser step, before it is cut into micro-batches
    predictions         of each micro-batch: what it predicts from the policy's hidden states, if anything
    coefficients        of each micro-batch: the constants of the loss
    learn               of each micro-batch: gradients of its own parameters, and what it keeps for the end of the step
    metrics             of the whole step: what is logged, still on the device
    after_step          of the whole step: the logged numbers, read; its state moves here and nowhere else

`policy_gradient.PolicyGradient` is the one that training uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clp_engine.objectives.coefficients import Coefficients, RewardedTokens


@dataclass(frozen=True)
class Needs:
    """What an objective is computed from, beside the policy's log-probs.

    exact_kl: the exact KL to the reference of each step; differentiated.
    group: completions of one prompt are compared with each other, so at least two are needed.
    old_logprob: the log-probs of sampling, where the policy has moved since.
    value: a prediction of each token's return from the policy's hidden states.
    hidden_gradient: gradients with respect to the policy's hidden states, in `learn`.
    """

    exact_kl: bool = False
    group: bool = False
    old_logprob: bool = True
    value: bool = False
    hidden_gradient: bool = False

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Statistics of a token that the loss is differentiated through; the others are constants in it."""
        return ("logprob", "kl") if self.exact_kl else ("logprob",)


class ForwardPass(Protocol):
    """A micro-batch after its pass through the policy, whose graph is still there.

    rewarded: the batch that the coefficients are taken from. hidden: (N, H) of its N completion tokens, in their order.
    predicted: what `Objective.predictions` returned of the tokens of `rewarded.tokens.mask`, which an environment's are not
    among. counted: (B, T) bool, the tokens in the loss.
    """

    @property
    def rewarded(self) -> RewardedTokens: ...

    @property
    def hidden(self) -> torch.Tensor: ...

    @property
    def predicted(self) -> torch.Tensor | None: ...

    @property
    def counted(self) -> torch.Tensor: ...

    def loss(self, c: Coefficients) -> torch.Tensor:
        """-sum weights * (c.logprob * logprob + c.kl * kl), a scalar with its graph."""


class Objective(Protocol):
    """What a run maximises, and how its gradient is estimated."""

    @property
    def needs(self) -> Needs: ...

    def uses_reference(self, kl: torch.Tensor) -> bool:
        """Whether the reference is run for rows with KL coefficients `kl` (B,)."""

    def scales(self, kl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(reward_scale, kl_coef) of rows with KL coefficients `kl` (B,)."""

    def prepared(
        self, rewards: torch.Tensor, group_size: int, mask: torch.Tensor, terminated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards (B,), weights (B, T)) of a whole optimiser step, from w.R (B,), the completion mask (B, T) and whether each
        completion ended (B,)."""

    def predictions(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        reward_scale: torch.Tensor,
        kl_coef: torch.Tensor,
    ) -> torch.Tensor | None:
        """(N,) of tokens with hidden states (N, H) that belong to `rows` (N,) of weights (B, M), reward_scale and kl_coef (B,);
        None where nothing is predicted."""

    def advantages(self, rewarded: RewardedTokens) -> torch.Tensor:
        """A of each row, (B,), before any pass of the policy; NaN for a row without an objective. Rewards are unscaled."""

    def coefficients(self, rewarded: RewardedTokens) -> Coefficients: ...

    def learn(self, forward: ForwardPass, step_tokens: int | torch.Tensor) -> Any:
        """Add gradients to the objective's own parameters; returns what `metrics` takes of the micro-batch. step_tokens:
        completion tokens of the whole optimiser step. Tokens that are not `counted` add no gradient: of several processes with
        a sharded base, one with less work makes passes in which no token is counted."""

    def metrics(self, learned: Sequence[Any], first: bool) -> dict[str, torch.Tensor]:
        """Scalars of a step, left on their device. first: it is the first pass over these completions."""

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics to log, of those that `metrics` returned (and others); called once the step is over."""

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those of its own that are trained, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where something is missing."""
