"""clp-engine variance: measure the noise and bias of each estimator's gradient at the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from clp_engine.cli.arguments import add_number, add_trust, listed
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import check_folder
from clp_engine.core.ranges import COMMANDS
from clp_engine.training.runs import run_folder, run_spec

HELP = "measure the noise and bias of the gradient along a run"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder; each of its checkpoints is measured")
    add_number(parser, COMMANDS, "batches", "batches for each checkpoint", default=16)
    add_number(parser, COMMANDS, "completions", "completions of a batch (default: those of a training step)")
    parser.add_argument(
        "--steps", metavar="A,B", help="which checkpoints, 0 for the start (default: the start and all)"
    )
    parser.add_argument("--estimators", metavar="A,B", help="which KL estimators (default: all)")
    parser.add_argument(
        "--baselines", metavar="A,B", help="which baselines (default: all; value where the run has it)"
    )
    add_number(parser, COMMANDS, "bootstrap", "resamples for the intervals", default=1000)
    add_number(parser, COMMANDS, "seed", "seed of the batches", default=0)
    parser.add_argument(
        "--out", metavar="FILE", help="where to write the numbers (default: RUN/variance.json)"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    try:
        steps = None if arguments.steps is None else [int(part) for part in listed(arguments.steps)]
    except ValueError:
        raise ConfigError(f"steps={arguments.steps!r}: expected step numbers such as 0,100,200") from None
    out = str(Path(arguments.run_folder) / "variance.json") if arguments.out is None else arguments.out
    if arguments.out is not None:
        if Path(out).is_dir():
            raise ConfigError(f"out={out!r} is a folder; expected a file to write")
        check_folder("out", Path(out).parent)
    run_spec.RunSpec.load(
        arguments.run_folder
    )  # a file that cannot be read is reported before torch is imported
    from clp_engine.evaluation import gradient_noise

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
