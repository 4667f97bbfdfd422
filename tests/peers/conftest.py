"""Tests against the real libraries of requirements*.txt. One whose library is missing is skipped, but not in `make peers`."""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

# Nothing here may ask a network for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def pinned() -> dict[str, str]:
    """Version by package, of both lists."""
    lines = [
        line
        for file in Path(__file__).parent.glob("requirements*.txt")
        for line in file.read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def pytest_configure(config):
    if os.environ.get("CLP_PEERS") != "required" or hasattr(config, "workerinput"):
        return
    missing = []
    for name, version in pinned().items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or re.sub(r"\+.*", "", found) != version:
            missing.append(f"{name}=={version} (found {found})")
    if missing:
        raise pytest.UsageError(f"CLP_PEERS=required, but there is no {', '.join(missing)}")
