"""Completions that another program drew whole, as lists, made into a Rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clp_engine.rollouts.types import Rollout, RolloutRequest


def of_lists(
    request: RolloutRequest,
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    ended: Sequence[bool],
    engine: str,
) -> Rollout:
    """tokens, logprobs: of each of the B completions, as many of both. ended: by an end token or a stop string."""
    device, lengths = request.source.conditioned.device, torch.tensor([len(row) for row in tokens])
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths.unsqueeze(-1)
    ids = torch.full(mask.shape, request.source.profile.pad_token_id, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in tokens for token in row], dtype=torch.long)
    values = torch.zeros(mask.shape)
    values[mask] = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32)
    terminated = torch.tensor(list(ended), dtype=torch.bool)
    return request.rollout(*(t.to(device) for t in (ids, mask, values, terminated)), engine)
