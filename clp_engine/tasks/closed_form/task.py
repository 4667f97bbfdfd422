"""The testbed with a known answer: autoregressive policies small enough to enumerate.

A policy over `V` tokens and `L` steps is a table of logits, one row per prefix; there are `V**L` outcomes
`y`. With a reference policy and rewards `R (M, V**L)`, the policy that maximises `reward_scale * w.R -
kl_coef * KL(pi || pi_ref)` is

    pi*(y) ~ pi_ref(y) * exp(reward_scale / kl_coef * w.R(y))

and how far a trained policy is from it, `KL(pi_theta || pi*)`, is a sum over all outcomes: exact. The
same distance is what is missing from the objective:

    J(pi*) - J(pi_theta) = kl_coef * KL(pi_theta || pi*)

`train` uses the estimators, samplers and blends of the real trainer, so an error in any of them shows as a
distance that does not vanish.
"""

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


@dataclass(frozen=True)
class TabularTask:
    """A reference policy and rewards over its outcomes.

    reference: (P, V) logits by prefix, P = 1 + V + ... + V**(L-1). Prefixes are the nodes of a complete
        V-ary tree in breadth-first order: the empty prefix is row 0, and row n followed by token v is row n
        * V + 1 + v.
    rewards: (M, V**L), outcomes in lexicographic order.
    """

    reference: torch.Tensor
    rewards: torch.Tensor

    @classmethod
    def random(
        cls,
        vocabulary: int,
        length: int,
        num_objectives: int,
        *,
        seed: int = 0,
        reference_scale: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> TabularTask:
        """Normal reference logits (standard deviation `reference_scale`) and standard normal rewards."""
        generator = torch.Generator().manual_seed(seed)
        prefixes = sum(vocabulary**t for t in range(length))
        reference = torch.randn(prefixes, vocabulary, generator=generator, dtype=torch.float64)
        rewards = torch.randn(num_objectives, vocabulary**length, generator=generator, dtype=torch.float64)
        return cls((reference * reference_scale).to(dtype), rewards.to(dtype))

    @property
    def vocabulary(self) -> int:
        return self.reference.shape[1]

    @property
    def length(self) -> int:
        length, outcomes = 0, 1
        while outcomes < self.rewards.shape[1]:
            length, outcomes = length + 1, outcomes * self.vocabulary
        return length

    def outcome_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability of every outcome under logits (P, V): (V**L,)."""
        logprobs, first, total = logits.log_softmax(-1), 0, logits.new_zeros(1)
        for _ in range(self.length):
            level = logprobs[first : first + total.numel()]
            first += total.numel()
            total = (total.unsqueeze(-1) + level).flatten()
        return total

    def optimum(self, weights: torch.Tensor, kl: float, *, kl_is_beta: bool = False) -> torch.Tensor:
        """log pi* for one weighting (M,) and one KL coefficient: (V**L,) float64."""
        reward_scale, kl_coef = objective_scales(torch.tensor(kl, dtype=torch.float64), kl_is_beta)
        tilt = reward_scale / kl_coef * (weights.double() @ self.rewards.double())
        return (self.outcome_logprobs(self.reference.double()) + tilt).log_softmax(-1)

    def objective(
        self, logits: torch.Tensor, weights: torch.Tensor, kl: float, *, kl_is_beta: bool = False
    ) -> float:
        """J = reward_scale * w.R - kl_coef * KL(pi_theta || pi_ref) of logits (P, V), by enumeration.

        The optimum's J is higher by `kl_coef * kl_to_optimum`.
        """
        reward_scale, kl_coef = objective_scales(torch.tensor(kl, dtype=torch.float64), kl_is_beta)
        logprobs = self.outcome_logprobs(logits.double())
        gain = reward_scale * (weights.double() @ self.rewards.double())
        ratio = logprobs - self.outcome_logprobs(self.reference.double())
        return (logprobs.exp() * (gain - kl_coef * ratio)).sum().item()

    def kl_to_optimum(
        self, logits: torch.Tensor, weights: torch.Tensor, kl: float, *, kl_is_beta: bool = False
    ) -> float:
        """KL(pi_theta || pi*) of the policy with logits (P, V), by enumeration, in nats."""
        logprobs = self.outcome_logprobs(logits.double())
        gap = logprobs - self.optimum(weights, kl, kl_is_beta=kl_is_beta)
        return (logprobs.exp() * gap).sum().item()


@dataclass(frozen=True)
class Trained:
    """A policy with the form of its blend, so that it can be asked for a condition.

    min_kl: the smallest KL coefficient of training (what the odds form is relative to).
    """

    task: TabularTask
    policy: BlendedPolicy
    kl_conditioning: str
    min_kl: float

    def logits(self, weights: torch.Tensor, kl: float) -> torch.Tensor:
        """The policy of one condition: (P, V)."""
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
    """Trains the deltas of a policy with Adam, the step size falling as the steps left, squared.

    Every step draws `prompts` conditions from the sampler (alpha, not beta) and `group_size` completions
    for each. Deterministic for a seed.
    start: the policy that training starts from; by default one table of logits per objective.
    estimate: what turns rewards and log-probs into coefficients; a test may put a wrong one here.
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
    """`train` for one condition: a policy with one delta, for the one objective w.R. Its task is that objective's."""
    alone = TabularTask(task.reference, (weights.to(task.rewards.dtype) @ task.rewards).unsqueeze(0))
    sampler = ConditionSampler(Fixed((1.0,)), FixedKL(kl))
    return train(alone, sampler, start=start, **options)


def combine(
    task: TabularTask,
    specialists: Sequence[Trained],
    rule: Callable[[Sequence[BlendedPolicy]], BlendedPolicy],
) -> Trained:
    """One specialist per objective as one policy, by `soup` or `LogitMixture.of`; its blend is the weighting."""
    return Trained(task, rule([s.policy for s in specialists]), "none", specialists[0].min_kl)


@dataclass(frozen=True)
class _Steps:
    """The steps of sampled completions: log-probs of policy and reference (B, L, V), and actions (B, L)."""

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
    # The children of the last level's prefixes, in their order, are the outcomes.
    return torch.stack(prefixes, 1), torch.stack(actions, 1), prefix - len(task.reference)
