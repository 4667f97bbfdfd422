"""The trainer's evaluation: mean metrics over held-out prompts, under conditions that are the same every time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import speed_metrics

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import Prompts
from clp_engine.rollouts.scoring import score
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.collector import CollectorParts
from clp_engine.training.collecting.other_engines import Publishing
from clp_engine.training.metrics import MetricLog
from clp_engine.training.trl_compat.dataloader_view import PromptLoader


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
        kl, entropy = (sum(one) for one in zip(*parts.parallel.gather(_sums(parts, made))))
        log.add(
            made.metrics
            | {
                "kl": kl / made.num_generated_tokens,
                "entropy": entropy / made.num_generated_tokens,
                "kl_sequence": kl / len(made.rollout.completion_ids),
            }
        )
        after_batch()
    return log.drain(), rows * settings.evaluation_group, batches


def _sums(parts: CollectorParts, made: TrainingBatch) -> tuple[float, float]:
    """KL and entropy, summed over the tokens of this process's completions."""
    drawn, conditions = made.rollout, made.conditions
    if made.shares is not None:
        mine = made.shares.mine
        if not mine:
            return 0.0, 0.0
        drawn, conditions = drawn.taken(mine), conditions[mine]
    stats = score(
        parts.policy,
        drawn,
        conditions,
        outputs=("logprob", "kl", "entropy"),
        temperature=parts.planner.settings.sampling.temperature,
    )
    return stats.kl[drawn.trained].sum().item(), stats.entropy[drawn.trained].sum().item()


class Evaluating:
    """The part of CLPTrainer that evaluates."""

    _draws = False  # inside `_drawing`

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean metrics over an evaluation set, conditions drawn by the sampler from a fixed seed; logged under `eval_`.

        eval_dataset: instead of the trainer's own; the name of one of those, where they have names. Several are evaluated one
        after another, under `eval_<name>_`, and returned together. ignore_keys: transformers'; refused, there are none.
        """
        dataset = chosen(self.eval_dataset, eval_dataset, ignore_keys, self._evaluation_prompts)
        with self._drawing():
            if isinstance(dataset, dict):
                parts = [
                    self._evaluate(part, f"{metric_key_prefix}_{name}") for name, part in dataset.items()
                ]
                return {name: value for part in parts for name, value in part.items()}
            return self._evaluate(dataset, metric_key_prefix)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """What draws elsewhere holds the policy until the outermost of these blocks ends: that of `train`, or of an `evaluate`
        outside it."""
        outermost, self._draws = not self._draws, True
        try:
            yield
        finally:
            if outermost:
                self._draws = False
                if isinstance(self.rollout_engine, Publishing):
                    self.rollout_engine.close()

    def _evaluate(self, dataset: Prompts, prefix: str) -> dict[str, float]:
        a, started = self.args, time.time()
        loader = PromptLoader.of_evaluation(a, dataset)
        self.callback_handler.eval_dataloader = loader
        with self.at_own_pace():
            means, completions, batches = evaluation_metrics(
                self.collector_parts,
                dataset,
                loader.prompts,
                self.state,
                lambda: self._hear("on_prediction_step"),
            )
        metrics = {f"{prefix}_{name}": value for name, value in means.items()}
        metrics |= speed_metrics(prefix, started, completions, batches)
        self.log(metrics)
        self._hear("on_evaluate", metrics)
        return metrics
