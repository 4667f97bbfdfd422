"""clp-engine steer: serve a local page with a slider for each objective."""

from __future__ import annotations

import argparse

from clp_engine.cli.arguments import RUN_HELP, add_device, add_number
from clp_engine.core.ranges import COMMANDS
from clp_engine.training import running

HELP = "open a local page with a slider for each objective"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help=RUN_HELP)
    add_number(parser, COMMANDS, "port", "where to listen; 0 is any that is free", default=8765)
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
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    running.policy_directory(arguments.run_folder)  # a wrong folder is reported before torch is imported
    from clp_engine.serving.app import serve

    serve(
        arguments.run_folder,
        host=arguments.host,
        port=arguments.port,
        allow_remote=arguments.allow_remote,
        browser=not arguments.no_browser,
        device=arguments.device,
        examples=arguments.examples,
    )
