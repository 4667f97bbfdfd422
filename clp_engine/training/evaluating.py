"""The trainer's evaluation: mean metrics over held-out prompts, under conditions that are the same every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import TrainerState

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import Prompts
from clp_engine.rollouts.scoring import score
from clp_engine.training.collecting.collector import CollectorParts
from clp_engine.training.metrics import MetricLog


def chosen(
    own: Prompts | dict[str, Prompts] | None, asked: Any, ignore_keys: Any, read: Callable[[Any], Any]
) -> Prompts | dict[str, Prompts]:
    """The prompts that `evaluate` is asked for: the trainer's `own`, those of one name, or others that `read` makes of rows.

    Raises ConfigError where there are none, and for ignore_keys, which transformers' Trainer has.
    """
    if ignore_keys:
        raise ConfigError(
            f"ignore_keys={ignore_keys!r}: an evaluation keeps no outputs of the model; leave it out"
        )
    if isinstance(asked, str):
        if not isinstance(own, dict) or asked not in own:
            known = ", ".join(own) if isinstance(own, dict) else "none with a name"
            raise ConfigError(f"eval_dataset={asked!r}: there are {known}")
        return own[asked]
    dataset = own if asked is None else read(asked)
    if dataset is None:
        raise ConfigError("evaluate() needs an eval_dataset")
    return dataset


def evaluation_metrics(
    parts: CollectorParts,
    dataset: Prompts,
    per_batch: int,
    state: TrainerState,
    after_batch: Callable[[], Any],
) -> tuple[dict[str, float], int, int]:
    """(means over batches, completions, batches): rewards, lengths, exact KL to the base model and entropy.

    per_batch: prompts of a batch. state: what the reward functions receive as `trainer_state`. after_batch: called after each
    batch.
    """
    log, rows, batches = MetricLog(), 0, 0
    settings = parts.planner.settings
    for start, batch in dataset.in_order(per_batch):
        rows, batches = rows + len(batch.prompts), batches + 1
        planned = parts.planner.evaluation(batch, start)
        made = parts.rewarding.evaluation_batch(batch, planned.conditions, parts.draw(planned), state)
        stats = score(
            parts.policy,
            made.rollout,
            made.conditions,
            outputs=("logprob", "kl", "entropy"),
            temperature=settings.sampling.temperature,
        )
        tokens = made.rollout.completion_mask.sum().item()
        log.add(
            made.metrics
            | {
                "kl": stats.kl.sum().item() / tokens,
                "entropy": stats.entropy.sum().item() / tokens,
                "kl_sequence": stats.kl.sum(-1).mean().item(),
            }
        )
        after_batch()
    return log.drain(), rows * settings.evaluation_group, batches
