"""What this installation is made of: versions, devices, kernel back-ends, tasks."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from clp_engine import __version__

_PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "peft", "matplotlib")


def collect() -> dict[str, Any]:
    """Plain data: versions by package (None where missing), devices, back-ends with availability and reason,
    tasks."""
    import torch
    from clp_kernels import backends

    from clp_engine.evaluation import source_commit
    from clp_engine.tasks import task_names

    devices = [
        {"device": "cpu", "name": _processor(), "memory_gib": None, "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "threads": None,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "versions": {
            "clp_engine": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "commit": source_commit(),
        "platform": platform.platform(),
        "devices": devices,
        "backends": {b.name: {"available": b.available, "reason": b.reason} for b in backends().values()},
        "forced_backend": os.environ.get("CLP_KERNELS_BACKEND") or None,
        "tasks": list(task_names()),
    }


def render(info: dict[str, Any]) -> str:
    """`collect()` for people."""
    lines = ["versions"]
    lines += [f"  {name:<14}{value or 'not installed'}" for name, value in info["versions"].items()]
    if info["commit"]:
        lines.append(f"  {'commit':<14}{info['commit']}")
    lines += ["devices"]
    for device in info["devices"]:
        more = f"{device['threads']} threads" if device["threads"] else f"{device['memory_gib']} GiB"
        lines.append(f"  {device['device']:<14}{device['name']}, {more}")
    lines += ["kernel back-ends"]
    for name, backend in info["backends"].items():
        lines.append(f"  {name:<14}{'' if backend['available'] else 'missing: '}{backend['reason']}")
    if info["forced_backend"]:
        lines.append(f"  CLP_KERNELS_BACKEND={info['forced_backend']} forces one of them")
    lines += ["tasks", f"  {', '.join(info['tasks'])}"]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()
