"""clp-engine generate: print completions of prompts at a weighting of the objectives."""

from __future__ import annotations

import argparse
import json
import sys

from clp_engine.cli.arguments import (
    RUN_HELP,
    WEIGHTS_HELP,
    add_kl,
    add_number,
    add_sampling,
    sampling_params,
)
from clp_engine.core.errors import ConfigError
from clp_engine.core.ranges import COMMANDS, GENERATION, parse_assignments
from clp_engine.data import sources
from clp_engine.training import running
from clp_engine.training.runs import run_spec

HELP = "generate text at a weighting of the objectives"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--weights", help=f"{WEIGHTS_HELP} (default: equal)")
    add_kl(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="one prompt; - reads it from the standard input")
    given.add_argument("--prompts", metavar="FILE", help="one prompt per line, or JSON lines with prompts")
    add_number(given, COMMANDS, "examples", "N held-out documents of the run's task (without a prompt: 3)")
    add_number(parser, GENERATION, "num_return_sequences", "completions per prompt", default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    add_sampling(parser, GENERATION)


def run(arguments: argparse.Namespace) -> None:
    weights = None if arguments.weights is None else parse_assignments(arguments.weights, "weights")
    spec = run_spec.RunSpec.find(arguments.run_folder)
    policy = running.load_policy(arguments.run_folder, arguments.device)
    policy.conditions(weights, arguments.kl)  # names and numbers are checked before anything is generated
    rows = _generation_rows(arguments, spec, policy.tokenizer)
    sampling = sampling_params(arguments, spec)
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


def _generation_rows(arguments: argparse.Namespace, spec: run_spec.RunSpec | None, tokenizer) -> list[dict]:
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
