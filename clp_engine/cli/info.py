"""clp-engine info: versions, devices, kernel back-ends and tasks of this installation, and the memory that a training needs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_engine import __version__
from clp_engine.cli.arguments import training_of
from clp_engine.core import tables
from clp_engine.core.errors import ConfigError
from clp_engine.core.provenance import installed, processor
from clp_engine.training import runs

if TYPE_CHECKING:
    from clp_engine.training.config import CLPConfig

_PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "peft", "matplotlib")
_PARTS = ("base", "deltas", "gradients", "optimizer", "total")  # of `memory.Memory`
_NAMED = 8  # parameters that are listed by name
_WIDTHS = (14, 16, *(12 for _ in _PARTS))  # of the columns in the terminal

HELP = "show versions, devices, kernel back-ends, and what a training would need"
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml|RUN",
        help="a training: its parameters and memory, and those of other conditioning",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> None:
    training = None if arguments.config is None else _described_training(arguments.config)
    info = collect(training)
    print(json.dumps(info, indent=2) if arguments.json else render(info))


def _described_training(path: str) -> tuple[runs.RunSpec, CLPConfig]:
    """The run and the settings in a configuration file or a run folder."""
    if not Path(path).is_dir():
        from clp_engine.core.yaml_reading import read_file

        return training_of(read_file(path))
    from clp_engine.training.config import CLPConfig

    spec = runs.RunSpec.load(path)
    if spec is None:
        raise ConfigError(
            f"{path} holds no run.json; give a run folder, or a configuration file that names the model"
        )
    return spec, CLPConfig.from_dict(spec.config)


def collect(training: tuple[runs.RunSpec, CLPConfig] | None = None) -> dict[str, Any]:
    """The installation as plain data: versions by package (None for a missing one), devices, tasks, and for each back-end
    whether and why it is available. training: a run and its settings, which `describe` describes."""
    import torch
    from clp_kernels import backends

    from clp_engine.core.provenance import source_commit
    from clp_engine.tasks import task_names

    devices = [{"device": "cpu", "name": processor(), "memory_gib": None, "threads": torch.get_num_threads()}]
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
            **{name: installed(name) for name in _PACKAGES},
        },
        "commit": source_commit(),
        "platform": platform.platform(),
        "devices": devices,
        "backends": {b.name: {"available": b.available, "reason": b.reason} for b in backends().values()},
        "forced_backend": os.environ.get("CLP_KERNELS_BACKEND") or None,
        "tasks": list(task_names()),
        "training": None if training is None else describe(*training),
    }


def describe(spec: runs.RunSpec, config: CLPConfig) -> dict[str, Any]:
    """The trained parameters of a run and the memory that stays allocated (see `memory.Memory`), and the same for the other
    forms of conditioning. They follow from the model's configuration; the model itself is not loaded."""
    import torch

    from clp_engine.models import memory
    from clp_engine.models.base import model_location
    from clp_engine.models.targets import unconditioned

    model = memory.skeleton(model_location(spec.model))
    # As the policy will load it: see ConditionedPolicy.from_pretrained's dtype.
    dtype = config.base_dtype or ("auto" if torch.cuda.is_available() and not config.use_cpu else "float32")
    itemsize = None if dtype == "auto" else getattr(torch, dtype).itemsize
    count = len(spec.objectives)

    def plain(cost: memory.Memory) -> dict[str, Any]:
        return {"trained_parameters": cost.trained} | {
            f"{part}_bytes": getattr(cost, part) for part in _PARTS
        }

    chosen = memory.estimate(
        model,
        config.conditioning,
        count,
        carrier=config.carrier,
        rank=config.rank,
        target_modules=config.target_modules,
        base_itemsize=itemsize,
    )
    others = memory.by_conditioning(model, count, rank=config.rank, base_itemsize=itemsize)
    return {
        "model": spec.model,
        "objectives": list(spec.objectives),
        "conditioning": config.conditioning,
        "memory": plain(chosen),
        "by_conditioning": {name: plain(cost) for name, cost in others.items()},
        "never_conditioned": unconditioned(model),
    }


def render(info: dict[str, Any]) -> str:
    """`collect()` as text for people."""
    versions = {name: value or "not installed" for name, value in info["versions"].items()}
    if info["commit"]:
        versions["commit"] = info["commit"]
    lines = ["versions", *_pairs(versions), "devices"]
    for device in info["devices"]:
        more = f"{device['threads']} threads" if device["threads"] else f"{device['memory_gib']} GiB"
        lines += _pairs({device["device"]: f"{device['name']}, {more}"})
    lines += ["kernel back-ends"]
    for name, backend in info["backends"].items():
        lines += _pairs({name: f"{'' if backend['available'] else 'missing: '}{backend['reason']}"})
    if info["forced_backend"]:
        lines.append(f"  CLP_KERNELS_BACKEND={info['forced_backend']} forces one of them")
    lines += ["tasks", f"  {', '.join(info['tasks'])}"]
    if info["training"]:
        lines += ["training", *_rendered_training(info["training"])]
    return "\n".join(lines)


def render_training(spec: runs.RunSpec, config: CLPConfig) -> list[str]:
    """`describe()` as lines of text for people, without the other forms of conditioning."""
    described = describe(spec, config)
    return _rendered_training({**described, "by_conditioning": {}})


def _pairs(values: dict[str, str]) -> list[str]:
    return [f"  {line}" for line in tables.pairs(values, _WIDTHS[0])]


def _rendered_training(training: dict[str, Any]) -> list[str]:
    from clp_engine.core.sizes import size

    forms = {training["conditioning"]: training["memory"]}
    forms |= {name: cost for name, cost in training["by_conditioning"].items() if name not in forms}
    rows = [["", "trained", "model", "deltas", "gradients", "optimiser", "total"]]
    for name, cost in forms.items():
        sizes = [size(cost[f"{part}_bytes"]) for part in _PARTS]
        rows.append([name, f"{cost['trained_parameters']:,}", *sizes])
    lines = [
        f"  {training['model']}, objectives {', '.join(training['objectives'])}; without activations:",
        *(f"  {line}" for line in tables.columns(rows, _WIDTHS)),
    ]
    if never := training["never_conditioned"]:
        more = f" and {len(never) - _NAMED:,} more" if len(never) > _NAMED else ""
        lines += [f"  never conditioned: {', '.join(never[:_NAMED])}{more}"]
    return lines
