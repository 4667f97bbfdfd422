"""The best evaluation of a run so far, as transformers keeps it in the trainer's state, and the policy it was of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_callback import TrainerState

from clp_engine.core.errors import ConfigError
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.runs import run_folder
from clp_engine.training.settings.config import CLPConfig

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy


def note(
    metrics: Mapping[str, float], args: CLPConfig, state: TrainerState, policy: ConditionedPolicy
) -> None:
    """Take an evaluation into the state where it is the best one so far: best_metric, best_global_step and, for
    `load_best_model_at_end`, best_model_checkpoint: <output_dir>/best, where the policy is written to.

    Nothing happens without `metric_for_best_model`. Raises ConfigError where the evaluation has no such metric.
    """
    if args.metric_for_best_model is None:
        return
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model!r}: an evaluation has no {name}; it has "
            f"{', '.join(sorted(metrics))}"
        )
    value, best = metrics[name], state.best_metric
    if best is not None and not (value > best if args.greater_is_better else value < best):
        return
    state.best_metric, state.best_global_step = value, state.global_step
    if args.load_best_model_at_end:
        if state.is_world_process_zero:
            with run_folder.writing(args.output_dir, "best/policy") as temporary:  # where a checkpoint has it
                policy.write_files(temporary)
        state.best_model_checkpoint = str(Path(args.output_dir) / "best")


def load(state: TrainerState, policy: ConditionedPolicy) -> None:
    """Give the policy the adapters of the best evaluation, if there was one."""
    if state.best_model_checkpoint is not None:
        checkpoint.load_policy(state.best_model_checkpoint, policy)
