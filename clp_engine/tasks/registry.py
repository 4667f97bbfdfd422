"""Embedded tasks: a model, a dataset and the rewards that pull it in several directions.

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
    """What a run on an embedded task needs.

    objectives              every reward function of the task by name, TRL's convention, values in [0, 1]
    default_objectives      the names a run uses unless told otherwise
    checkpoint_path         transformers directory of the model to start from
    load_dataset            (split, limit=None, seed=0, ...) -> rows with a "prompt" and the rewards' columns
    rl_split                split whose prompts RL trains on: one the checkpoint was not fitted to, so that rewards are
                            those of text it has not seen; "test" is for evaluation
    max_prompt_length       tokens of the longest prompt
    max_completion_length   tokens at which a completion is cut
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
        """The objectives of these names, in this order (default: `default_objectives`)."""
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
        # The checkpoint was chosen, not fitted, on these; of the train split it remembers many summaries.
        rl_split="validation",
        max_prompt_length=docsum.MAX_PROMPT_TOKENS,
        max_completion_length=docsum.MAX_COMPLETION_TOKENS,
    )


_TASKS: dict[str, Callable[[], Task]] = {"docsum": _docsum}


def task_names() -> tuple[str, ...]:
    return tuple(_TASKS)


def get_task(name: str) -> Task:
    """The task of this name; ValueError names those there are."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}: there is {', '.join(_TASKS)}")
    return _TASKS[name]()
