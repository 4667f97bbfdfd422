"""For the documentation: what its pages take from the code and from measurements, put in when the site is built (mkdocs hooks).

<!-- api:PACKAGE -->      a `:::` entry, which mkdocstrings fills, for each public name of clp_engine or clp_kernels
<!-- settings -->         a table of CLPConfig
<!-- command-line -->     the help of clp-engine and each of its commands
<!-- bench:NAME -->       up to <!-- /bench -->, tables of bench/results/NAME.json, as in README.md (bench/pages/readme.py)
<!-- file:PATH -->        a Markdown file of the repository, without its title
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for bench, which is not installed

_MARK = re.compile(r"<!-- (api|settings|command-line|file)(?::(\S+))? -->")


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with each page's source."""
    from bench.pages import readme

    return readme.render(_MARK.sub(lambda match: _FILLED[match[1]](match[2]), markdown))


def public_names(package: str) -> list[str]:
    """Where each public name of a package is defined, dotted, for mkdocstrings, which reads sources."""
    if package == "clp_engine":
        from clp_engine import _WHERE

        return [f"clp_engine.{module}.{name}" for name, module in sorted(_WHERE.items())]
    source = (ROOT / "kernels" / package / "__init__.py").read_text(encoding="utf-8")
    found = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [found[name] for name in importlib.import_module(package).__all__]


def _api(package: str) -> str:
    return "\n\n".join(f"::: {name}" for name in public_names(package))


def _settings(_) -> str:
    from clp_engine.core.ranges import TRAINING
    from clp_engine.core.tables import compact
    from clp_engine.training.settings.config import CLPConfig

    rows = []
    for option in sorted(dataclasses.fields(CLPConfig), key=lambda option: option.kw_only):
        kind = option.type.replace(" | ", "` or `")
        numbers = TRAINING[option.name].described if option.name in TRAINING else ""
        text = option.metadata["help"]
        rows.append((f"`{option.name}`", f"`{kind}`", numbers, f"`{option.default}`", text))
    return "\n".join(compact(["setting", "type", "numbers", "default", ""], rows))


def _command_line(_) -> str:
    from clp_engine.cli import main

    parser = main._parser([])
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    sections = [f"```text\n{parser.format_help()}```"]
    for name, sub in commands.choices.items():
        sections.append(f"## clp-engine {name}\n\n```text\n{sub.format_help()}```")
    return "\n\n".join(sections)


def _file(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[2]


_FILLED = {"api": _api, "settings": _settings, "command-line": _command_line, "file": _file}
