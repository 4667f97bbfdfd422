"""Train a policy on a closed-form task with the estimators of a real run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clp_engine.core.conditions import Conditions, blend_coefficients
from clp_engine.objectives.advantages import scalarise
from clp_engine.objectives.coefficients import (
    Coefficients,
    RewardedTokens,
    Tokens,
    coefficients,
    objective_scales,
)
from clp_engine.objectives.losses import loss_weights
from clp_engine.objectives.variance_mix import MixController
from clp_engine.objectives.weightings import ConditionSampler, Fixed, FixedKL
from clp_engine.tasks.closed_form.policies import BlendedPolicy, Tables
from clp_engine.tasks.closed_form.task import TabularTask


@dataclass(frozen=True)
class Trained:
    """A policy and the form of its blend, from which the logits for any condition follow.

    min_kl: the smallest KL coefficient of training, at which the odds form is 1.
    """

    task: TabularTask
    policy: BlendedPolicy
    kl_conditioning: str
    min_kl: float

    def logits(self, weights: torch.Tensor, kl: float) -> torch.Tensor:
        """The policy's logits under one condition: (P, V)."""
        condition = Conditions(weights.float().unsqueeze(0), torch.tensor([kl]))
        blend = blend_coefficients(condition, self.kl_conditioning, min_kl=self.min_kl)
        return self.policy.logits(blend, torch.arange(len(self.task.reference)).unsqueeze(0))[0]

    def kl_to_optimum(self, weights: torch.Tensor, kl: float) -> float:
        return self.task.kl_to_optimum(self.logits(weights, kl), weights, kl)


def train(
    task: TabularTask,
    sampler: ConditionSampler,
    *,
    estimator: str = "return",
    baseline: str = "leave_one_out",
    kl_conditioning: str = "none",
    start: Callable[[TabularTask], BlendedPolicy] = Tables.of,
    steps: int = 500,
    prompts: int = 128,
    group_size: int = 4,
    learning_rate: float = 0.2,
    seed: int = 0,
    estimate: Callable[..., Coefficients] = coefficients,
) -> Trained:
    """Train the deltas of a policy with Adam. The learning rate is proportional to the square of the number of steps left.

    Every step draws `prompts` conditions from the sampler (alpha, not beta) and `group_size` completions for each.
    The result is deterministic for a given seed.
    start: the policy that training starts from; by default one table of logits per objective.
    estimate: the function from rewards and log-probs to coefficients. A test may pass a wrong one.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = start(task)
    policy = dataclasses.replace(policy, deltas=tuple(d.clone().requires_grad_() for d in policy.deltas))
    optimizer = torch.optim.Adam(policy.deltas, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)
    controller = MixController()
    for _ in range(steps):
        conditions = sampler.sample(prompts, generator).repeat(group_size)
        blend = blend_coefficients(conditions, kl_conditioning, min_kl=sampler.min_kl)
        prefixes, actions, outcomes = _sample(task, policy, blend, generator)
        visited = _Steps(
            policy.logits(blend, prefixes).log_softmax(-1),
            task.reference[prefixes].log_softmax(-1),
            actions,
        )
        tokens = visited.tokens()
        reward_scale, kl_coef = objective_scales(conditions.kl)
        rewards = scalarise(task.rewards.T[outcomes], conditions.weights)
        batch = RewardedTokens(tokens, rewards, kl_coef, reward_scale, group_size)
        c = estimate(batch, estimator=estimator, baseline=baseline, mix=controller.mix)
        surrogate = c.logprob * tokens.logprob + (0.0 if c.kl is None else c.kl * tokens.kl)
        optimizer.zero_grad()
        (-loss_weights(tokens.mask) * surrogate).sum().backward()
        optimizer.step()
        schedule.step()
        if estimator == "mixed":
            first, second = (
                visited.gradient(estimate(batch, estimator=name, baseline=baseline))
                for name in ("return", "exact")
            )
            controller.update((first * (first - second)).sum(), (first - second).square().sum())
    policy = dataclasses.replace(policy, deltas=tuple(d.detach() for d in policy.deltas))
    return Trained(task, policy, kl_conditioning, sampler.min_kl)


def train_specialist(
    task: TabularTask,
    weights: torch.Tensor,
    kl: float,
    *,
    start: Callable[[TabularTask], BlendedPolicy] = Tables.of,
    **options,
) -> Trained:
    """`train` for one condition: a policy with one delta. Its task has the single objective w.R."""
    alone = TabularTask(task.reference, (weights.to(task.rewards.dtype) @ task.rewards).unsqueeze(0))
    sampler = ConditionSampler(Fixed((1.0,)), FixedKL(kl))
    return train(alone, sampler, start=start, **options)


def combine(
    task: TabularTask,
    specialists: Sequence[Trained],
    rule: Callable[[Sequence[BlendedPolicy]], BlendedPolicy],
) -> Trained:
    """One specialist per objective combined into one policy by `soup` or `TabularMixture.of`. Its blend is the weighting."""
    return Trained(task, rule([s.policy for s in specialists]), "none", specialists[0].min_kl)


@dataclass(frozen=True)
class _Steps:
    """The steps of sampled completions: log-probs under policy and reference (B, L, V), and actions (B, L)."""

    policy: torch.Tensor
    reference: torch.Tensor
    actions: torch.Tensor

    def tokens(self) -> Tokens:
        index = self.actions.unsqueeze(-1)
        return Tokens(
            logprob=self.policy.gather(-1, index).squeeze(-1),
            ref_logprob=self.reference.gather(-1, index).squeeze(-1),
            kl=(self.policy.exp() * (self.policy - self.reference)).sum(-1),
            mask=torch.ones_like(self.actions, dtype=torch.bool),
        )

    @torch.no_grad()
    def gradient(self, c: Coefficients) -> torch.Tensor:
        """Gradient of the surrogate with respect to each step's logits: (B, L, V).

        c_logprob * (onehot(action) - p) + c_kl * p * (log p - log q - KL)
        """
        probability, ratio = self.policy.exp(), self.policy - self.reference
        score = torch.nn.functional.one_hot(self.actions, self.policy.shape[-1]) - probability
        gradient = c.logprob.unsqueeze(-1) * score
        if c.kl is None:
            return gradient
        kl = (probability * ratio).sum(-1, keepdim=True)
        return gradient + c.kl.unsqueeze(-1) * probability * (ratio - kl)


@torch.no_grad()
def _sample(
    task: TabularTask, policy: BlendedPolicy, blend: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefixes (B, L), actions (B, L) and outcome indices (B,) of one completion per row."""
    prefix = torch.zeros(len(blend), dtype=torch.long)
    prefixes, actions = [], []
    for _ in range(task.length):
        probability = policy.logits(blend, prefix).softmax(-1)
        action = torch.multinomial(probability, 1, generator=generator).squeeze(-1)
        prefixes.append(prefix)
        actions.append(action)
        prefix = prefix * task.vocabulary + 1 + action
    # The children of the last level's prefixes are the outcomes, in the same order.
    return torch.stack(prefixes, 1), torch.stack(actions, 1), prefix - len(task.reference)
