"""Numbers of the update of a step: loss, KL, and how far the policy is from the one that sampled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clp_engine.objectives.coefficients import Coefficients
from clp_engine.rollouts.types import Rollout
from clp_engine.training.metrics import read_scalars
from clp_engine.training.parallel.processes import Parallel

if TYPE_CHECKING:
    from clp_engine.training.stepping.update import MicroBatchResult


CLIP_RATIOS = tuple(
    f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
)


def clip_ratios(passes: Sequence[tuple[Rollout, Coefficients]], tokens: int) -> dict[str, torch.Tensor]:
    """Shares of the `tokens` whose ratio was clipped: from below, from above, either; and the least share from below and the
    largest from above of any completion."""
    parts = [c for _, c in passes]
    shares = [part.tokens / tokens for part, _ in passes]
    low, high = (
        sum(getattr(c, f"clip_{end}") * share for c, share in zip(parts, shares)) for end in ("low", "high")
    )
    least = torch.stack([c.clip_low_min for c in parts]).amin()
    largest = torch.stack([c.clip_high_max for c in parts]).amax()
    return dict(zip(CLIP_RATIOS, (low, least, high, largest, low + high)))


def update_metrics(
    passes: Sequence[tuple[Rollout, MicroBatchResult]], rows: int, tokens: int, on_policy: bool
) -> dict[str, torch.Tensor | float]:
    """Means over the step's `rows` completions, which have `tokens` tokens; `passes` are the micro-batches of this process, and
    what they lack of a mean the others have (`of_all`). on_policy: the policy is the one that sampled them; then also how far
    training is from what rollout said, otherwise what was clipped. With importance weights also these.

    Scalars that are still where they were computed, for the caller to read at once.
    """
    if not passes:  # more processes than groups
        return {}
    found = {
        "loss": sum(r.loss for _, r in passes),
        "entropy": sum(r.entropy.sum(dtype=torch.float64) for _, r in passes) / tokens,
    }
    if all(r.kl is not None for _, r in passes):
        kl = sum(r.kl.sum(dtype=torch.float64) for _, r in passes)
        found |= {"kl": kl / tokens, "kl_sequence": kl / max(rows, 1)}
    if not on_policy:
        found |= clip_ratios([(part, r.coefficients) for part, r in passes], tokens)
    else:
        found |= dict.fromkeys(CLIP_RATIOS, 0.0)  # the ratio is one by construction: TRL logs as much
        found |= _gap(
            [(p, r.logprob, p.logprobs if p.sampled is None else p.sampled) for p, r in passes], tokens
        )
    if passes[0][1].coefficients.importance is not None:
        found |= _importance([(p, r.coefficients.importance) for p, r in passes], tokens)
    return found


def _gap(
    passes: Sequence[tuple[Rollout, torch.Tensor, torch.Tensor]], tokens: int
) -> dict[str, torch.Tensor]:
    """How far the log-probs of training are from those of sampling, (B, T) both, by token; NaN is unknown and left out."""
    gaps = [
        torch.where(part.trained, (own - drawn).abs().nan_to_num(nan=0.0), 0.0) for part, own, drawn in passes
    ]
    return {
        "sampling/sampling_logp_difference/mean": sum(gap.sum(dtype=torch.float64) for gap in gaps) / tokens,
        "sampling/sampling_logp_difference/max": torch.stack([gap.amax() for gap in gaps]).amax(),
    }


def _importance(passes: Sequence[tuple[Rollout, torch.Tensor]], tokens: int) -> dict[str, torch.Tensor]:
    """Of the weights by token, (B, T), that another engine's completions were given."""
    total = sum(torch.where(p.trained, w, 0.0).sum(dtype=torch.float64) for p, w in passes)
    least = [torch.where(p.trained, w, math.inf).amin() for p, w in passes]
    largest = [torch.where(p.trained, w, 0.0).amax() for p, w in passes]
    return {
        "sampling/importance_sampling_ratio/mean": total / tokens,
        "sampling/importance_sampling_ratio/min": torch.stack(least).amin(),
        "sampling/importance_sampling_ratio/max": torch.stack(largest).amax(),
    }


def of_all(
    parallel: Parallel, found: dict[str, torch.Tensor | float], learned: list[Any], device: torch.device
) -> tuple[dict[str, torch.Tensor | float], list[Any]]:
    """The metrics of the whole step from those of each process, and what the objective learned from every micro-batch.

    A name that ends with "min" or "max" is the least or the largest of all; of any other the processes have a part of a sum.
    Raises RuntimeError, everywhere, where the loss of a process is not finite.
    """
    if parallel.count == 1:
        return found, learned
    parts = parallel.gather((read_scalars(found), _moved(learned, torch.device("cpu"))))
    values: dict[str, list[float]] = {}
    for rank, (scalars, _) in enumerate(parts):
        if not math.isfinite(scalars.get("loss", 0.0)):
            raise RuntimeError(
                f"the loss of process {rank} is {scalars['loss']}: a reward or log-prob is not finite there, or the learning "
                "rate is too high; the parameters are those of the step before"
            )
        for name, value in scalars.items():
            values.setdefault(name, []).append(value)
    whole = {
        name: min(v) if name.endswith("min") else max(v) if name.endswith("max") else math.fsum(v)
        for name, v in values.items()
    }
    return whole, [_moved(one, device) for _, of_rank in parts for one in of_rank]


def _moved(value: Any, device: torch.device) -> Any:
    """The tensors inside a value, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return dataclasses.replace(value, **{name: _moved(one, device) for name, one in fields})
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if isinstance(value, list | tuple) else value
