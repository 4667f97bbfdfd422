"""The command line, clp-engine. A mistake of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch and transformers take seconds to import: only commands that use them do.
from clp_engine import __version__
from clp_engine.core import files
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder, read_json
from clp_engine.core.ranges import COMMANDS, EVALUATION, GENERATION, SAMPLING, TRAINING, Range
from clp_engine.data import sources
from clp_engine.training import run_folder, runs, trust

if TYPE_CHECKING:
    from clp_engine.rollouts.types import SamplingParams
    from clp_engine.training.config import CLPConfig

_EPILOG = """\
examples:
  clp-engine demo                                     train and show a steerable summariser
  clp-engine train CONFIG.yaml --learning-rate 3e-4   every key of the file is a flag, too
  clp-engine evaluate runs/demo                       Pareto front: report.json, report.md, pareto.png
  clp-engine variance runs/mine                       noise and bias of the gradient at each checkpoint
  clp-engine generate runs/demo --weights coverage=0.7,brevity=0.3 --prompt "Return the sum of ..."
  clp-engine steer runs/demo                          a page with a slider for each objective
  clp-engine export runs/demo --weights coverage=0.7,brevity=0.3 --to adapter
  clp-engine export runs/demo --each --to adapters    an adapter per objective, for peft
  clp-engine compare CONFIG.yaml                      methods and baselines over seeds, in one report

exit codes: 0 done, 1 an error of the engine, 2 a mistake in what was asked, 130 interrupted
"""

_TRAIN_EPILOG = """\
CONFIG.yaml holds the names of the flags with underscores, and `task` or `model`, `dataset` and `rewards`:

  model: Qwen/Qwen2.5-0.5B-Instruct
  dataset: prompts.jsonl                  # {"prompt": ..., further columns for the rewards} a line
  rewards:
    helpful: my-org/my-reward-model       # a sequence classifier
    short: my_rewards:short               # a function in my_rewards.py; TRL's convention
  output_dir: runs/helpful-short
  max_steps: 500
  alpha: 0.1

examples:
  clp-engine train CONFIG.yaml
  clp-engine train CONFIG.yaml --resume
  clp-engine train --task docsum --objectives coverage,brevity --max-steps 200 --output-dir runs/mine
"""

_COMPARE_EPILOG = """\
CONFIG.yaml holds the settings that all methods share, as for train, and:

  task: docsum
  objectives: [coverage, brevity]
  output_dir: runs/comparison
  seeds: [0, 1, 2]
  budget_tokens: 400000                   # generated in a full budget; or max_steps
  methods:
    LoRA-CLP: {conditioning: lora}
    prompt: {conditioning: prompt, learning_rate: 1e-4}
    specialists: {kind: specialists, weightings: [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]}
    Rewarded Soups: {kind: soup}          # its specialists share one budget; budget: each gives each a full one
    logit mixing: {kind: logit_mixing}
  evaluation: {prompts: 256, num_generations: 2, grid: 11, margin: 0.1}

A specialist per KL coefficient, for one objective: {kind: kl_specialists, alphas: [0.01, 0.1]}.
The same command goes on where an earlier one stopped, and trains nothing twice.

examples:
  clp-engine compare CONFIG.yaml --dry-run
  clp-engine compare CONFIG.yaml --jobs 2
  clp-engine compare CONFIG.yaml --only LoRA-CLP,prompt --seeds 0
"""

_RUN_HELP = "run folder (or a policy folder or checkpoint in it)"
_WEIGHTS_HELP = "a=0.7,b=0.3, or 0.7,0.3 in the order of the objectives"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage in front. Flags are not abbreviated: a new one breaks no script."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def refuse(self, unknown: Sequence[str]) -> None:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _with_hyphens(argument: str) -> str:
    """A flag under the name of its setting, --learning_rate=0.001, as the flag that it is, --learning-rate=0.001."""
    if not argument.startswith("--"):
        return argument
    flag, *value = argument.split("=", 1)
    return "=".join([flag.replace("_", "-"), *value])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = [_with_hyphens(a) for a in (sys.argv[1:] if argv is None else argv)]
    debug = "--traceback" in argv or os.environ.get("CLP_DEBUG", "0") not in ("", "0")
    try:
        try:
            arguments, unknown = _parser(argv).parse_known_args(argv)
            if unknown:
                arguments.parser.refuse(unknown)
            code = arguments.run(arguments)
        finally:
            sys.stdout.flush()
        return code or 0
    except ConfigError as error:
        if debug:
            raise
        return _complain(f"error: {_one_line(error)}", 2)
    except BrokenPipeError:
        # Whoever read the output has seen enough (| head). Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.filename is None:
            raise
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room: what was written before is whole, and training goes on with --resume" if room else ""
        return _complain(f"error: {error.filename}: {error.strerror}{remedy}", 2)
    except runs.Interrupted as error:
        return _complain(str(error), 130)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(message: str, code: int) -> int:
    print(f"clp-engine: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- parsers -----------------------------------------------------------------------------------------------


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; flags of CLPConfig are added only where `train` was asked for: importing it takes torch."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", help="show where an error came from (or set CLP_DEBUG=1)"
    )
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "clp-engine",
        epilog=_EPILOG,
        formatter_class=formatter,
        parents=[common],
        description=(
            "Fine-tune one language model that can be steered, at inference time, between several rewards."
        ),
    )
    parser.add_argument("--version", action="version", version=f"clp-engine {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable, help: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            parents=[common],
            formatter_class=formatter,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    _add_demo(command("demo", _demo, "train, evaluate and show the embedded example, a summariser"))
    train = command("train", _train, "train a conditioned policy", _TRAIN_EPILOG)
    if next((word for word in argv if not word.startswith("-")), None) == "train":
        _add_train(train)
    _add_evaluate(command("evaluate", _evaluate, "measure the Pareto front of a run"))
    _add_variance(command("variance", _variance, "measure the noise and bias of the gradient along a run"))
    _add_generate(command("generate", _generate, "generate text at a weighting of the objectives"))
    _add_steer(command("steer", _steer, "open a local page with a slider for each objective"))
    _add_export(
        command("export", _export, "write weightings or objectives as ordinary PEFT adapters or models")
    )
    _add_compare(command("compare", _compare, "compare methods and baselines over seeds", _COMPARE_EPILOG))
    info = command("info", _info, "show versions, devices, kernel back-ends, and what a training would need")
    info.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml|RUN",
        help="a training: its parameters and memory, and those of other conditioning",
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--objectives",
        default="coverage,brevity",
        metavar="A,B",
        help="rewards to be steered between (default: %(default)s)",
    )
    which.add_argument("--faithfulness", action="store_true", help="coverage, brevity and faithfulness")
    parser.add_argument("--steps", type=_in(COMMANDS["steps"]), help="optimiser steps of training")
    parser.add_argument(
        "--prompts", type=_in(COMMANDS["prompts"]), help="held-out documents to evaluate on"
    )
    parser.add_argument(
        "--seed", type=_in(COMMANDS["seed"]), default=0, help="of everything random (default: %(default)s)"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    import dataclasses

    from clp_engine.training.config import CLPConfig

    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="settings; flags take precedence")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, by default the newest of the run",
    )
    parser.add_argument(
        "--overwrite",
        "--overwrite-output-dir",
        dest="overwrite_output_dir",
        action="store_true",
        default=None,
        help="replace an earlier run in the same folder, once this one is built; other files stay",
    )
    run = parser.add_argument_group("what is trained")
    run.add_argument("--model", help="name or path of a language model (default: the task's)")
    run.add_argument("--task", help="an embedded task instead of dataset and rewards: docsum")
    run.add_argument("--dataset", metavar="FILE", help="JSON lines with a prompt each")
    run.add_argument("--eval-dataset", metavar="FILE", help="held-out prompts, for evaluation")
    run.add_argument(
        "--rewards",
        nargs="+",
        metavar="NAME=REWARD",
        help="REWARD: module:function, file.py:function, or a sequence classifier",
    )
    run.add_argument("--objectives", help="which rewards, comma-separated (default: all, or the task's)")
    settings = parser.add_argument_group("settings")
    for option in dataclasses.fields(CLPConfig):
        if option.name == "overwrite_output_dir":
            continue
        flag = "--" + option.name.replace("_", "-")
        text = option.metadata["help"].replace("%", "%%")
        if option.name in TRAINING:
            text += f"; {TRAINING[option.name].described}"
        if option.default is not None:
            text += f" (default: {option.default})"
        hint = CLPConfig.__annotations__[option.name]  # HfArgumentParser replaces option.type
        if hint == "bool":
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = hint.partition(" |")[0].partition("[")[0].upper()
            settings.add_argument(flag, metavar=kind, help=text)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)

    def number(name: str, default: float, help: str) -> None:
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=_in(EVALUATION[name]),
            default=default,
            metavar="N" if EVALUATION[name].kind is int else "X",
            help=f"{help} (default: {default})",
        )

    number("prompts", 100, "held-out prompts")
    parser.add_argument("--split", help="of the task's data (default: test)")
    parser.add_argument(
        "--grid",
        type=_in(EVALUATION["grid"]),
        metavar="N",
        help="weightings along an edge of the simplex (default: 11 for two or three)",
    )
    parser.add_argument(
        "--kl",
        type=_kls,
        metavar="A,B",
        help="KL coefficient of all points, or several: every weighting at each (default: that of training)",
    )
    parser.add_argument(
        "--kl-limit",
        type=_in(EVALUATION["kl_limit"]),
        metavar="NATS",
        help="KL up to which reward is compared with KL, where there are several coefficients (default: the largest)",
    )
    number("num_generations", 1, "completions per prompt and weighting")
    number("margin", 0.1, "the hypervolume's reference point is the base's mean reward minus this")
    parser.add_argument("--reference-point", metavar="A=X,B=Y", help="the reference point by objective")
    number("bootstrap", 1000, "resamples for the intervals")
    number("batch_rows", 128, "completions decoded together")
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: RUN)")
    parser.add_argument("--task", help="where RUN is a policy alone: an embedded task")
    parser.add_argument("--dataset", metavar="FILE", help="prompts to evaluate on, as for train")
    parser.add_argument(
        "--rewards", nargs="+", metavar="NAME=REWARD", help="in place of what RUN names: as for train"
    )
    _add_trust(parser)
    _add_sampling(parser, EVALUATION["seed"])


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-run",
        action="store_true",
        help="execute the reward functions and read the files that the run.json of another person's run names",
    )


def _add_variance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder; each of its checkpoints is measured")
    parser.add_argument(
        "--batches",
        type=_in(COMMANDS["batches"]),
        default=16,
        metavar="N",
        help="batches for each checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--completions",
        type=_in(COMMANDS["completions"]),
        metavar="N",
        help="completions of a batch (default: those of a training step)",
    )
    parser.add_argument(
        "--steps", metavar="A,B", help="which checkpoints, 0 for the start (default: the start and all)"
    )
    parser.add_argument("--estimators", metavar="A,B", help="which KL estimators (default: all)")
    parser.add_argument(
        "--baselines", metavar="A,B", help="which baselines (default: all; value where the run has it)"
    )
    parser.add_argument(
        "--bootstrap",
        type=_in(COMMANDS["bootstrap"]),
        default=1000,
        metavar="N",
        help="resamples for the intervals",
    )
    parser.add_argument(
        "--seed", type=_in(COMMANDS["seed"]), default=0, help="of the batches (default: %(default)s)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where to write the numbers (default: RUN/variance.json)"
    )
    _add_trust(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("--weights", help=f"{_WEIGHTS_HELP} (default: equal)")
    parser.add_argument("--kl", type=_in(EVALUATION["kl"]), help="KL coefficient, for policies conditioned on it")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="one prompt; - reads it from the standard input")
    given.add_argument("--prompts", metavar="FILE", help="one prompt per line, or JSON lines with prompts")
    given.add_argument(
        "--examples",
        type=_in(COMMANDS["examples"]),
        metavar="N",
        help="N held-out documents of the run's task (without a prompt: 3)",
    )
    parser.add_argument(
        "--num-return-sequences",
        type=_in(GENERATION["num_return_sequences"]),
        default=1,
        metavar="N",
        help="completions per prompt",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    _add_sampling(parser, GENERATION["seed"])


def _add_sampling(parser: argparse.ArgumentParser, seeds: Range) -> None:
    for name, text in (
        ("max_new_tokens", "default: as in training, or 128"),
        ("temperature", "0 is greedy; default: as in training, or 1"),
        ("top_k", "draw from the k likeliest tokens"),
        ("top_p", "draw from the nucleus of this mass"),
    ):
        parser.add_argument("--" + name.replace("_", "-"), type=_in(SAMPLING[name]), metavar="N", help=text)
    parser.add_argument("--seed", type=_in(seeds), default=0, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def _add_steer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    parser.add_argument(
        "--port",
        type=_in(COMMANDS["port"]),
        default=8765,
        metavar="N",
        help="where to listen; 0 is any that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--examples",
        metavar="FILE",
        help="prompts to choose from on the page (default: those of your own run, or in its folder)",
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --host be one that other machines reach; nothing asks them for a password",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("--weights", help=_WEIGHTS_HELP)
    parser.add_argument("--kl", type=_in(EVALUATION["kl"]), help="KL coefficient, for policies conditioned on it")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--merged", action="store_true", help="a transformers model instead of an adapter")
    parser.add_argument(
        "--each",
        action="store_true",
        help="one adapter per objective instead of a blend, and clp_blend.json, which says how they are blended",
    )
    parser.add_argument(
        "--rank",
        type=_in(COMMANDS["rank"]),
        metavar="R",
        help="of the adapter, at most: cuts deltas to their largest singular values and reports the error",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into DIR though it is not empty: replaces files of the same names, others stay",
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="methods, seeds, budget and shared settings")
    parser.add_argument("--output-dir", metavar="DIR", help="instead of the file's output_dir")
    parser.add_argument(
        "--only", metavar="A,B", help="do these methods alone; the report covers what is there"
    )
    parser.add_argument("--seeds", metavar="0,1", help="do these of the file's seeds alone")
    parser.add_argument(
        "--jobs",
        type=_in(COMMANDS["jobs"]),
        default=1,
        metavar="N",
        help="processes, each with its share of the cores",
    )
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done and what is done already"
    )


def _in(values: Range) -> Callable[[str], float]:
    """What argparse reads a number in this range with."""

    def read(text: str) -> float:
        try:
            return values.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _kls(text: str) -> list[float]:
    """'0.01,0.1' as a list."""
    return [_in(EVALUATION["kl"])(part) for part in text.split(",")]


def parse_assignments(text: str, name: str) -> dict[str, float] | list[float]:
    """'a=0.7,b=0.3' as a mapping, '0.7,0.3' as a list; ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [part.partition("=") for part in parts]
    named = [bool(equals) for _, equals, _ in pairs]
    try:
        if parts and all(named):
            values = {key.strip(): float(value) for key, _, value in pairs}
            if len(values) < len(pairs):
                raise ConfigError(f"{name}={text!r}: an objective occurs twice")
            return values
        if parts and not any(named):
            return [float(part) for part in parts]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"{name}={text!r}: expected numbers by objective, such as a=0.7,b=0.3")


# --- commands ----------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from clp_engine.cli.demo import run_demo

    objectives = "coverage,brevity,faithfulness" if arguments.faithfulness else arguments.objectives
    run_demo(
        arguments.out,
        [name.strip() for name in objectives.split(",")],
        steps=arguments.steps,
        prompts=arguments.prompts,
        seed=arguments.seed,
    )


def _train(arguments: argparse.Namespace) -> None:
    import dataclasses

    from clp_engine.core.yaml_reading import read_file, read_flag
    from clp_engine.training.config import CLPConfig

    values = read_file(arguments.config) if arguments.config else {}
    own = {f.name for f in dataclasses.fields(CLPConfig)}
    for name, value in vars(arguments).items():
        if value is not None and name in own:
            values[name] = value if isinstance(value, bool) else read_flag(value, CLPConfig, name)
    given = {name: getattr(arguments, name) for name in runs.RUN_KEYS}
    spec, config = _training(values | {name: value for name, value in given.items() if value is not None})
    check_folder("output_dir", config.output_dir)
    if not arguments.resume:  # before anything is loaded; training looks again, when it has the folder to itself
        run_folder.check_free(config.output_dir, "a new one", config.overwrite_output_dir)
    from clp_engine.cli.info import render_training

    print("\n".join(render_training(spec, config)))
    aside = ("--overwrite", "--overwrite-output-dir", "--overwrite_output_dir", "--resume")
    words = [word for word in sys.argv[1:] if word not in aside]
    again = shlex.join(["clp-engine", *words, "--resume"])
    runs.train(spec, config, resume=arguments.resume, again=again)
    print(f"policy: {config.output_dir}/policy\nnext:   clp-engine evaluate {config.output_dir}")


def _training(values: dict[str, Any]) -> tuple[runs.RunSpec, CLPConfig]:
    """What is trained and how, from a configuration file's content."""
    from clp_engine.training.config import CLPConfig

    about = {name: values.get(name) for name in runs.RUN_KEYS}
    values = {name: value for name, value in values.items() if name not in about}
    CLPConfig.from_dict(values)  # a wrong setting is reported before anything is loaded
    spec = runs.RunSpec.from_values(about)
    if spec.task is not None:
        task = runs.find_task(spec.task)
        values = {
            "max_completion_length": task.max_completion_length,
            "max_prompt_length": task.max_prompt_length,
            **values,
        }
    return spec, CLPConfig.from_dict(values)


def _evaluate(arguments: argparse.Namespace) -> None:
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
    policy = runs.load_policy(arguments.run_folder, arguments.device)
    rewards = spec.reward_functions()
    from clp_engine.evaluation.evaluate import evaluate

    result = evaluate(
        policy,
        rewards,
        rows,
        grid=arguments.grid,
        kl=arguments.kl,
        kl_limit=arguments.kl_limit,
        margin=arguments.margin,
        num_generations=arguments.num_generations,
        sampling=_sampling(arguments, spec),
        max_prompt_length=spec.config.get("max_prompt_length"),
        batch_rows=arguments.batch_rows,
        reference_point=reference,
        bootstrap=arguments.bootstrap,
        seed=arguments.seed,
        output_dir=out,
        task=spec.task,
        train_seconds=spec.train_seconds,
    )
    print(f"{rendering.table(result)}\n\n{rendering.summary(result)}\n\nreport: {out}/report.md")


def _variance(arguments: argparse.Namespace) -> None:
    def listed(text: str | None) -> list[str] | None:
        return None if text is None else [part.strip() for part in text.split(",")]

    try:
        steps = None if arguments.steps is None else [int(part) for part in listed(arguments.steps)]
    except ValueError:
        raise ConfigError(f"steps={arguments.steps!r}: expected step numbers such as 0,100,200") from None
    out = str(Path(arguments.run_folder) / "variance.json") if arguments.out is None else arguments.out
    if arguments.out is not None:
        if Path(out).is_dir():
            raise ConfigError(f"out={out!r} is a folder; expected a file to write")
        check_folder("out", Path(out).parent)
    runs.RunSpec.load(arguments.run_folder)  # a file that cannot be read is reported before torch is imported
    from clp_engine.training import gradient_noise

    result = gradient_noise.along_run(
        arguments.run_folder,
        batches=arguments.batches,
        completions=arguments.completions,
        steps=steps,
        estimators=listed(arguments.estimators),
        baselines=listed(arguments.baselines),
        bootstrap=arguments.bootstrap,
        seed=arguments.seed,
        trust_run=arguments.trust_run,
    )
    result.save(out)
    run_folder.note(Path(out).parent, [out])
    print(f"{gradient_noise.table(result)}\n\nnumbers: {out}")


def _spec_of(arguments: argparse.Namespace) -> runs.RunSpec:
    """The run's own description; what is measured and on what, from the flags where they say so."""
    policy = runs.policy_directory(arguments.run_folder)
    spec = runs.RunSpec.load(arguments.run_folder) or runs.RunSpec.load(policy.parent)
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
    given = runs.RunSpec.from_values(
        {
            "model": "unused",
            "task": arguments.task,
            "rewards": arguments.rewards,
            "objectives": objectives,
            "dataset": None if arguments.task else arguments.dataset,
        }
    )
    return given if spec is None else replace(given, config=spec.config, train_seconds=spec.train_seconds)


def _sampling(arguments: argparse.Namespace, spec: runs.RunSpec | None) -> SamplingParams:
    from clp_engine.rollouts.types import SamplingParams

    trained = {} if spec is None else spec.config
    temperature = (
        arguments.temperature if arguments.temperature is not None else trained.get("temperature", 1.0)
    )
    return SamplingParams(
        trained.get("max_completion_length", 128)
        if arguments.max_new_tokens is None
        else arguments.max_new_tokens,
        temperature,
        arguments.top_k,
        arguments.top_p,
    )


def _generate(arguments: argparse.Namespace) -> None:
    weights = None if arguments.weights is None else parse_assignments(arguments.weights, "weights")
    spec = runs.RunSpec.load(arguments.run_folder) or runs.RunSpec.load(Path(arguments.run_folder).parent)
    policy = runs.load_policy(arguments.run_folder, arguments.device)
    policy.conditions(weights, arguments.kl)  # names and numbers are checked before anything is generated
    rows = _generation_rows(arguments, spec, policy.tokenizer)
    sampling = _sampling(arguments, spec)
    texts = policy.generate(
        [row["prompt"] for row in rows],
        weights,
        arguments.kl,
        seed=arguments.seed,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        num_return_sequences=arguments.num_return_sequences,
    )
    for row, completions in zip(rows, texts):
        completions = [completions] if isinstance(completions, str) else completions
        if arguments.json:
            for completion in completions:
                print(json.dumps({"prompt": row["prompt"], "completion": completion}, ensure_ascii=False))
            continue
        if "reference" in row:
            print(f"{row['name']}  (its own summary: {row['reference']})")
        for completion in completions:
            print(completion)


def _generation_rows(arguments: argparse.Namespace, spec: runs.RunSpec | None, tokenizer) -> list[dict]:
    in_task = spec is not None and spec.task is not None
    if arguments.prompts is not None:
        rows = sources.read_rows(arguments.prompts)
    elif arguments.prompt is not None:
        rows = [{"prompt": sys.stdin.read() if arguments.prompt == "-" else arguments.prompt}]
    elif in_task:
        return spec.eval_rows(3 if arguments.examples is None else arguments.examples)
    else:
        raise ConfigError("give --prompt TEXT or --prompts FILE")
    if in_task:
        from clp_engine.tasks.docsum.dataset import as_prompt

        rows = [{**row, "prompt": as_prompt(row["prompt"], tokenizer)} for row in rows]
    return rows


def _steer(arguments: argparse.Namespace) -> None:
    runs.policy_directory(arguments.run_folder)  # a wrong folder is reported before torch is imported
    from clp_engine.serving.server import serve

    serve(
        arguments.run_folder,
        host=arguments.host,
        port=arguments.port,
        allow_remote=arguments.allow_remote,
        browser=not arguments.no_browser,
        device=arguments.device,
        examples=arguments.examples,
    )


def _export(arguments: argparse.Namespace) -> None:
    weights = None if arguments.weights is None else parse_assignments(arguments.weights, "weights")
    target = Path(arguments.to)
    files.refuse_overlap(target, [runs.policy_directory(arguments.run_folder)])
    if target.exists() and not arguments.overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} exists and is not empty; give --overwrite to write into it, or another folder"
        )
    if arguments.merged and (arguments.rank is not None or arguments.each):
        raise ConfigError("--rank and --each are of adapters; --merged writes whole weights, leave one out")
    if arguments.each and (weights is not None or arguments.kl is not None):
        raise ConfigError("--each writes every objective's adapter unblended; leave out --weights and --kl")
    check_folder("to", target.parent)
    policy = runs.load_policy(arguments.run_folder, "cpu")
    base = f"  (base model: {policy.spec.base_model})"
    if arguments.each:
        for name, error in policy.save_adapters(target, rank=arguments.rank).items():
            print(f"adapter: {target / name}{base}{_adapter_notes(target / name, arguments.rank, error)}")
        print(f"blend: {target}/clp_blend.json")
        return
    if weights is None and len(policy.objectives) > 1:
        raise ConfigError(f"--weights is missing; the objectives are {', '.join(policy.objectives)}")
    policy.conditions(weights, arguments.kl)
    if arguments.merged:
        files.refuse_overlap(target, policy.read_from)
        model = policy.merge(weights, arguments.kl)
        with files.write_directory(target) as temporary:
            model.save_pretrained(temporary)
            if policy.tokenizer is not None:
                policy.tokenizer.save_pretrained(temporary)
            superseded = _superseded(target, temporary)
        for path in superseded:
            path.unlink()
        print(f"model: {target}")
    else:
        error = policy.export_adapter(target, weights, arguments.kl, rank=arguments.rank)
        print(f"adapter: {target}{base}{_adapter_notes(target, arguments.rank, error)}")
    if text := policy.prompt_text(weights, arguments.kl):
        print(f"its prompts need this text in them (see blend.json): {text!r}")


def _superseded(target: Path, new: Path) -> list[Path]:
    """Weights in `target` that transformers would load with, or instead of, the new ones: those of an earlier export. Raises
    ConfigError for an adapter that is not one's."""
    adapter = [target / name for name in ("adapter_config.json", "adapter_model.safetensors", "blend.json")]
    if adapter[0].exists() and not adapter[2].exists():
        raise ConfigError(
            f"{target} holds an adapter (adapter_config.json), which transformers would load with the merged model; remove it, "
            "or give another folder"
        )
    weights = [*target.glob("model.safetensors*"), *target.glob("model-*.safetensors")]
    return [path for path in [*adapter, *weights] if path.is_file() and not (new / path.name).exists()]


def _adapter_notes(path: Path, asked: int | None, error: float) -> str:
    """What to know of an adapter: its rank, what was lost by cutting it, and how vLLM takes it; lines to follow its own."""
    from clp_engine.policy.peft.writing import read_rank, vllm_rank

    rank = read_rank(path)
    lost = "" if asked is None else f", relative error of the deltas {error:.3g}"
    needed = vllm_rank(rank)
    served = "more than vLLM takes" if needed is None else f"for vLLM: --max-lora-rank {needed}"
    return f"\nrank: {rank}{lost} ({served})"


def _compare(arguments: argparse.Namespace) -> int | None:
    from clp_engine.core.yaml_reading import read_file
    from clp_engine.evaluation import compare as comparing
    from clp_engine.evaluation.compare import report as rendering

    config = read_file(arguments.config)
    if arguments.output_dir is not None:
        config["output_dir"] = arguments.output_dir
    only = None if arguments.only is None else [n.strip() for n in arguments.only.split(",") if n.strip()]
    seeds = None if arguments.seeds is None else _whole_numbers(arguments.seeds, "--seeds")
    if arguments.dry_run:
        return print(comparing.describe(comparing.make_plan(config), only, seeds))
    command = shlex.join(["clp-engine", *sys.argv[1:]])
    try:
        comparison = comparing.compare(
            config,
            only=only,
            seeds=seeds,
            jobs=arguments.jobs,
            report_only=arguments.report_only,
            command=command,
        )
    except KeyboardInterrupt:
        raise runs.Interrupted(f"interrupted, nothing is lost; go on with: {command}") from None
    except comparing.CompareFailed as error:
        if error.comparison is not None:
            print(f"\n{rendering.summary(error.comparison)}\n\nreport: {config['output_dir']}/comparison.md")
        print(f"clp-engine: {error}", file=sys.stderr)
        return 1
    print(f"\n{rendering.summary(comparison)}\n\nreport: {config['output_dir']}/comparison.md")


def _whole_numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected whole numbers, such as 0,1") from None


def _info(arguments: argparse.Namespace) -> None:
    from clp_engine.cli.info import collect, render

    training = None if arguments.config is None else _described_training(arguments.config)
    info = collect(training)
    print(json.dumps(info, indent=2) if arguments.json else render(info))


def _described_training(path: str) -> tuple[runs.RunSpec, CLPConfig]:
    """What a configuration file or a run folder trains."""
    if not Path(path).is_dir():
        from clp_engine.core.yaml_reading import read_file

        return _training(read_file(path))
    from clp_engine.training.config import CLPConfig

    spec = runs.RunSpec.load(path)
    if spec is None:
        raise ConfigError(
            f"{path} holds no run.json; give a run folder, or a configuration file that names the model"
        )
    return spec, CLPConfig.from_dict(spec.config)
