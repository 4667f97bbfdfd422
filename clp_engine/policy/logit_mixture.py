"""Decode-time mixing of specialists: every token is drawn from a mixture of their logits.

    z(w) = z_ref + sum_i c_i (z_i - z_ref),      c = scale * w      (with kl_conditioning: scale * c(alpha) * w)

`z_i` are the logits of specialist i, and `z_ref` those of the base model. This is the zero-shot counterpart of logit
conditioning: nothing is trained for a weighting, and every completion is decoded once under each specialist with a weight.

With `sum_i w_i = 1` the mixture is `log pi ~ scale * sum_i w_i log pi_i + (1 - scale) * log pi_ref`. `scale` is the realignment
coefficient lambda of DeRa (Liu et al., 2024): a value below 1 moves towards the reference, a value above 1 beyond the
specialists. If every specialist is the optimum of its reward, `pi_i ~ pi_ref exp(R_i / beta)`, then `prod_i pi_i^w_i`,
normalised over whole completions, is the optimum of `w.R` (multi-objective decoding, Shi et al., 2024). Here it is normalised
at every token, which is the same for completions of one token and an approximation for longer ones.

The output projection is linear, and its coefficients, with the reference's `1 - sum_i c_i`, sum to one. Mixing logits therefore
equals mixing last hidden states, `W (sum_i c_i h_i) + b`, and `linear_logprob` gives the statistics, exact KL included, as for
any policy. If the model caps its logits, the mixture is of the logits before the cap. Hidden states are mixed in float32 (or
better) and rounded once to the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from clp_kernels import TokenStats

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts import texts
from clp_engine.rollouts.engines.base import Stepwise
from clp_engine.rollouts.scoring import hidden_states
from clp_engine.rollouts.types import Profile, Rollout, RolloutEngine, RolloutRequest

_NEGLIGIBLE = 1e-6  # float32 weights that should sum to one do so within this error


@dataclass(frozen=True)
class _Parts:
    """Rows of a mixture split into parts: one part for each member (specialist or reference) with a coefficient.

    owner: (N,), the row of each part. blend: (N, M), one-hot for a specialist, zero for the reference.
    slots, share: (rows, K), the parts of each row and their coefficients, with K the most parts of a row. A row with fewer
        parts repeats its first part with a coefficient of zero.
    """

    owner: torch.Tensor
    blend: torch.Tensor
    slots: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, coefficients: torch.Tensor) -> _Parts:
        """coefficients: (rows, M) of the specialists. The reference gets the difference of their sum from one."""
        rest = 1 - coefficients.sum(-1, keepdim=True)
        rest = torch.where(rest.abs() < _NEGLIGIBLE, 0.0, rest)
        share = torch.cat([coefficients, rest], 1)
        present = share != 0
        owner, member = present.nonzero().unbind(-1)
        blend = torch.eye(share.shape[1], device=share.device)[member, :-1]
        # Members with a coefficient come first, in their order. Parts are numbered row by row.
        width = int(present.sum(-1).max())
        order = (~present).long().argsort(dim=-1, stable=True)[:, :width]
        counts = present.sum(-1, keepdim=True)
        place = torch.arange(width, device=share.device)
        slots = counts.cumsum(0) - counts + torch.where(place < counts, place, 0)
        return cls(owner, blend, slots, share.gather(1, order))

    def repeat(self, times: int) -> _Parts:
        """Repeat each row `times` times in succession. A part's copies are adjacent."""
        copies = torch.arange(times, device=self.slots.device)
        slots = (self.slots.unsqueeze(1) * times + copies.view(1, -1, 1)).flatten(0, 1)
        owner = (self.owner.unsqueeze(-1) * times + copies).flatten()
        return _Parts(
            owner, self.blend.repeat_interleave(times, 0), slots, self.share.repeat_interleave(times, 0)
        )

    def keep(self, rows: torch.Tensor) -> tuple[_Parts, torch.Tensor]:
        """(the parts of these rows, their indices among the present parts)."""
        slots = self.slots[rows]
        needed = torch.zeros(len(self.owner), dtype=torch.bool, device=rows.device)
        needed[slots.flatten()] = True
        kept, number = needed.nonzero().squeeze(-1), needed.long().cumsum(0) - 1
        position = torch.zeros(self.slots.shape[0], dtype=torch.long, device=rows.device)
        position[rows] = torch.arange(len(rows), device=rows.device)
        return _Parts(position[self.owner[kept]], self.blend[kept], number[slots], self.share[rows]), kept

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix the parts' states (N, ...) into (rows, ...), rounded once to hidden's dtype."""
        share = self.share.view(*self.share.shape, *(1,) * (hidden.dim() - 1))
        members = hidden[self.slots].to(torch.promote_types(hidden.dtype, share.dtype))
        return (members * share).sum(1).to(hidden.dtype)


class LogitMixture:
    """Specialists mixed at decode time. `rollout`, `score`, `evaluate` and `generate` take it in place of a policy.

    policy: its corners (one objective's weight 1, the others' 0) are the specialists. It is not changed.
    scale: lambda, see the module docstring.

    Weightings lie on the simplex, as a policy's. `Conditions` made by hand may hold any finite numbers (a negative one moves
    away from a specialist). Rows of weight zero are the base model. Raises ConfigError for a policy whose output projection is
    conditioned, and for a scale that is not finite.
    """

    def __init__(self, policy: ConditionedPolicy, *, scale: float = 1.0):
        if any(layer is policy.backbone.head.module for layer in policy.layers.values()):
            raise ConfigError(
                "this policy's output projection is conditioned, so that its specialists' logits are not one projection "
                "of mixed hidden states; where nothing else is conditioned the policy's own blend is this mixture already"
            )
        if not policy.shares_prompts:
            raise ConfigError(f"logits cannot be mixed: {policy.backbone.packing_fault}")
        if policy.conditioning.prompt or not policy.conditioning.blended:
            raise ConfigError(
                f"a policy with conditioning={policy.spec.conditioning!r} has no specialists at its corners to mix"
            )
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale}: expected a finite number")
        self.policy, self.scale = policy, float(scale)
        self.engine: RolloutEngine | None = Stepwise(MixtureDecoder)

    moves_hidden, joins_reference = True, False

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.policy.objectives

    @property
    def conditioned(self) -> ConditionedModel:
        return self.policy

    @property
    def profile(self) -> Profile:
        return self.policy.profile

    def conditions(self, weights=None, kl=None, rows: int = 1) -> Conditions:
        """As `ConditionedPolicy.conditions`."""
        return self.policy.conditions(weights, kl, rows)

    # -- computing ----------------------------------------------------------------------------------------------------

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """`c` (rows, M) on the model's device, or None if every row is the reference."""
        blend = self.policy.coefficients(conditions)
        return None if blend is None else blend * self.scale

    def shown_prompts(self, prompt_ids, conditions: Conditions, prompts=None) -> None:
        """None, since specialists read the prompt itself."""

    def completion_hidden(
        self, batch: Rollout, conditions: Conditions | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, H): the mixed hidden state that predicts each completion token; see `scoring.hidden_states`."""
        coefficients = self.coefficients(conditions)
        if coefficients is None:
            return self.policy.completion_hidden(batch, None, mask)
        mask = batch.completion_mask if mask is None else mask
        parts = _Parts.of(coefficients)
        rows = parts.repeat(batch.group)
        taken_apart = Rollout(
            batch.prompt_ids[parts.owner],
            batch.prompt_mask[parts.owner],
            batch.completion_ids[rows.owner],
            mask[rows.owner],
            batch.logprobs[rows.owner],
            batch.terminated[rows.owner],
        )
        hidden = hidden_states(self.policy, taken_apart, parts.blend)
        by_row = hidden.new_zeros(*taken_apart.completion_mask.shape, hidden.shape[-1])
        by_row[taken_apart.completion_mask] = hidden
        return rows.mix(by_row)[mask]

    def token_stats(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        conditions: Conditions | None = None,
        **options,
    ) -> TokenStats:
        """As `ConditionedPolicy.token_stats`, for mixed hidden states: they hold the conditions already."""
        return self.policy.token_stats(hidden, targets, **options)

    def generate(self, prompts: str | Sequence, weights=None, kl=None, **options) -> list:
        """As `ConditionedPolicy.generate`."""
        return texts.generate(self, prompts, weights, kl, **options)


class MixtureDecoder:
    """Logits of mixtures, see `base.StepDecoder`. A row runs as its parts, each under one specialist or the base model."""

    drop_share = 0.25  # dropping rows copies the cache
    write = None

    def __init__(self, request: RolloutRequest):
        model = request.source.conditioned
        self._backbone, self._in_force, self._group = model.backbone, model.blend, request.group
        self._specialists = request.conditions.weights.shape[1]
        self._room, self._at_once = request.sampling.max_new_tokens, request.at_once
        self._empty = True

    @property
    def places(self) -> int:
        return self._at_once if self._empty else 0

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        self._empty = False
        if blend is None:
            blend = torch.zeros(len(ids), self._specialists, device=ids.device)
        self._parts = _Parts.of(blend)
        owner = self._parts.owner
        with self._in_force.use(self._parts.blend):
            hidden, self._context = self._backbone.prefill(ids[owner], mask[owner])
        logits = self._backbone.head.logits(self._parts.mix(hidden[:, -1]))
        self._context.repeat(self._group, room=self._room)
        self._parts = self._parts.repeat(self._group)
        return logits.repeat_interleave(self._group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._in_force.use(self._parts.blend):
            hidden = self._backbone.extend(self._context, tokens[self._parts.owner].unsqueeze(1))
        return self._backbone.head.logits(self._parts.mix(hidden[:, -1]))

    def keep(self, rows: torch.Tensor) -> None:
        self._empty = len(rows) == 0
        if self._empty:
            return
        self._parts, kept = self._parts.keep(rows)
        self._context.select(kept)
