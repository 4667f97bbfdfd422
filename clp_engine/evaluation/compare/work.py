"""One piece of work of a comparison: the training of a run, or an evaluation. A finished piece is not done again.

trainings/RUN.json      cost of the training, written last: its presence means that the run is done
EVALUATION/inputs.json  digest of everything that the report depends on; another digest means that the report is stale

runs/ is needed until everything is evaluated. trainings/ and evaluations/ are small, and the report of the comparison needs
nothing else. A copy of these two folders is enough to continue a comparison.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_engine.core import locking, records, transformers_releases
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import finish, read_json, write_directory, write_text
from clp_engine.core.locking import Busy
from clp_engine.evaluation.compare.plan import Evaluation, Plan, Run
from clp_engine.training import running
from clp_engine.training.runs import run_spec
from clp_engine.training.runs.run_folder import checkpoints, remove_checkpoint
from clp_engine.training.settings.config import WITHOUT_EFFECT

if TYPE_CHECKING:
    from clp_engine.evaluation.report import ParetoReport
    from clp_engine.training.trainer import CLPTrainer

BASE = "base"  # the evaluation of the base model, which sets the reference point
_INPUTS = "inputs.json"


@dataclass(frozen=True)
class Training:
    """The cost of a run. seconds: of its optimiser steps, without loading and saving, summed over interruptions."""

    seconds: float
    steps: int
    completions: int
    generated_tokens: int
    trained_parameters: int
    threads: int
    device: str
    versions: dict[str, str]
    commit: str | None

    @classmethod
    def load(cls, path: Path) -> Training | None:
        """The cost in a training record, or None where there is no such file."""
        return records.read(path, cls, "remove it to train the run again") if path.is_file() else None


# --- training ------------------------------------------------------------------------------------------------------------


def is_trained(plan: Plan, run: Run) -> bool:
    """Whether a run is done: it has a record, and either its policy or every report that needs the policy is there."""
    if not plan.training_record(run.name).is_file():
        return False
    folder = plan.run_folder(run.name)
    if running.is_finished(folder):
        check_unchanged(run, folder)
        return True
    return all(is_evaluated(plan, e) for e in plan.evaluations.values() if run.name in e.runs)


def check_unchanged(run: Run, folder: Path) -> None:
    """Raises ConfigError where the run in `folder` had other settings: a changed default does not change the digest."""
    saved = run_spec.RunSpec.load(folder)
    if saved is None:
        return
    mine = run.config
    changed = [
        name
        for name, value in saved.config.items()
        if name in mine and mine[name] != value and name not in WITHOUT_EFFECT
    ]
    if changed:
        raise ConfigError(
            f"{folder} was trained with another {', '.join(changed)}; remove it to train it again"
        )


def train(plan: Plan, run: Run, progress: bool = True) -> None:
    """Train a run unless it is done, from its newest checkpoint if it has one.

    Raises Busy where another process trains it, and the errors of training. `running.Interrupted` leaves a checkpoint.
    """
    from clp_engine.training.settings.config import CLPConfig

    folder = plan.run_folder(run.name)
    with exclusive(folder):
        if is_trained(plan, run):
            return
        config = CLPConfig.from_dict(
            {
                **run.config,
                "disable_tqdm": not progress or run.config["disable_tqdm"],
                "overwrite_output_dir": True,  # the comparison owns the folder: a policy without a record is trained again
            }
        )
        trainer = running.train(run.spec, config, resume=bool(checkpoints(folder)), again="the same command")
        _write_json(plan.training_record(run.name), asdict(_training(trainer)))
        if not plan.keep_checkpoints:
            for path in checkpoints(folder):
                remove_checkpoint(folder, path)


def _training(trainer: CLPTrainer) -> Training:
    """The cost of a finished training. Its seconds are summed from the means in the log, which outlast an interruption."""
    import torch

    from clp_engine.core.provenance import source_commit, versions

    config, state = trainer.args, trainer.state
    seconds, before = 0.0, 0
    unlogged = {**trainer.metric_log.drain(), "step": state.global_step}
    for entry in [*state.log_history, unlogged]:
        if "step_time" not in entry:
            continue  # an entry of an evaluation, or without a step since the last entry
        steps, before = entry["step"] - before, entry["step"]
        seconds += entry["step_time"] * steps
    return Training(
        seconds=round(seconds, 3),
        steps=state.global_step,
        completions=-(-state.global_step // config.steps_per_rollout) * config.rollout_size,
        generated_tokens=trainer.num_generated_tokens,
        trained_parameters=sum(p.numel() for p in trainer.policy.adapter_parameters().values()),
        threads=torch.get_num_threads(),
        device=str(trainer.policy.device),
        versions=versions(),
        commit=source_commit(),
    )


# --- evaluation ----------------------------------------------------------------------------------------------------------


def is_evaluated(plan: Plan, evaluation: Evaluation | None) -> bool:
    """Whether the report of an evaluation is there and has the digest of the plan. None stands for the base model."""
    name = BASE if evaluation is None else evaluation.name
    path = plan.evaluation_folder(name) / _INPUTS
    return path.is_file() and read_json(path).get("digest") == plan.evaluation_digest(evaluation)


def report_of(plan: Plan, evaluation: Evaluation | None) -> ParetoReport:
    """The report of an evaluation. None stands for the base model."""
    from clp_engine.evaluation.report import ParetoReport

    return ParetoReport.load(plan.evaluation_folder(BASE if evaluation is None else evaluation.name))


def evaluate(plan: Plan, evaluation: Evaluation | None, progress: bool = True) -> None:
    """Write the report of an evaluation, unless it is there. None stands for the base model."""
    from clp_engine.evaluation import evaluate as measuring
    from clp_engine.rollouts.types import SamplingParams

    name = BASE if evaluation is None else evaluation.name
    folder = plan.evaluation_folder(name)
    with exclusive(folder):
        if is_evaluated(plan, evaluation):
            return
        settings, spec = plan.evaluation, plan.spec
        policy = _untrained(plan) if evaluation is None else _assemble(plan, evaluation)
        kl = None if evaluation is None else evaluation.kl
        report = measuring.evaluate(
            policy,
            spec.reward_functions(),
            spec.eval_rows(
                settings.prompts, seed=settings.seed, split=settings.split if plan.spec.task else None
            ),
            # At any one weighting, an untrained policy is the base model.
            grid=[list(w) for w in (_anywhere(plan) if evaluation is None else evaluation.grid)],
            kl=list(kl) if isinstance(kl, tuple) else kl,
            num_generations=settings.num_generations,
            sampling=SamplingParams(**plan.sampling),
            max_prompt_length=spec.config["max_prompt_length"],
            batch_rows=settings.batch_rows,
            margin=settings.margin,
            reference_point=None if evaluation is None else report_of(plan, None).reference_point,
            bootstrap=settings.bootstrap,
            seed=settings.seed,
            task=spec.task,
            progress=progress,
        )
        inputs = {"digest": plan.evaluation_digest(evaluation)}
        if evaluation is not None:
            inputs |= {"runs": list(evaluation.runs), "assembly": evaluation.assembly}
        with write_directory(folder) as temporary:
            report.save(temporary)
            _write_json(temporary / _INPUTS, inputs)


def _anywhere(plan: Plan) -> list[list[float]]:
    count = len(plan.objectives)
    return [[1.0 / count] * count]


def _untrained(plan: Plan):
    transformers_releases.quiet_transformers()
    from clp_engine.policy.policy import ConditionedPolicy

    return ConditionedPolicy.from_pretrained(plan.spec.model, plan.objectives, kl_is_beta=plan.kl_is_beta)


def _assemble(plan: Plan, evaluation: Evaluation):
    """The policy of an evaluation, assembled from its runs."""
    policies = [running.load_policy(plan.run_folder(name)) for name in evaluation.runs]
    if evaluation.assembly == "single":
        return policies[0]
    from clp_engine.policy.policy import ConditionedPolicy

    soup = ConditionedPolicy.from_specialists(policies)
    if evaluation.assembly == "soup":
        return soup
    from clp_engine.policy.logit_mixture import LogitMixture

    return LogitMixture(soup)


# --- files ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a piece, `.<name>.lock` beside its folder. Raises Busy where another process holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locking.exclusive(folder.with_name(f".{folder.name}.lock")))
        except Busy as holder:
            raise Busy(f"{holder} is at {folder}") from None
        finish(folder)
        yield


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
