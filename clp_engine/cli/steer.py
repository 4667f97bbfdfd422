"""clp-engine steer: serve a local page with a slider for each objective."""

from __future__ import annotations

import argparse

from clp_engine.cli.arguments import RUN_HELP, add_address, add_device, add_number, need_server
from clp_engine.core.errors import ConfigError
from clp_engine.core.ranges import COMMANDS
from clp_engine.training import running

HELP = "open a local page with a slider for each objective"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--examples",
        metavar="FILE",
        help="prompts to choose from on the page (default: those of your own run, or in its folder)",
    )
    parser.add_argument(
        "--vllm",
        metavar="ADDRESS",
        help="let this vLLM server complete, as http://localhost:8000 (with the plug-in)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="with --vllm: the run's stack there (default: the server's only adapter)",
    )
    text = "the most tokens of a prompt, as far as the model has room; not with --vllm"
    add_number(parser, COMMANDS, "max_prompt_tokens", text, default=4096)
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    add_address(parser, 8765)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    running.policy_directory(arguments.run_folder)  # a wrong folder is reported before torch is imported
    need_server("steer")
    from clp_engine.serving.from_vllm import FromVllm
    from clp_engine.serving.served import Limits, Served, Source
    from clp_engine.serving.server import serve

    if arguments.model is not None and arguments.vllm is None:
        raise ConfigError(
            "--model names a stack on a vLLM server; give --vllm ADDRESS as well, or leave it out"
        )

    def source() -> Source:
        if arguments.vllm is not None:
            return FromVllm(arguments.run_folder, arguments.vllm, arguments.model)
        limits = Limits(8, 32, arguments.max_prompt_tokens, max_new_tokens=2048)
        return Served(arguments.run_folder, arguments.device, limits)

    serve(
        arguments.run_folder,
        source,
        host=arguments.host,
        port=arguments.port,
        allow_remote=arguments.allow_remote,
        page=True,
        browser=not arguments.no_browser,
        examples=arguments.examples,
    )
