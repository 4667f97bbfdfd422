"""States of callbacks in checkpoints: what transformers can export, such as EarlyStoppingCallback's patience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState


def exported(callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
    """By class name, as `TrainerState.stateful_callbacks` has them: a state, or a list where there are several of a class."""
    stateful = [callback for callback in callbacks if isinstance(callback, ExportableState)]
    return TrainerState(stateful_callbacks=stateful).stateful_callbacks


def restore(callbacks: Sequence[TrainerCallback], states: Mapping[str, Any]) -> None:
    """Set what each callback had counted. What a callback was made with stays as it was made now."""
    left = {name: list(state) if isinstance(state, list) else [state] for name, state in states.items()}
    for callback in callbacks:
        if isinstance(callback, ExportableState) and left.get(type(callback).__name__):
            state = left[type(callback).__name__].pop(0)
            for name, value in state.get("attributes", {}).items():
                setattr(callback, name, value)
