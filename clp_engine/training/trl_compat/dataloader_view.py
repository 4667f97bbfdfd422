"""A run's batches in the form of a DataLoader, for callbacks, which receive train_dataloader and eval_dataloader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clp_engine.data.prompts import Prompts
from clp_engine.data.streams import PromptStream
from clp_engine.training.parallel.processes import world_size


@dataclass(frozen=True)
class PromptLoader:
    """An epoch in batches of `prompts` prompts.

    As in TRL, each row occurs `group` times in succession, and each batch `passes` times.
    Iterating only reads rows. The run itself takes its rows by position.

    shuffle_seed: None means the rows' own order, with a last batch that may be short, as in an evaluation.

    Raises TypeError for the length of a stream, and for iterating over a stream that can be read once.
    """

    prompts_of_run: Prompts
    prompts: int
    group: int
    passes: int = 1
    shuffle_seed: int | None = None
    drop_last: bool = True

    @classmethod
    def of_training(cls, a: Any, prompts: Prompts) -> PromptLoader:
        """The batches of a run with the settings `a`, a CLPConfig."""
        return cls(
            prompts,
            a.rollout_size // a.num_generations,
            a.num_generations,
            a.steps_per_rollout * a.gradient_accumulation_steps,
            a.seed if a.shuffle_dataset else None,
        )

    @classmethod
    def of_evaluation(cls, a: Any, prompts: Prompts) -> PromptLoader:
        """The batches of an evaluation with the settings `a`, a CLPConfig."""
        per_batch = max(1, a.per_device_eval_batch_size * world_size() // a.evaluation_group)
        return cls(prompts, per_batch, a.evaluation_group, drop_last=False)

    @property
    def dataset(self) -> Any:
        """The dataset that was given to the trainer."""
        source = self.prompts_of_run
        return source.source if isinstance(source, PromptStream) else source.rows

    @property
    def batch_size(self) -> int:
        return self.prompts * self.group

    def __len__(self) -> int:
        rows = len(self.prompts_of_run)
        whole = rows // self.prompts if self.drop_last else -(-rows // self.prompts)
        return whole * self.passes

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        if isinstance(self.prompts_of_run, PromptStream) and self.prompts_of_run.read_once:
            raise TypeError(
                f"a {type(self.dataset).__name__} can be read once, and the run reads it; give the trainer a list, or an "
                "object whose iter() starts anew, to have its batches"
            )
        rows = self._rows()
        while part := list(itertools.islice(rows, self.prompts)):
            if self.drop_last and len(part) < self.prompts:
                return
            for _ in range(self.passes):
                yield [dict(row) for row in part for _ in range(self.group)]

    def _rows(self) -> Iterator[Any]:
        if isinstance(self.prompts_of_run, PromptStream):
            return iter(self.dataset)
        if self.shuffle_seed is None:
            return iter(self.dataset[i] for i in range(len(self.prompts_of_run)))
        order = self.prompts_of_run.indices(0, len(self.prompts_of_run), self.shuffle_seed, True)
        return iter(self.dataset[i] for i in order)
