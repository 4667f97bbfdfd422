"""The command line: it finds the command and runs it. A mistake of the user gives one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import time
from collections.abc import Sequence

# torch and transformers take seconds to import: only commands that use them do.
from clp_engine import __version__
from clp_engine.cli import compare, demo, evaluate, export, generate, info, serve, steer, train, variance
from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.training import running

# A command is a module with HELP, EPILOG, `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "variance": variance,
    "generate": generate,
    "steer": steer,
    "serve": serve,
    "export": export,
    "compare": compare,
    "info": info,
}
_PATIENCE = 5.0  # seconds
_EPILOG = """\
examples:
  clp-engine demo                                     train and show a steerable summariser
  clp-engine train CONFIG.yaml --learning-rate 3e-4   every key of the file is a flag, too
  clp-engine evaluate runs/demo                       Pareto front: report.json, report.md, pareto.png
  clp-engine variance runs/mine                       noise and bias of the gradient at each checkpoint
  clp-engine generate runs/demo --weights coverage=0.7,brevity=0.3 --prompt "Return the sum of ..."
  clp-engine steer runs/demo                          a page with a slider for each objective
  clp-engine serve runs/demo                          OpenAI's API with a weighting per request
  clp-engine export runs/demo --weights coverage=0.7,brevity=0.3 --to adapter
  clp-engine export runs/demo --each --to adapters    an adapter per objective, for peft
  clp-engine compare CONFIG.yaml                      methods and baselines over seeds, in one report

exit codes: 0 done, 1 an error of the engine, 2 a mistake in what was asked, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. It takes no abbreviated flags, so that a new flag breaks no script."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str):
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def refuse(self, unknown: Sequence[str]) -> None:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _with_hyphens(argument: str) -> str:
    """The flag with hyphens for underscores: --learning-rate=0.001 for --learning_rate=0.001, the name of the setting."""
    if not argument.startswith("--"):
        return argument
    flag, *value = argument.split("=", 1)
    return "=".join([flag.replace("_", "-"), *value])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names, by default that of the process. Returns the exit code."""
    argv = [_with_hyphens(a) for a in (sys.argv[1:] if argv is None else argv)]
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes, the main one says what they do
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
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
    except (ConfigError, DrawingFailed) as error:
        if debug:
            raise
        return _complain(f"error: {_one_line(error)}", 2, getattr(error, "of_one_process", False))
    except BrokenPipeError:
        # Whoever read the output has seen enough (| head). Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.filename is None:
            raise
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "; make room: what was written before is whole, and training goes on with --resume"
            if room
            else ""
        )
        return _complain(f"error: {error.filename}: {error.strerror}{remedy}", 2)
    except running.Interrupted as error:
        return _complain(str(error), 130)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(message: str, code: int, of_one: bool = False) -> int:
    """of_one: of several processes this one alone says it. Otherwise it waits for the main one, which mostly fails alike; the
    launcher then ends this one."""
    if not of_one and int(os.environ.get("RANK", "0")) > 0:
        time.sleep(_PATIENCE)
    print(f"clp-engine: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands. Only `clp-engine train` gets the flags of CLPConfig, whose import takes torch."""
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
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=command.EPILOG,
            parents=[common],
            formatter_class=formatter,
        )
        sub.set_defaults(run=command.run, parser=sub)
        if command is not train or asked == "train":
            command.add_arguments(sub)
    return parser
