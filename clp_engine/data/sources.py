"""Prompts and reward functions from the names a user gives: a file, or a function of a module."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clp_engine.core.errors import ConfigError


def load_reward(spec: str) -> Callable | str:
    """The function named by 'module:function' or 'file.py:function', also looked for in the current folder.

    A spec without a colon is the name or path of a sequence classifier and is returned unchanged. Raises ConfigError if the
    module cannot be imported or has no such function.
    """
    module_name, colon, function = spec.rpartition(":")
    if not colon:
        return spec
    try:
        module = _import(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(f"reward {spec!r}: cannot import {module_name} ({error})") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        raise ConfigError(f"reward {spec!r}: {module_name} has no function {function!r}")
    return reward


def _import(name: str):
    if not name.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # Python does not search there for a console script
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, or of any other text file with one prompt per line.

    Raises ConfigError naming the line that cannot be read.
    """
    try:
        # Lines end at newlines only: splitlines() would also cut texts at U+2028, U+0085 and form feeds.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an impossible path
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path} is empty")
    if Path(path).suffix not in (".jsonl", ".json"):
        return [{"prompt": line} for _, line in numbered]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(row, dict) or "prompt" not in row:
            raise ConfigError(f"{path}, line {number}: expected an object with a 'prompt'")
        rows.append(row)
    return rows
