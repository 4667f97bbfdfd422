"""A test problem with a known answer: autoregressive policies that are small enough to enumerate.

A policy over `V` tokens and `L` steps is a table of logits with one row per prefix. It has `V**L` outcomes `y`. For a reference
policy and rewards `R (M, V**L)`, the policy that maximises `J = reward_scale * w.R - kl_coef * KL(pi || pi_ref)` is

    pi*(y) ~ pi_ref(y) * exp(reward_scale / kl_coef * w.R(y))

The distance of a trained policy from it, `KL(pi_theta || pi*)`, is a sum over all outcomes and therefore exact. It is
proportional to the shortfall in J:

    J(pi*) - J(pi_theta) = kl_coef * KL(pi_theta || pi*)

`training.train` uses the estimators, samplers and blends of the real trainer. An error in any of these shows as a distance that
does not vanish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clp_engine.objectives.coefficients import (
    objective_scales,
)


@dataclass(frozen=True)
class TabularTask:
    """A reference policy and rewards over its outcomes.

    reference: (P, V) logits by prefix, P = 1 + V + ... + V**(L-1). Prefixes are the nodes of a complete V-ary tree in
        breadth-first order: row 0 is the empty prefix, and row n followed by token v is row n * V + 1 + v.
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
        """Log-probability of every outcome under the policy with logits (P, V): (V**L,)."""
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

        J of the optimum is higher by `kl_coef * kl_to_optimum`.
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
