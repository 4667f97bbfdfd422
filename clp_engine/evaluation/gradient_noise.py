"""Variance and bias of each estimator's gradient at a checkpoint, measured on the run's own model and data.

N batches of completions are drawn as the trainer draws them, each with new prompts, conditions and tokens. From each batch
every estimator with every baseline takes its gradient g of the adapters, so that differences between two estimators are
paired. All three figures are means over pairs i < j of different batches, which avoids the bias of plugging in a mean:

    variance = mean_{i<j} |g_i - g_j|^2 / 2               E|g - E g|^2, for one optimiser step
    norm     = sqrt mean_{i<j} g_i . g_j                  |E g|
    bias     = sqrt mean_{i<j} d_i . d_j                  |E g - E r|,    d = g - r

r is the mean of `return` and `exact` with an unbiased baseline. Their own bias is 0; the figure measured for them is noise. A
mean of products below zero is noise, too, and shown as 0. Intervals are 95 % percentiles over bootstrap resamples of batches.
group_mean is shorter than the others by the factor (n - 1) / n of `advantages.group_mean`, which shows as a bias.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from clp_engine.core import ranges, seeds, statistics, tables, transformers_releases
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import write_text
from clp_engine.core.provenance import source_commit, versions
from clp_engine.core.statistics import Interval
from clp_engine.objectives.coefficients import ESTIMATORS
from clp_engine.training import running
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.collecting.batches import TrainingBatch
from clp_engine.training.collecting.collector import WholeRollouts
from clp_engine.training.runs import run_spec, trust
from clp_engine.training.settings.config import CLPConfig
from clp_engine.training.stepping.update import forward, micro_batches
from clp_engine.training.trainer import CLPTrainer

Variant = tuple[str, str]  # estimator, baseline


@dataclass(frozen=True)
class GradientNoise:
    """Of one estimator with one baseline; formulas at the top of the module.

    relative: variance as a multiple of that of the first estimator measured, on the same batches.
    """

    estimator: str
    baseline: str
    variance: Interval
    relative: Interval
    norm: Interval
    bias: Interval


@dataclass(frozen=True)
class Moment:
    """A checkpoint's estimators; mix: the share of exact in mixed."""

    step: int
    mix: float
    noise: list[GradientNoise]


@dataclass(frozen=True)
class VarianceReport:
    """Along a run; the content of variance.json."""

    model: str
    objectives: list[str]
    moments: list[Moment]
    setup: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")


# --- statistics --------------------------------------------------------------------------------------------


def gradient_noise(
    gradients: dict[Variant, torch.Tensor], *, bootstrap: int = 1000, seed: int = 0
) -> list[GradientNoise]:
    """Variance, norm and bias of estimators from their gradients of the same N batches, each (N, P).

    Raises ValueError for fewer than three batches, or where `return` and `exact` are both missing.
    """
    count = len(next(iter(gradients.values())))
    if count < 3:
        raise ValueError(f"{count} batches: at least 3 are needed for an interval")
    reference = torch.stack([gradients[v] for v in _unbiased(list(gradients))]).mean(0)
    # The first row takes every batch once: the estimate itself.
    counts = np.concatenate([np.ones((1, count)), statistics.resample_counts(count, bootstrap, seed)])
    counts = counts[(counts > 0).sum(1) > 1]  # a resample of one batch alone has no pair

    variances, result = None, []
    for (estimator, baseline), g in gradients.items():
        products = _gram(g)
        squares = np.diag(products)
        variance = _pair_mean((squares[:, None] + squares[None, :]) / 2 - products, counts)
        variances = variance if variances is None else variances
        relative = np.divide(variance, variances, out=np.full_like(variance, np.nan), where=variances > 0)
        norm, bias = (
            np.sqrt(np.maximum(_pair_mean(p, counts), 0.0)) for p in (products, _gram(g - reference))
        )
        intervals = (_interval(values) for values in (variance, relative, norm, bias))
        result.append(GradientNoise(estimator, baseline, *intervals))
    return result


def _unbiased(variants: Sequence[Variant]) -> list[Variant]:
    """What the bias is measured against: `return` and `exact` with the first unbiased baseline there is."""
    for baseline in ("leave_one_out", "value", "none"):
        found = [v for v in variants if v[0] in ("return", "exact") and v[1] == baseline]
        if found:
            return found
    raise ValueError(
        "the bias is measured against return and exact with leave_one_out, value or none; "
        f"got {', '.join(f'{e}/{b}' for e, b in variants)}"
    )


def _gram(g: torch.Tensor, columns: int = 1 << 20) -> np.ndarray:
    """Products of the rows of g (N, P) with each other, (N, N), in float64."""
    return sum(part.double() @ part.double().T for part in g.split(columns, -1)).numpy()


def _pair_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values (N, N) over pairs of two different batches, each batch as often as counts (B, N) says: (B,)."""
    apart = values - np.diag(np.diag(values))
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    return ((counts @ apart) * counts).sum(1) / pairs


def _interval(values: np.ndarray) -> Interval:
    """The first value, with the interval of the others."""
    found = Interval.of(values[0], values[1:])
    return Interval(*(0.0 if math.isnan(v) else v for v in (found.mean, found.low, found.high)))


# --- measuring ---------------------------------------------------------------------------------------------


def gradients_of(trainer: CLPTrainer, batch: TrainingBatch, variants: Sequence[Variant]) -> torch.Tensor:
    """The trainer's gradient of a step's loss, by each (estimator, baseline): (V, P) float32 on the CPU."""
    parameters = list(trainer.policy.adapter_parameters().values())
    total = torch.zeros(len(variants), sum(p.numel() for p in parameters))
    objective, batching = trainer.objective, trainer.args.micro_batching
    taken = [v for v in variants if v[0] != "mixed"]
    for _, part in micro_batches(batch, objective, batching):
        scored = forward(trainer.policy, part, objective)
        of = {}
        for estimator, baseline in dict.fromkeys([*taken, *_parts_of_mixed(variants)]):
            loss = scored.loss(objective.coefficients(scored.rewarded, estimator, baseline))
            parts = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            of[estimator, baseline] = torch.cat([p.flatten().float() for p in parts]).cpu()
        for row, (estimator, baseline) in zip(total, variants):
            if estimator == "mixed":  # linear in its parts
                row += objective.mix * of["exact", baseline] + (1 - objective.mix) * of["return", baseline]
            else:
                row += of[estimator, baseline]
    return total


def _parts_of_mixed(variants: Sequence[Variant]) -> list[Variant]:
    return [(part, b) for e, b in variants if e == "mixed" for part in ("return", "exact")]


def variants_of(
    trainer: CLPTrainer, estimators: Sequence[str] | None = None, baselines: Sequence[str] | None = None
) -> list[Variant]:
    """Every estimator with every baseline that the run can have; `value` needs a run that was trained with it.

    Raises ConfigError for a name that is unknown, or a baseline that does not fit the run.
    """
    possible = ["leave_one_out", "group_mean"] if trainer.args.num_generations > 1 else []
    possible += ["none", *(["value"] if trainer.objective.needs.value else [])]
    for given, known, what in ((estimators, ESTIMATORS, "estimator"), (baselines, possible, "baseline")):
        for name in given or ():
            if name not in known:
                raise ConfigError(f"{what} {name!r}: this run can be measured with {', '.join(known)}")
    variants = [(e, b) for e in estimators or ESTIMATORS for b in baselines or possible]
    try:
        _unbiased(variants)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return variants


def measure(
    trainer: CLPTrainer,
    variants: Sequence[Variant] | None = None,
    *,
    batches: int = 16,
    bootstrap: int = 1000,
    bar: tqdm | None = None,
) -> list[GradientNoise]:
    """The estimators at the trainer's policy as it is, from `batches` batches of its seed. Leaves it as it was.

    Needs memory for batches * variants gradients in float32.
    """
    ranges.check(ranges.COMMANDS, batches=batches, bootstrap=bootstrap)
    variants = list(variants or variants_of(trainer))
    taken, collector = [], WholeRollouts(trainer.collector_parts)
    weighting, before = trainer.sampler, trainer.sampler.state_dict()
    for i in range(batches):
        step = i * trainer.args.steps_per_rollout
        whole = collector.training_batch(trainer.train_dataset, step, trainer.state)
        taken.append(gradients_of(trainer, whole.split(trainer.args.rollout_steps)[0], variants))
        if bar is not None:
            bar.update()
    weighting.load_state_dict(before)  # it has observed the rewards of these batches
    by_variant = torch.stack(taken, 1)  # (V, N, P)
    return gradient_noise(dict(zip(variants, by_variant)), bootstrap=bootstrap)


def along_run(
    run: str | Path,
    *,
    batches: int = 16,
    completions: int | None = None,
    steps: Sequence[int] | None = None,
    estimators: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
    trust_run: bool = False,
) -> VarianceReport:
    """`measure` at the start of a run (step 0) and at each of its checkpoints, the same prompts and conditions at every one.

    completions: of a batch; None is the run's own optimiser step. Fewer cost less time: the variance is larger by the factor
    that the batch is smaller, the same for all estimators. steps: which checkpoints, 0 for the start; None is all.
    seed: of the batches, which are none the run was trained on. trust_run: execute the reward functions of a run that was not
    trained here. Cost: a rollout, a forward pass and one backward pass for
    each estimator (but mixed) and baseline, per batch. Raises ConfigError where the folder holds no run, or not those
    checkpoints, or it is another person's and not trusted.
    """
    start = time.perf_counter()
    ranges.check(ranges.COMMANDS, batches=batches, bootstrap=bootstrap)
    spec = run_spec.RunSpec.load(run)
    if spec is None:
        raise ConfigError(f"{run} has no run.json; expected the folder of a training run")
    found = {int(p.name.rpartition("-")[2]): p for p in running.checkpoints(run)}
    trust.check(spec, run, trust_run)
    missing = [step for step in steps or () if step and step not in found]
    if missing:
        had = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"{run} has no checkpoint of step {missing[0]}; there are 0 (the start) and {had}")
    transformers_releases.quiet_transformers()
    trainer = _trainer(spec, seed, completions)
    variants = variants_of(trainer, estimators, baselines)
    chosen = [0, *found] if steps is None else list(dict.fromkeys(steps))
    moments = []
    with tqdm(total=len(chosen) * batches, desc="variance", unit="batch", disable=not progress) as bar:
        for step in sorted(chosen):
            if step:
                _set_to(trainer, found[step])
            noise = measure(trainer, variants, batches=batches, bootstrap=bootstrap, bar=bar)
            moments.append(Moment(step, trainer.objective.mix, noise))
    return VarianceReport(
        spec.model,
        list(spec.objectives),
        moments,
        {"batches": batches, "completions": trainer.args.batch_size, "bootstrap": bootstrap, "seed": seed},
        round(time.perf_counter() - start, 3),
        versions(),
        source_commit(),
    )


def _trainer(spec: run_spec.RunSpec, seed: int, completions: int | None) -> CLPTrainer:
    """The run's trainer as it was at the start, but for the seed and size of its batches; it writes nothing."""
    trained = CLPConfig.from_dict(spec.config)
    config = dataclasses.replace(trained, log_completions=False, report_to="none")
    if completions is not None:
        size = {"per_device_train_batch_size": completions, "gradient_accumulation_steps": 1}
        config = dataclasses.replace(config, **size)
    trainer = CLPTrainer(spec.model, spec.reward_functions(), config, spec.train_rows(seed=trained.seed))
    planner = trainer.collector_parts.planner
    drawn = int(seeds.derive(trained.seed, seeds.Stream.GRADIENT_NOISE, seed)) & ((1 << 62) - 1)
    planner.settings = dataclasses.replace(planner.settings, seed=drawn)
    return trainer


def _set_to(trainer: CLPTrainer, path: Path) -> None:
    checkpoint.load_policy(path, trainer.policy)
    checkpoint.load_objective(path, trainer.objective)


# --- text --------------------------------------------------------------------------------------------------


def table(report: VarianceReport) -> str:
    """One line per checkpoint, estimator and baseline, columns aligned; valid Markdown and readable as it is."""
    first = report.moments[0].noise[0]
    header = [
        "step",
        "estimator",
        "baseline",
        "variance",
        f"of {first.estimator}, {first.baseline}",
        "norm",
        "bias",
    ]
    rows = [
        [
            str(moment.step),
            n.estimator,
            n.baseline,
            f"{n.variance:.3g}",
            f"{n.relative:.3g}",
            f"{n.norm.mean:.3g}",
            f"{n.bias:.3g}",
        ]
        for moment in report.moments
        for n in moment.noise
    ]
    return tables.markdown(header, rows)
