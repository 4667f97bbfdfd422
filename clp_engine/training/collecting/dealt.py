"""Completions and rewards of several processes: each does its share, and all end with what one process would have.

Shares are whole groups: a group's completions are compared with each other. What is exchanged is tokens, their log-probs and
rewards; hidden states stay where they are computed, and so does the work on a group after it was drawn (`dealt`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.data.rewards import PendingRewards
from clp_engine.rollouts.scoring import tokens_of_groups
from clp_engine.rollouts.types import Rollout
from clp_engine.training.parallel.dealing import Shares, deal, deal_rows
from clp_engine.training.parallel.processes import Parallel


def drawn_by_all(
    parallel: Parallel,
    token_ids: Sequence[Sequence[int]],
    draw: Callable[[list[int]], Rollout],
    pad_id: int,
    device: torch.device,
) -> Rollout:
    """The completions of all prompts; each process draws its share. draw: draws those of the prompts at some indices.

    Raises DrawingFailed in every process where another program failed one of them.
    """
    if parallel.count == 1:
        return draw(list(range(len(token_ids))))
    shares = deal_rows([len(ids) for ids in token_ids], parallel.count)
    own, failed = shares[parallel.rank], None
    part = None
    try:
        part = _on_host(draw(own)) if own else None
    except DrawingFailed as error:
        failed = str(error)
    found = parallel.gather((_digest(token_ids), part, failed))
    if failures := [failed for *_, failed in found if failed is not None]:
        raise DrawingFailed(failures[0])
    for rank, (digest, *_) in enumerate(found):
        if digest != found[0][0]:
            raise ConfigError(
                f"process {rank} of {parallel.count} reads other prompts than process 0; every process must be given the same "
                "dataset, in the same order, and the same tokenizer"
            )
    return _joined([part for _, part, _ in found], shares, pad_id, device)


def dealt(parallel: Parallel, drawn: Rollout, per_step: int) -> Shares | None:
    """The prompts whose completions each process rewards, scores and trains on: of each optimiser step's `per_step` prompts
    shares with nearly as many tokens, prompts and completions. None for a single process: all."""
    if parallel.count == 1:
        return None
    costs = tokens_of_groups(drawn)
    shares: list[list[int]] = [[] for _ in range(parallel.count)]
    for start in range(0, len(costs), per_step):
        for share, part in zip(shares, deal(costs[start : start + per_step], parallel.count)):
            share += [start + i for i in part]
    return Shares(shares, parallel.rank, parallel.in_step)


@dataclass(frozen=True)
class Rewarded:
    """What reward functions returned of some completions.

    rewards: (rows, M), NaN for those that were not asked here. columns, logged: values of `log_extra` and `log_metric`.
    seconds: of each function; busy: in which one of them ran.
    """

    rewards: torch.Tensor
    columns: dict[str, list] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0

    @classmethod
    def of(cls, pending: PendingRewards) -> Rewarded:
        """Waits for the functions."""
        return cls(pending.result(), pending.columns, pending.logged, pending.seconds, pending.busy)

    @property
    def metrics(self) -> dict[str, float]:
        """Means of the values of `log_metric`."""
        return {name: sum(values) / len(values) for name, values in self.logged.items()}


def rewarded_by_all(
    parallel: Parallel, own: Sequence[tuple[list[int], Rewarded]], rows: int, objectives: int
) -> Rewarded:
    """The rewards of all `rows` completions. own: what was rewarded here, each with the numbers of its rows."""
    parts = [part for of_rank in parallel.gather(list(own)) for part in of_rank]
    rewards, columns = torch.full((rows, objectives), torch.nan), {}
    logged: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for places, part in parts:
        at = torch.tensor(places, dtype=torch.long)
        rewards[at] = torch.where(part.rewards.isnan(), rewards[at], part.rewards)
        for name, values in part.columns.items():
            column = columns.setdefault(name, [None] * rows)
            for place, value in zip(places, values):
                column[place] = value
        for name, values in part.logged.items():
            logged.setdefault(name, []).extend(values)
        for name, spent in part.seconds.items():
            seconds[name] = max(spent, seconds.get(name, 0.0))
    return Rewarded(rewards, columns, logged, seconds, max((p.busy for _, p in parts), default=0.0))


def _digest(token_ids: Sequence[Sequence[int]]) -> int:
    return zlib.crc32(repr([list(ids) for ids in token_ids]).encode())


def _on_host(drawn: Rollout) -> Rollout:
    """Tensors on the CPU, tokens in 32 bits; nothing that was derived."""
    moved = {
        f.name: value.cpu().int() if value.dtype == torch.long else value.cpu()
        for f in dataclasses.fields(drawn)
        if isinstance(value := getattr(drawn, f.name), torch.Tensor)
    }
    return dataclasses.replace(drawn, **moved)


def _joined(
    parts: Sequence[Rollout | None], shares: Sequence[list[int]], pad_id: int, device: torch.device
) -> Rollout:
    """One rollout of the parts, whose prompts were those at the indices of `shares`."""
    drawn = [part for part in parts if part is not None]
    if any(
        part.written is not None for part in drawn
    ):  # the part of a process may have nothing that an environment wrote
        parts = [
            p if p is None or p.written is not None else dataclasses.replace(p, written=p.completion_mask)
            for p in parts
        ]
    there = [(part, torch.tensor(share)) for part, share in zip(parts, shares) if part is not None]
    prompts, group, first = sum(len(share) for _, share in there), there[0][0].group, there[0][0]

    def whole(name: str, rows: int, fill: float, left: bool = False) -> torch.Tensor | None:
        values = [getattr(part, name) for part, _ in there]
        if values[0] is None:
            return None
        width = max(v.shape[1] for v in values) if values[0].dim() > 1 else None
        dtype = torch.long if values[0].dtype == torch.int32 else values[0].dtype
        found = torch.full((prompts * rows, *([] if width is None else [width])), fill, dtype=dtype)
        for value, (_, share) in zip(values, there):
            at = (share.unsqueeze(-1) * rows + torch.arange(rows)).flatten()
            if width is None:
                found[at] = value
            elif left:
                found[at, width - value.shape[1] :] = value.to(dtype)
            else:
                found[at, : value.shape[1]] = value.to(dtype)
        return found.to(device)

    return Rollout(
        whole("prompt_ids", 1, pad_id, left=True),
        whole("prompt_mask", 1, False, left=True),
        whole("completion_ids", group, pad_id),
        whole("completion_mask", group, False),
        whole("logprobs", group, 0.0),
        whole("terminated", group, False),
        whole("plain_ids", 1, pad_id, left=True),
        whole("plain_mask", 1, False, left=True),
        first.engine,
        whole("sampled", group, 0.0),
        whole("written", group, False),
        _columns(there, prompts, group),
    )


def _columns(there: Sequence[tuple[Rollout, torch.Tensor]], prompts: int, group: int) -> dict | None:
    if there[0][0].columns is None:
        return None
    found: dict[str, list] = {}
    for part, share in there:
        rows = [p * group + i for p in share.tolist() for i in range(group)]
        for name, values in part.columns.items():
            column = found.setdefault(name, [None] * (prompts * group))
            for row, value in zip(rows, values):
                column[row] = value
    return found
