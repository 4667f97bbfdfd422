"""The policy that the KL is measured to. It is the base model, all run long, unless the trainer is given another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.rollouts.types import Rollout, Samplable


class Reference(Protocol):
    """Where the reference's hidden states come from: a condition of the policy's own layers, other deltas, another model of the
    same hidden size.

    The states of a rollout's completions are computed once, before the first update on them, and kept while there is room
    (`training/collecting/reference_states.py`): a reference that moves between updates on one rollout is seen with the next.
    `CLPTrainer.evaluate` reports the KL to the base model.

    The output projection that makes log-probs of these states is the base model's. A reference other than the base model can
    therefore not be that of a policy whose output projection is conditioned (conditioning "logit").
    """

    def hidden(self, policy: Samplable, batch: Rollout, conditions: Conditions) -> torch.Tensor | None:
        """(N, H): the state that predicts each completion token of the batch, whose prompts have `conditions` (P rows). Called
        without gradients. None for the states of the base model, which scoring computes where it is cheapest."""

    def after_step(self, policy: Samplable, step: int) -> None:
        """Optimiser step `step` of the policy is over: a reference that moves may move now."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON by name; in every checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where something is missing."""


class FrozenReference:
    """The base model, all run long."""

    def hidden(self, policy: Samplable, batch: Rollout, conditions: Conditions) -> None:
        return None

    def after_step(self, policy: Samplable, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(
                f"the frozen reference keeps no state; the checkpoint has {', '.join(sorted(state))}"
            )


def reference_states(
    reference: Reference, policy: Samplable, batch: Rollout, conditions: Conditions
) -> torch.Tensor:
    """(N, H): the reference's hidden states, the base model's among them; without gradients."""
    with torch.no_grad():
        found = reference.hidden(policy, batch, conditions)
        return policy.completion_hidden(batch, None) if found is None else found
