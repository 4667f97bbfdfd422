"""Flags and configuration that several commands share, and the functions that read their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from clp_engine.core.errors import ConfigError
from clp_engine.core.ranges import COMMANDS, EVALUATION, SAMPLING, Range
from clp_engine.training.runs import run_spec

if TYPE_CHECKING:
    from clp_engine.rollouts.types import SamplingParams
    from clp_engine.training.settings.config import CLPConfig

RUN_HELP = "run folder (or a policy folder or checkpoint in it)"
WEIGHTS_HELP = "a=0.7,b=0.3, or 0.7,0.3 in the order of the objectives"


def in_range(values: Range) -> Callable[[str], float]:
    """A `type` for argparse: it reads a number and checks it against the range."""

    def read(text: str) -> float:
        try:
            return values.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def add_number(
    parser: argparse._ActionsContainer,
    table: Mapping[str, Range],
    name: str,
    help: str,
    *,
    default: float | None = None,
    metavar: str | None = None,
) -> None:
    """Add a flag for a number in the range `table[name]`. The help text ends with the default, if there is one."""
    parser.add_argument(
        "--" + name.replace("_", "-"),
        type=in_range(table[name]),
        default=default,
        metavar=metavar or ("N" if table[name].kind is int else "X"),
        help=help if default is None else f"{help} (default: {default})",
    )


def add_kl(parser: argparse.ArgumentParser) -> None:
    """Add --kl, the KL coefficient."""
    add_number(parser, EVALUATION, "kl", "KL coefficient, for policies conditioned on it")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add --host, --port and --allow-remote of a server."""
    add_number(parser, COMMANDS, "port", "where to listen; 0 is any that is free", default=port)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --host be one that other machines reach; without an API key nothing asks them for a password",
    )


def need_server(command: str) -> None:
    """Raises ConfigError if a library of the extra `serve` is missing."""
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"clp-engine {command} needs {' and '.join(missing)}: pip install 'clp-engine[serve]'"
        )


def listed(text: str | None) -> list[str] | None:
    """The list ['a', 'b'] of the text 'a, b'. None gives None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def add_sampling(parser: argparse.ArgumentParser, table: Mapping[str, Range]) -> None:
    """Add the flags of sampling. table: holds the range of the seed."""
    for name, text in (
        ("max_new_tokens", "the most tokens of a completion (default: as in training, or 128)"),
        ("temperature", "0 is greedy (default: as in training, or 1)"),
        ("top_k", "draw from the k likeliest tokens"),
        ("top_p", "draw from the nucleus of this mass"),
    ):
        add_number(parser, SAMPLING, name, text)
    add_number(parser, table, "seed", "seed of all random numbers", default=0)
    add_device(parser)


def sampling_params(arguments: argparse.Namespace, spec: run_spec.RunSpec | None) -> SamplingParams:
    """The sampling that the flags ask for. A missing flag takes the value of the training of `spec`, or a default."""
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


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust-run, which lets the code of another person's run be executed."""
    parser.add_argument(
        "--trust-run",
        action="store_true",
        help="execute the reward functions and read the files that the run.json of another person's run names",
    )


def whole_numbers(text: str, flag: str) -> list[int]:
    """The list [0, 1] of the text '0,1'. Raises ConfigError that names the flag for another text."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected whole numbers, such as 0,1") from None


def training_of(values: dict[str, Any]) -> tuple[run_spec.RunSpec, CLPConfig]:
    """The run and its settings, from the content of a configuration file."""
    from clp_engine.training.settings.config import CLPConfig

    about = {name: values.get(name) for name in run_spec.RUN_KEYS}
    values = {name: value for name, value in values.items() if name not in about}
    CLPConfig.from_dict(values)  # a wrong setting is reported before anything is loaded
    spec = run_spec.RunSpec.from_values(about)
    if spec.task is not None:
        task = run_spec.find_task(spec.task)
        values = {
            "max_completion_length": task.max_completion_length,
            "max_prompt_length": task.max_prompt_length,
            **values,
        }
    return spec, CLPConfig.from_dict(values)
