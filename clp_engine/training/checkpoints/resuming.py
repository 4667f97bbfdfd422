"""Writing a trainer's state into a checkpoint, and restoring it: 2N steps are N steps, a kill, and N more, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.trainer_callback import CallbackHandler, TrainerState

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import Prompts
from clp_engine.objectives.objective import Objective
from clp_engine.objectives.weightings import Weighting
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.policy.references import Reference
from clp_engine.training.checkpoints import callback_states, checkpoint
from clp_engine.training.collecting.collector import Collector
from clp_engine.training.metrics import MetricLog
from clp_engine.training.parallel.processes import Parallel
from clp_engine.training.settings.config import BATCHES, WITHOUT_EFFECT, CLPConfig
from clp_engine.training.stepping.optimisation import Optimisation


class Run(Protocol):
    """What of a trainer is written and restored."""

    args: CLPConfig
    run_id: str | None
    policy: ConditionedPolicy
    objective: Objective
    reference: Reference
    sampler: Weighting
    collector: Collector
    train_dataset: Prompts
    optimisation: Optimisation
    metric_log: MetricLog
    state: TrainerState
    callback_handler: CallbackHandler
    num_generated_tokens: int
    parallel: Parallel


def save(run: Run) -> None:
    """Write <output_dir>/checkpoint-<step>: the main process, with the random states of all."""
    states = run.parallel.gather(checkpoint.random_states())
    slots = {}
    for name, slot, value in run.optimisation.slots():
        if run.parallel.is_main:
            # Copied: adapters of one buffer share its step count, and a file holds nothing twice.
            slots[f"{name}.{slot}"] = value.detach().cpu().clone()
    if not run.parallel.is_main:
        return
    run.state.stateful_callbacks = callback_states.exported(run.callback_handler.callbacks)
    tensors, plain = _apart(run.objective.state_dict())
    of_reference, plain_reference = _apart(run.reference.state_dict())
    tensors |= {f"{checkpoint.REFERENCE}{name}": tensor for name, tensor in of_reference.items()}
    checkpoint.save(
        run.args.output_dir,
        run.state.global_step,
        run.run_id,
        run.policy,
        slots,
        {
            "config": run.args.to_dict(),
            "scheduler": run.optimisation.state_dict(),
            "sampler": run.sampler.state_dict(),
            "reference": plain_reference,
            **plain,
            "metric_log": run.metric_log.state_dict(),
            "trainer": dataclasses.asdict(run.state),
            "data": run.train_dataset.state_dict(),
            "num_generated_tokens": run.num_generated_tokens,
            "batches": run.args.batches,
        },
        run.args.save_total_limit,
        {name: tensor.detach().cpu() for name, tensor in tensors.items()},
        run.collector.state_dict(),
        states,
    )


def _apart(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, JSON) of a state."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def restore(run: Run, path: Path) -> None:
    """Set the run to where it was when the checkpoint was written. Raises ConfigError, before anything is changed, where it was
    another run's."""
    saved = checkpoint.read_state(path)
    # A setting that the checkpoint does not know had no other value then than its default.
    before = {**CLPConfig().to_dict(), **saved["config"]}
    changed = [
        name
        for name, value in before.items()
        if name not in WITHOUT_EFFECT and getattr(run.args, name, None) != value
    ]
    if saved.get("batches") == run.args.batches:  # cut in another way, for another number of processes
        changed = [name for name in changed if name not in BATCHES]
    if changed:
        raise ConfigError(
            f"{path} was written with other settings for {', '.join(changed)}; resume with the same ones "
            "(or start a new run from its policy folder)"
        )
    rank = run.parallel.rank
    held = checkpoint.load(path, run.policy, run.optimisation, run.objective, rank)
    with checkpoint.restoring(path):
        _restore_state(run, saved, *held)


def _restore_state(
    run: Run,
    saved: dict[str, Any],
    unfinished: dict[str, torch.Tensor],
    of_reference: dict[str, torch.Tensor],
) -> None:
    run.train_dataset.load_state_dict(saved.get("data", {}))
    run.collector.load_state_dict(unfinished, run.train_dataset)
    run.optimisation.load_state_dict(saved["scheduler"])
    run.sampler.load_state_dict(saved["sampler"])
    run.reference.load_state_dict({**saved.get("reference", {}), **of_reference})
    run.metric_log.load_state_dict(saved["metric_log"])
    run.num_generated_tokens = saved.get("num_generated_tokens", 0)
    limits: dict[str, Any] = {
        name: getattr(run.state, name)
        for name in (
            "logging_steps",
            "eval_steps",
            "save_steps",
            "num_train_epochs",
            "train_batch_size",
            "is_world_process_zero",
            "is_local_process_zero",
        )
    }
    run.state = TrainerState(**{**saved["trainer"], **limits})
    callback_states.restore(run.callback_handler.callbacks, run.state.stateful_callbacks)
