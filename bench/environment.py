"""What a measurement was made on: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree, with "+" where it has uncommitted changes; None outside a checkout."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def describe(more_versions: dict[str, str] | None = None) -> dict:
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    )
    packages = ("torch", "transformers", "peft", "triton", "numpy")
    return {
        "device": device,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {p: _version(p) for p in packages} | (more_versions or {}),
    }
