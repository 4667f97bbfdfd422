"""Reference: the policy that the KL is measured to, named by a condition of the policy itself. It holds no model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from clp_engine.core.conditions import Conditions


class Reference(Protocol):
    """Where the reference's hidden states come from. Its output projection is the base model's, so a reference that moves
    cannot be that of a policy whose output projection is conditioned (conditioning "logit")."""

    def conditions(self, asked: Conditions) -> Conditions | None:
        """The conditions (P rows) under which the policy's own layers are the reference of prompts with the conditions `asked`;
        None: with every adapter off."""

    def after_step(self, step: int) -> None:
        """Optimiser step `step` is over: a reference that moves may move now."""

    def state_dict(self) -> dict[str, Any]:
        """JSON by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FrozenReference:
    """The base model, all run long."""

    def conditions(self, asked: Conditions) -> None:
        return None

    def after_step(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(
                f"the frozen reference keeps no state; the checkpoint has {', '.join(sorted(state))}"
            )
