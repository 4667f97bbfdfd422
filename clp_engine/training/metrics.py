"""Numbers of a training step under TRL's names, plus ours: rewards by objective and by weight, KL, phase times."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.rollouts.types import Rollout

# Bins of w_i in which an objective's mean reward is logged: a policy that heeds w has more of it in the higher bins.
WEIGHT_BINS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))


class PhaseTimer:
    """Seconds spent in named phases of a step."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronise = torch.cuda.synchronize if device.type == "cuda" else None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronise:
                self._synchronise()
            self.seconds[phase] += time.perf_counter() - start


def read_scalars(scalars: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """The numbers of one device on the host, in one transfer."""
    tensors = {name: value.detach() for name, value in scalars.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        return dict(scalars)
    read = dict(zip(tensors, torch.stack([t.double() for t in tensors.values()]).tolist()))
    return {name: read.get(name, value) for name, value in scalars.items()}


class MetricLog:
    """Means of each metric over the steps since the last `drain`."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isnan(value):
                self._values[name].append(float(value))

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._values = defaultdict(list, state)

    def drain(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """completions/{mean,min,max}_length in tokens that the policy wrote, the same of those that ended, 0 where none did;
    clipped_ratio: the share that did not."""
    lengths = rollout.counts[1] if rollout.written is None else rollout.trained.sum(-1).cpu()
    lengths, terminated = lengths.float(), rollout.terminated.cpu()
    result = {f"completions/{kind}_length": value for kind, value in _spread(lengths).items()}
    ended = lengths[terminated]
    ended = ended if len(ended) else torch.zeros(1)
    result |= {f"completions/{kind}_terminated_length": value for kind, value in _spread(ended).items()}
    return result | {"completions/clipped_ratio": 1 - terminated.float().mean().item()}


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def reward_metrics(
    names: Sequence[str], rewards: torch.Tensor, scalar: torch.Tensor, conditions: Conditions, group: int
) -> dict[str, float]:
    """rewards/{name}/{mean,std,missing}, rewards/{name}/weight_{low}_{high}, reward (w.R), reward_std and frac_reward_zero_std.

    missing: the share of rows without a reward. rewards: (B, M), NaN = does not apply; scalar: (B,) w.R; conditions: B rows. As
    TRL does, reward and reward_std are those of all rows together, and standard deviations have n - 1 in the denominator.
    """
    result = {}
    for i, name in enumerate(names):
        values, present = rewards[:, i], ~rewards[:, i].isnan()
        given = values[present]
        result[f"rewards/{name}/mean"] = given.mean().item()
        result[f"rewards/{name}/std"] = _std(given)
        result[f"rewards/{name}/missing"] = 1 - len(given) / len(values)
        for low, high in WEIGHT_BINS:
            weight = conditions.weights[:, i]
            inside = present & (weight >= low) & ((weight <= high) if high == 1 else (weight < high))
            if bool(inside.any()) and len(names) > 1:
                result[f"rewards/{name}/weight_{low:.2f}_{high:.2f}"] = values[inside].mean().item()
    groups = scalar.view(-1, group)
    spread = groups.std(-1, unbiased=False)
    return result | {
        "reward": scalar.nanmean().item(),
        "reward_std": _std(scalar[~scalar.isnan()]),
        "frac_reward_zero_std": (spread == 0).float().mean().item(),
    }


def _std(values: torch.Tensor) -> float:
    return values.std().item() if len(values) > 1 else math.nan
