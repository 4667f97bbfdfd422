"""clp-engine serve: an OpenAI-compatible server in which each request chooses its weighting."""

from __future__ import annotations

import argparse
import os

from clp_engine.cli.arguments import RUN_HELP, add_address, add_device, add_number, need_server
from clp_engine.core.errors import ConfigError
from clp_engine.core.ranges import COMMANDS
from clp_engine.training import running

HELP = "serve a policy over OpenAI's API, with a weighting per request"
EPILOG = None
KEY = "CLP_ENGINE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    add_address(parser, 8000)
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the key that clients send (default: ${KEY}, or none)"
    )
    for name, text, default in (
        ("max_rows", "the most completions that are decoded together", 32),
        ("queue", "the most completions that wait; further requests are answered with status 429", 256),
        ("max_prompt_tokens", "the most tokens of a prompt, as far as the model has room", 4096),
        (
            "max_new_tokens",
            "the most tokens of a completion; buffers are allocated for --max-rows of them",
            1024,
        ),
    ):
        add_number(parser, COMMANDS, name, text, default=default)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    running.policy_directory(arguments.run_folder)  # a wrong folder is reported before torch is imported
    api_key = os.environ.get(KEY) if arguments.api_key is None else arguments.api_key
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
    ):
        raise ConfigError("the API key is empty, has blanks around it, or characters that no header can hold")
    need_server("serve")
    from clp_engine.serving.served import Limits, Served
    from clp_engine.serving.server import serve

    limits = Limits(
        arguments.max_rows, arguments.queue, arguments.max_prompt_tokens, arguments.max_new_tokens
    )
    serve(
        arguments.run_folder,
        lambda: Served(arguments.run_folder, arguments.device, limits),
        host=arguments.host,
        port=arguments.port,
        allow_remote=arguments.allow_remote,
        api_key=api_key,
    )
