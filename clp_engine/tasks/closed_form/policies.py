"""Conditioned policies over the prefixes of a TabularTask, with their logits as functions of the blend.

    Tables            logits(x; b) = q(x) + sum_i b_i D_i(x)                                    linear in b
    Network           logits(x; b) = q(x) + tanh(E(x) + sum_i b_i dE_i(x)) (sum_i b_i dU_i)     not linear in b
      output only     logits(x; b) = q(x) + tanh(E(x)) (sum_i b_i dU_i)                         linear in b
    TabularMixture    logits(x; b) = sum_i b_i logits_i(x)                                      linear in b

x is a prefix, q are the reference's logits, and b are a row's blend coefficients. `Network` is the smallest policy with the
structure of a real one: the deltas of two layers are multiplied with each other, with a nonlinearity between them. Its output
layer starts at zero, so that the network without deltas is exactly the reference. The output-only form is a small logit-CLP.
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
    """A policy over prefixes. deltas: the trained tensors, each (M, ...) with one slice per objective."""

    deltas: tuple[torch.Tensor, ...]

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        """Logits (B, ..., V) of each row at its own prefixes (B, ...), for blend coefficients (B, M)."""


@dataclass(frozen=True)
class Tables:
    """A table of logits per objective. reference: (P, V). deltas: one tensor, (M, P, V)."""

    reference: torch.Tensor
    deltas: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, task: TabularTask) -> Tables:
        """The reference policy, with one delta of zero per objective of the task."""
        return cls(task.reference, (task.reference.new_zeros(len(task.rewards), *task.reference.shape),))

    def logits(self, blend: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
        return self.reference[prefixes] + _blended(blend, self.deltas[0][:, prefixes])


@dataclass(frozen=True)
class Network:
    """Two layers with deltas (module docstring).

    reference: (P, V). features: E (P, H). deltas: dE (M, P, H), absent in the output-only form, and dU (M, H, V).
    """

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
        """The reference policy, with normal features (standard deviation `scale`) and deltas of zero."""
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
    """Specialists mixed at decode time: `pi(v | x) ~ prod_i pi_i(v | x)**b_i`, normalised at each step.

    specialists: one policy per objective. Each has one delta and therefore takes a blend of shape (1,).
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
    """Rewarded Soups: one policy with the delta of each specialist. All specialists must start from the same weights."""
    deltas = zip(*(s.deltas for s in specialists))
    return dataclasses.replace(specialists[0], deltas=tuple(torch.cat(parts) for parts in deltas))


def _blended(blend: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """sum_i b_i D_i: (B, M) and (M, B, ...) to (B, ...)."""
    return torch.einsum("bm,mb...->b...", blend, deltas)
