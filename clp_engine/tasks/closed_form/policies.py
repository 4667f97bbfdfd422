"""Conditioned policies over the prefixes of a TabularTask: what a blend of deltas does to logits.

    Tables          logits(x; b) = q(x) + sum_i b_i D_i(x)                                    linear in b
    Network         logits(x; b) = q(x) + tanh(E(x) + sum_i b_i dE_i(x)) (sum_i b_i dU_i)     not linear in b
      output only   logits(x; b) = q(x) + tanh(E(x)) (sum_i b_i dU_i)                         linear in b
    TabularMixture    logits(x; b) = sum_i b_i logits_i(x)                                      linear in b

with a prefix x, the reference's logits q, and a row's blend coefficients b. `Network` is the smallest policy that has what
every real one has: the deltas of two layers, multiplied with each other and passed through a nonlinearity between them. Its
output layer starts at zero, so that without deltas each is exactly the reference. Output only is logit-CLP in small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from clp_engine.tasks.closed_form.task import TabularTask


class BlendedPolicy(Protocol):
    """deltas: what is trained, each (M, ...), one slice per objective."""

    deltas: tuple[torch.Tensor, ...]

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        """Of each row at its own prefixes (B, ...), for blend coefficients (B, M): (B, ..., V)."""


@dataclass(frozen=True)
class Tables:
    """reference: (P, V). deltas: one tensor, (M, P, V)."""

    reference: torch.Tensor
    deltas: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, task: TabularTask) -> Tables:
        """The reference itself: deltas of zero, one per objective of the task."""
        return cls(task.reference, (task.reference.new_zeros(len(task.rewards), *task.reference.shape),))

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        return self.reference[prefixes] + _blended(blend, self.deltas[0][:, prefixes])


@dataclass(frozen=True)
class Network:
    """reference: (P, V). features: (P, H), E. deltas: dE (M, P, H), left out where only the output is conditioned, and
    dU (M, H, V)."""

    reference: torch.Tensor
    features: torch.Tensor
    deltas: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        task: TabularTask,
        width: int = 32,
        *,
        scale: float = 1.0,
        output_only: bool = False,
        seed: int = 0,
    ) -> Network:
        """The reference itself: normal features (standard deviation `scale`) and deltas of zero."""
        generator = torch.Generator().manual_seed(seed)
        reference, objectives = task.reference, len(task.rewards)
        features = torch.randn(len(reference), width, generator=generator, dtype=torch.float64) * scale
        output = reference.new_zeros(objectives, width, task.vocabulary)
        inner = () if output_only else (reference.new_zeros(objectives, len(reference), width),)
        return cls(reference, features.to(reference.dtype), (*inner, output))

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        *inner, output = self.deltas
        hidden = self.features[prefixes]
        if inner:
            hidden = hidden + _blended(blend, inner[0][:, prefixes])
        output = torch.einsum("bm,mhv->bhv", blend, output)
        return self.reference[prefixes] + torch.einsum("b...h,bhv->b...v", hidden.tanh(), output)


@dataclass(frozen=True)
class TabularMixture:
    """Specialists mixed when decoding: `pi(v | x) ~ prod_i pi_i(v | x)**b_i`, normalised at each step.

    specialists: one per objective, each with a blend of (1,): a policy that has one delta.
    """

    specialists: tuple[BlendedPolicy, ...]
    deltas: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, specialists: Sequence[BlendedPolicy]) -> TabularMixture:
        return cls(tuple(specialists))

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        alone = blend.new_ones(len(blend), 1)
        each = torch.stack([s.logits(alone, prefixes).log_softmax(-1) for s in self.specialists])
        return _blended(blend, each)


def soup(specialists: Sequence[BlendedPolicy]) -> BlendedPolicy:
    """Rewarded Soups: the specialists' deltas, one each, as the deltas of one policy. All start from the same weights."""
    deltas = zip(*(s.deltas for s in specialists))
    return dataclasses.replace(specialists[0], deltas=tuple(torch.cat(parts) for parts in deltas))


def _blended(blend: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """sum_i b_i D_i: (B, M) and (M, B, ...) to (B, ...)."""
    return torch.einsum("bm,mb...->b...", blend, deltas)
