"""A training run from the command line, and its folder.

RUN/run.json        the model, data, rewards and settings (`run_spec`), and the duration of training
RUN/policy/         the trained policy
RUN/checkpoint-N/   a state from which training can continue
RUN/log.jsonl       metrics of training
RUN/report.json, report.md, pareto.png    written by evaluation
RUN/variance.json   written by `clp-engine variance`
RUN/clp_manifest.json   the run's identity and files, see `run_folder`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_engine.core.errors import ConfigError
from clp_engine.core.files import finish
from clp_engine.training.runs import trust
from clp_engine.training.runs.run_folder import checkpoints
from clp_engine.training.runs.run_spec import RunSpec

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training.settings.config import CLPConfig
    from clp_engine.training.trainer import CLPTrainer


class Interrupted(Exception):
    """The user stopped training. The message says where the last checkpoint is and how to continue."""


# --- folders -----------------------------------------------------------------------------------------------


def policy_directory(run: str | Path) -> Path:
    """The policy directory of a run folder, a checkpoint, or a policy folder."""
    run = Path(run)
    finish(run / "policy")
    for candidate in (run / "policy", run):
        if (candidate / "clp_config.json").is_file():
            return candidate
    if not run.exists():
        raise ConfigError(f"there is no folder {run}")
    unfinished = "; its training has not finished, go on with --resume" if checkpoints(run) else ""
    raise ConfigError(f"{run} holds no trained policy{unfinished}")


def load_policy(run: str | Path, device: str | None = None) -> ConditionedPolicy:
    directory = policy_directory(run)
    from clp_engine.core.transformers_releases import quiet_transformers
    from clp_engine.policy.policy import ConditionedPolicy

    quiet_transformers()
    return ConditionedPolicy.load(directory, device=device)


def is_finished(directory: str | Path) -> bool:
    finish(Path(directory) / "policy")
    return (Path(directory) / "policy" / "clp_config.json").is_file()


def train(
    spec: RunSpec, config: CLPConfig, *, resume: str | bool | None, again: str, limit: int | None = None
) -> CLPTrainer:
    """Train, and leave the policy in config.output_dir. again: the command that resumes, for the message of Interrupted."""
    from transformers import TrainerCallback

    from clp_engine.core.transformers_releases import quiet_transformers
    from clp_engine.training.trainer import CLPTrainer

    quiet_transformers()

    class Description(TrainerCallback):
        """Writes run.json when training begins. A run that is refused earlier must not change the file."""

        def on_train_begin(self, args, state, control, **_):
            if state.is_world_process_zero:
                describe()

    held_out = spec.eval_rows() if config.eval_strategy != "no" else None
    trainer = CLPTrainer(
        spec.model, spec.reward_functions(), config, spec.train_rows(limit, config.seed), held_out
    )

    def describe(**more: Any) -> None:
        about = {"config": config.to_dict(), "run": trainer.run_id, "signature": trust.sign(spec)}
        replace(spec, **about, **more).save(config.output_dir)

    trainer.add_callback(Description)
    try:
        result = trainer.train(resume_from_checkpoint=resume or None)
    except KeyboardInterrupt:
        found = checkpoints(config.output_dir)
        where = f"the last checkpoint is {found[-1]}; go on with: {again}" if found else "no checkpoint yet"
        raise Interrupted(f"interrupted; {where}") from None
    if (
        not resume and trainer.is_world_process_zero()
    ):  # a resumed run knows only the duration of its last part
        describe(train_seconds=round(result.metrics["train_runtime"], 1))
    return trainer
