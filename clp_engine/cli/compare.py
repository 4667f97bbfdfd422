"""clp-engine compare: train and evaluate methods and baselines over seeds, and write one report of them."""

from __future__ import annotations

import argparse
import shlex
import sys

from clp_engine.cli.arguments import add_number, whole_numbers
from clp_engine.core.ranges import COMMANDS
from clp_engine.training import running

HELP = "compare methods and baselines over seeds"
EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="methods, seeds, budget and shared settings")
    parser.add_argument("--output-dir", metavar="DIR", help="instead of the file's output_dir")
    parser.add_argument(
        "--only", metavar="A,B", help="do these methods alone; the report covers what is there"
    )
    parser.add_argument("--seeds", metavar="0,1", help="do these of the file's seeds alone")
    add_number(parser, COMMANDS, "jobs", "processes, each with its share of the cores", default=1)
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done and what is done already"
    )


def run(arguments: argparse.Namespace) -> int | None:
    from clp_engine.core.yaml_reading import read_file
    from clp_engine.evaluation import compare as comparing
    from clp_engine.evaluation.compare import report as rendering

    config = read_file(arguments.config)
    if arguments.output_dir is not None:
        config["output_dir"] = arguments.output_dir
    only = None if arguments.only is None else [n.strip() for n in arguments.only.split(",") if n.strip()]
    seeds = None if arguments.seeds is None else whole_numbers(arguments.seeds, "--seeds")
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
        raise running.Interrupted(f"interrupted, nothing is lost; go on with: {command}") from None
    except comparing.CompareFailed as error:
        if error.comparison is not None:
            print(f"\n{rendering.summary(error.comparison)}\n\nreport: {config['output_dir']}/comparison.md")
        print(f"clp-engine: {error}", file=sys.stderr)
        return 1
    print(f"\n{rendering.summary(comparison)}\n\nreport: {config['output_dir']}/comparison.md")
