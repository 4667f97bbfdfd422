"""Embedded tasks: a model, a dataset, and conflicting rewards.

task = get_task("docsum");  task.load_dataset("train", limit=512, seed=0);  task.objectives["coverage"](...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class Task:
    """The parts of an embedded task.

    objectives              the task's reward functions by name, in TRL's convention, with values in [0, 1]
    default_objectives      the objectives a run uses by default
    checkpoint_path         transformers directory of the start model
    load_dataset            (split, limit=None, seed=0, ...) -> rows with a "prompt" and the rewards' columns
    rl_split                split with the prompts for RL. The checkpoint was not fitted to it, so that RL sees rewards of
                            text new to the model. The split "test" is kept for evaluation
    max_prompt_length       tokens of the longest prompt
    max_completion_length   tokens after which a completion is cut
    """

    name: str
    objectives: dict[str, RewardFunction]
    default_objectives: tuple[str, ...]
    checkpoint_path: Path
    load_dataset: Callable[..., list[dict[str, Any]]]
    rl_split: str
    max_prompt_length: int
    max_completion_length: int

    def select(self, names: list[str] | tuple[str, ...] | None = None) -> dict[str, RewardFunction]:
        """The objectives of these names, in this order (default: `default_objectives`). Raises ValueError for other names."""
        chosen = tuple(names) if names is not None else self.default_objectives
        unknown = [n for n in chosen if n not in self.objectives]
        if unknown:
            raise ValueError(
                f"unknown objective {unknown[0]!r}: {self.name} has {', '.join(self.objectives)}"
            )
        return {n: self.objectives[n] for n in chosen}


def _docsum() -> Task:
    from clp_engine.tasks import docsum

    return Task(
        name="docsum",
        objectives=dict(docsum.REWARDS),
        default_objectives=("coverage", "brevity"),
        checkpoint_path=docsum.checkpoint_path(),
        load_dataset=docsum.load_dataset,
        # The checkpoint was selected on this split, not fitted to it. It has memorised many summaries of the train split.
        rl_split="validation",
        max_prompt_length=docsum.MAX_PROMPT_TOKENS,
        max_completion_length=docsum.MAX_COMPLETION_TOKENS,
    )


_TASKS: dict[str, Callable[[], Task]] = {"docsum": _docsum}


def task_names() -> tuple[str, ...]:
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of this name. Raises ValueError, listing the names, for any other."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}: there is {', '.join(_TASKS)}")
    return _TASKS[name]()
