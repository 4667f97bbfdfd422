"""clp-engine demo: train a small summariser that can be steered between conflicting rewards, on two CPU cores.

The demo trains LoRA-CLP on DocSum and evaluates the trained policy and the base model on the default grid, over held-out
documents. It writes the report, and prints the table of points and some summaries at a few weightings. An interrupted demo is
resumed; a finished one is replaced.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_engine.cli.arguments import add_number, listed
from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder
from clp_engine.training import running
from clp_engine.training.runs import run_folder, run_spec

if TYPE_CHECKING:
    from clp_engine.evaluation.report import ParetoReport
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.training.settings.config import CLPConfig

TASK = "docsum"
# Settings of the demo's training; everything else is CLPConfig's default.
TRAINING: dict[str, Any] = {
    "max_steps": 240,
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "temperature": 0.7,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "alpha": 0.025,
    "rank": 16,
    "weight_sampler": "dirichlet",
    "concentration": 0.7,
    "corner_probability": 0.3,
    "logging_steps": 10,
    "save_steps": 20,
    "save_total_limit": 1,
}
EVALUATION: dict[str, Any] = {"prompts": 256, "num_generations": 2, "margin": 0.1, "batch_rows": 192}
EXAMPLES = 3
_WIDEST = 110  # columns of text, however wide the terminal

HELP = "train, evaluate and show the embedded example, a summariser"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--objectives",
        default="coverage,brevity",
        metavar="A,B",
        help="rewards to be steered between (default: %(default)s)",
    )
    which.add_argument("--faithfulness", action="store_true", help="coverage, brevity and faithfulness")
    add_number(parser, ranges.COMMANDS, "steps", "optimiser steps of training")
    add_number(parser, ranges.COMMANDS, "prompts", "held-out documents to evaluate on")
    add_number(parser, ranges.COMMANDS, "seed", "seed of all random numbers", default=0)


def run(arguments: argparse.Namespace) -> None:
    objectives = "coverage,brevity,faithfulness" if arguments.faithfulness else arguments.objectives
    run_demo(
        arguments.out,
        listed(objectives),
        steps=arguments.steps,
        prompts=arguments.prompts,
        seed=arguments.seed,
    )


def run_demo(
    out: str | Path,
    objectives: Sequence[str],
    *,
    steps: int | None = None,
    prompts: int | None = None,
    seed: int = 0,
) -> ParetoReport:
    """Run the demo in the run folder `out`, and print its results.

    steps, prompts: of training and evaluation; None takes the defaults. Raises ConfigError for unknown objectives, for a
    folder that holds files of another kind, and for a number below one.
    """
    started = time.perf_counter()
    for name, value in (("steps", steps), ("prompts", prompts)):
        if value is not None:
            ranges.check(ranges.COMMANDS, **{name: value})
    check_folder("out", out)
    spec = run_spec.RunSpec.from_values({"task": TASK, "objectives": list(objectives)})
    task = run_spec.find_task(TASK)
    from clp_engine.training.settings.config import CLPConfig

    settings = {
        **TRAINING,
        "max_completion_length": task.max_completion_length,
        "max_prompt_length": task.max_prompt_length,
        "output_dir": str(out),
        "overwrite_output_dir": True,
        "seed": seed,
    }
    config = CLPConfig.from_dict(settings | ({"max_steps": steps} if steps else {}))
    spec = replace(spec, config=config.to_dict(), command="demo")
    resume = _prepare(Path(out), spec)

    _say(
        f"Training one model to be steered between {_listed(spec.objectives)}: {config.max_steps} steps of "
        f"{config.batch_size} summaries, each group of {config.num_generations} under its own weighting."
    )
    again = shlex.join(["clp-engine", *(sys.argv[1:] if sys.argv[1:2] == ["demo"] else ["demo"])])
    # Preparing more prompts than the run can use takes time.
    limit = config.max_steps * config.batch_size // config.num_generations
    policy = running.train(spec, config, resume=resume, again=again, limit=limit).policy
    rows = spec.eval_rows((prompts or EVALUATION["prompts"]) + EXAMPLES, seed=seed)
    examples, held_out = rows[:EXAMPLES], rows[EXAMPLES:]

    _say(f"\nEvaluating it and the base model on {len(held_out)} held-out documents.")
    report = _evaluate(policy, spec, config, held_out, out)
    _show_report(report)
    _show_examples(policy, examples, config.max_completion_length)
    _show_next(Path(out), report, time.perf_counter() - started)
    return report


def _prepare(out: Path, spec: run_spec.RunSpec) -> bool:
    """Whether to resume the demo in `out`. Otherwise training replaces the files of a finished or different demo."""
    found = run_spec.RunSpec.load(out)
    if found is None:
        began = run_folder.Manifest.read(out) is not None  # and was killed before it had described itself
        if out.exists() and not began and (not out.is_dir() or any(p.name[0] != "." for p in out.iterdir())):
            raise ConfigError(f"{out} is not empty and holds no run; give another folder with --out")
        return False
    if found.command != "demo":
        raise ConfigError(f"{out} holds a run of yours (model {found.model}); give another folder with --out")
    saved = running.checkpoints(out)
    if saved and not running.is_finished(out) and found.same_training(spec):
        _say(f"{out} holds an unfinished run with these settings: going on at {saved[-1].name}.")
        return True
    _say(f"{out} holds an earlier demo: starting over.")
    return False


def _evaluate(
    policy: ConditionedPolicy, spec: run_spec.RunSpec, config: CLPConfig, rows: list[dict], out: str | Path
) -> ParetoReport:
    from clp_engine.evaluation.evaluate import evaluate
    from clp_engine.rollouts.types import SamplingParams

    trained = run_spec.RunSpec.load(out)
    options = {name: value for name, value in EVALUATION.items() if name != "prompts"}
    return evaluate(
        policy,
        spec.reward_functions(),
        rows,
        seed=config.seed,
        output_dir=out,
        task=TASK,
        sampling=SamplingParams(config.max_completion_length, config.temperature),
        max_prompt_length=config.max_prompt_length,
        train_seconds=trained.train_seconds,
        **options,
    )


# --- what is printed ---------------------------------------------------------------------------------------


def _say(text: str, indent: str = "") -> None:
    width = min(shutil.get_terminal_size((100, 24)).columns, _WIDEST)
    for line in text.split("\n"):
        print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _show_report(report: ParetoReport) -> None:
    from clp_engine.evaluation.report import summary, table

    lines = table(report).split("\n")
    if len(report.points) > 20:  # a 66-point table says less than its corners and its summary
        corners = [i for i, p in enumerate(report.points) if max(p.weights.values()) > 0.999]
        lines = [*lines[:2], *(lines[2 + i] for i in corners), lines[-1]]
    print("\n" + "\n".join(lines) + "\n\n" + summary(report))


def _shown_weightings(count: int) -> list[list[float]]:
    """The weightings of each objective alone, and the equal one between the first two."""
    corners = [[float(i == j) for j in range(count)] for i in range(count)]
    middle = [[1 / count] * count] if count > 1 else []
    return [*corners[:1], *middle, *corners[1:]]


def _show_examples(policy: ConditionedPolicy, rows: list[dict], max_new_tokens: int) -> None:
    weightings = _shown_weightings(len(policy.objectives))
    prompts = [row["prompt"] for row in rows for _ in weightings]
    texts = iter(
        policy.generate(prompts, weightings * len(rows), temperature=0.0, max_new_tokens=max_new_tokens)
    )
    print(f"\n{_bold('Held-out documents, and the likeliest summary at each weighting')}")
    for row in rows:
        print(f"\n{_bold(row['name'])}")
        _say(textwrap.shorten(row["document"], 300, placeholder=" ..."), indent="  ")
        _say(f"its own summary: {row['reference']}", indent="  ")
        for weights in weightings:
            label = ", ".join(f"{name} {w:.2f}" for name, w in zip(policy.objectives, weights) if w > 0)
            _say(f"{label}: {next(texts) or '(empty)'}", indent="    ")


def _show_next(out: Path, report: ParetoReport, seconds: float) -> None:
    share = [round(1 / len(report.objectives), 2)] * len(report.objectives)
    share[0] = round(1 - sum(share[1:]), 2)
    if len(share) == 2:
        share = [0.7, 0.3]
    weights = ",".join(f"{name}={w:g}" for name, w in zip(report.objectives, share))
    picture = f" and {out}/pareto.png" if (out / "pareto.png").is_file() else ""
    prompt = "Return the largest element of the list. If the list is empty, raise ValueError."
    print(
        f"\n{_bold(f'Done in {seconds / 60:.1f} minutes.')} The report is {out}/report.md{picture}. Next:\n"
        f"\n  clp-engine steer {out}    # a page in the browser: text in, a slider for each objective\n"
        f"  clp-engine generate {out} --weights {weights}\n"
        f'  clp-engine generate {out} --weights {weights} --prompt "{prompt}"\n'
        f"  clp-engine export {out} --weights {weights} --to adapter    # for peft, transformers, vLLM\n"
    )
