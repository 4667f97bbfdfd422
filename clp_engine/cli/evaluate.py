"""clp-engine evaluate: measure the Pareto front of a run, and write the report into the folder of the run."""

from __future__ import annotations

import argparse
from dataclasses import replace

from clp_engine.cli.arguments import (
    RUN_HELP,
    add_number,
    add_sampling,
    add_trust,
    in_range,
    sampling_params,
)
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder, read_json
from clp_engine.core.ranges import EVALUATION, parse_assignments
from clp_engine.data import sources
from clp_engine.training import running
from clp_engine.training.runs import run_spec, trust

HELP = "measure the Pareto front of a run"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    add_number(parser, EVALUATION, "prompts", "held-out prompts", default=100)
    parser.add_argument("--split", help="of the task's data (default: test)")
    add_number(
        parser, EVALUATION, "grid", "weightings along an edge of the simplex (default: 11 for two or three)"
    )
    parser.add_argument(
        "--kl",
        type=_kls,
        metavar="A,B",
        help="KL coefficient of all points, or several: every weighting at each (default: that of training)",
    )
    add_number(
        parser,
        EVALUATION,
        "kl_limit",
        "KL up to which reward is compared with KL, where there are several coefficients (default: the largest)",
        metavar="NATS",
    )
    add_number(parser, EVALUATION, "num_generations", "completions per prompt and weighting", default=1)
    add_number(
        parser,
        EVALUATION,
        "margin",
        "the hypervolume's reference point is the base's mean reward minus this",
        default=0.1,
    )
    parser.add_argument("--reference-point", metavar="A=X,B=Y", help="the reference point by objective")
    parser.add_argument(
        "--judge",
        metavar="REWARD",
        help="a reward function or model that compares each completion with the base model's (as for train's --rewards)",
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        help="with --judge: compare with this run's completions at the same points",
    )
    add_number(parser, EVALUATION, "bootstrap", "resamples for the intervals", default=1000)
    add_number(parser, EVALUATION, "batch_rows", "completions decoded together", default=128)
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: RUN)")
    parser.add_argument("--task", help="where RUN is a policy alone: an embedded task")
    parser.add_argument("--dataset", metavar="FILE", help="prompts to evaluate on, as for train")
    parser.add_argument(
        "--rewards", nargs="+", metavar="NAME=REWARD", help="in place of what RUN names: as for train"
    )
    add_trust(parser)
    add_sampling(parser, EVALUATION)


def _kls(text: str) -> list[float]:
    """The list [0.01, 0.1] of the text '0.01,0.1'."""
    return [in_range(EVALUATION["kl"])(part) for part in text.split(",")]


def run(arguments: argparse.Namespace) -> None:
    from clp_engine.evaluation import report as rendering

    spec = _spec_of(arguments)
    reference = None
    if arguments.reference_point is not None:
        reference = parse_assignments(arguments.reference_point, "reference-point")
        if not isinstance(reference, dict):
            raise ConfigError("reference-point: give the numbers by objective, such as a=0.1,b=0.2")
    if arguments.dataset is not None and arguments.split is not None:
        raise ConfigError("--dataset and --split were both given; splits are of a task's data, give one")
    rows = (
        spec.eval_rows(arguments.prompts, split=arguments.split)
        if arguments.dataset is None
        else sources.read_rows(arguments.dataset)[: arguments.prompts]
    )
    out = arguments.run_folder if arguments.out is None else arguments.out
    check_folder("out", out)
    from clp_engine.evaluation.evaluate import evaluate
    from clp_engine.training.parallel.faults import one_voice
    from clp_engine.training.parallel.processes import Parallel

    parallel = Parallel.joined(use_cpu=arguments.device == "cpu")
    with one_voice(parallel):
        result = evaluate(
            running.load_policy(arguments.run_folder, arguments.device),
            spec.reward_functions(),
            rows,
            grid=arguments.grid,
            kl=arguments.kl,
            kl_limit=arguments.kl_limit,
            margin=arguments.margin,
            num_generations=arguments.num_generations,
            sampling=sampling_params(arguments, spec),
            max_prompt_length=spec.config.get("max_prompt_length"),
            judge=None if arguments.judge is None else run_spec.load_reward(arguments.judge),
            against=None
            if arguments.against is None
            else running.load_policy(arguments.against, arguments.device),
            batch_rows=arguments.batch_rows,
            reference_point=reference,
            bootstrap=arguments.bootstrap,
            seed=arguments.seed,
            output_dir=out,
            task=spec.task,
            train_seconds=spec.train_seconds,
            parallel=parallel,
        )
    parts = [rendering.table(result), rendering.summary(result), rendering.texts_table(result)]
    print("\n\n".join(part for part in [*parts, f"report: {out}/report.md"] if part))


def _spec_of(arguments: argparse.Namespace) -> run_spec.RunSpec:
    """The description of the run, with task, dataset and rewards from the flags where these were given."""
    policy = running.policy_directory(arguments.run_folder)
    spec = run_spec.RunSpec.find(arguments.run_folder)
    if arguments.task is None and arguments.rewards is None:
        if spec is None:
            raise ConfigError(
                f"{arguments.run_folder} has no run.json; say what to evaluate with --task, or "
                "--dataset and --rewards"
            )
        instead = ", or --rewards and --dataset, to have your own used"
        trust.check(spec, arguments.run_folder, arguments.trust_run, instead)
        return spec
    objectives = read_json(policy / "clp_config.json").get("objectives")
    given = run_spec.RunSpec.from_values(
        {
            "model": "unused",
            "task": arguments.task,
            "rewards": arguments.rewards,
            "objectives": objectives,
            "dataset": None if arguments.task else arguments.dataset,
        }
    )
    return given if spec is None else replace(given, config=spec.config, train_seconds=spec.train_seconds)
