"""clp-engine train: train a conditioned policy as a configuration file, flags, or both say."""

from __future__ import annotations

import argparse
import shlex
import sys

from clp_engine.cli.arguments import training_of
from clp_engine.core.files import check_folder
from clp_engine.core.ranges import TRAINING
from clp_engine.training import running
from clp_engine.training.runs import run_folder, run_spec

HELP = "train a conditioned policy"
EPILOG = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    import dataclasses

    from clp_engine.training.settings.config import CLPConfig

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
    for option in sorted(dataclasses.fields(CLPConfig), key=lambda option: option.kw_only):
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


def run(arguments: argparse.Namespace) -> None:
    import dataclasses

    from clp_engine.core.yaml_reading import read_file, read_flag
    from clp_engine.training.settings.config import CLPConfig

    values = read_file(arguments.config) if arguments.config else {}
    own = {f.name for f in dataclasses.fields(CLPConfig)}
    for name, value in vars(arguments).items():
        if value is not None and name in own:
            values[name] = value if isinstance(value, bool) else read_flag(value, CLPConfig, name)
    given = {name: getattr(arguments, name) for name in run_spec.RUN_KEYS}
    spec, config = training_of(values | {name: value for name, value in given.items() if value is not None})
    check_folder("output_dir", config.output_dir)
    # Before anything is loaded. Training looks again when it has the folder to itself.
    if not arguments.resume:
        run_folder.check_free(config.output_dir, "a new one", config.overwrite_output_dir)
    from clp_engine.cli.info import render_training

    print("\n".join(render_training(spec, config)))
    aside = ("--overwrite", "--overwrite-output-dir", "--overwrite_output_dir", "--resume")
    words = [word for word in sys.argv[1:] if word not in aside]
    again = shlex.join(["clp-engine", *words, "--resume"])
    running.train(spec, config, resume=arguments.resume, again=again)
    print(f"policy: {config.output_dir}/policy\nnext:   clp-engine evaluate {config.output_dir}")
