"""The groups of cases. Each module has cases(device, sizes) -> list of Case, the first of which is the group's main case.

sizes: "gpu" the shapes of the models below, "cpu" what two cores do in seconds, "tiny" for the benchmarks' own tests.
Groups of whole rollouts and training steps measure themselves (bench.cases.rollout, bench.cases.e2e).
"""

from __future__ import annotations

import importlib
from types import ModuleType

GROUPS = (
    "multi_lora",
    "decode",
    "linear_logprob",
    "logits_logprob",
    "interpolate",
    "sampling",
    "rollout",
    "e2e",
)
SIZES = ("gpu", "cpu", "tiny")


def group(name: str) -> ModuleType:
    return importlib.import_module(f"bench.cases.{name}")
