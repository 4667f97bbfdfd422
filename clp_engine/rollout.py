"""Sampling completions: one prompt prefill per group, keys and values in buffers allocated once, finished rows dropped.

Rows of one batch may have different conditions; a row whose weights are all zero is the base model. The log-prob of each
token is kept as it was sampled, and row i of prompt p draws from a seed of its own, so that what a row says does not
depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from clp_kernels import sample_tokens

from clp_engine.conditions import Conditions
from clp_engine.errors import ConfigError
from clp_engine.seeds import derive

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy

# Dropping rows copies the cache: worth it once this share of the running rows has finished.
_DROP_SHARE = 0.25


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. temperature 0 is greedy; top_k, top_p, min_p cut the distribution the token is drawn from."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature}: expected 0 (greedy) or more")


@dataclass(frozen=True)
class Rollout:
    """Completions of P prompts, `group` of each, B = P * group; completion b belongs to prompt b // group.

    prompt_ids, prompt_mask: (P, S), left-padded; completion_ids: (B, T) int64, right-padded, the end token included;
    completion_mask: (B, T) bool; logprobs: (B, T) float32, as sampled, at the sampling temperature; terminated: (B,) bool.
    plain_ids, plain_mask: (P, S'), the prompts as the reference reads them, where the policy reads something else (prompt
    conditioning), or None.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logprobs: torch.Tensor
    terminated: torch.Tensor
    plain_ids: torch.Tensor | None = None
    plain_mask: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        return self.completion_mask.sum(-1)

    def prompts(self, start: int, stop: int) -> Rollout:
        """The part of prompts [start, stop), trimmed to the longest prompt and completion in it."""
        rows = slice(start * self.group, stop * self.group)
        mask = self.completion_mask[rows]
        keep = max(int(mask.sum(-1).max()), 1)

        def trimmed(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            skip = mask.shape[1] - int(mask[start:stop].sum(-1).max())
            return ids[start:stop, skip:], mask[start:stop, skip:]

        plain = (None, None) if self.plain_ids is None else trimmed(self.plain_ids, self.plain_mask)
        return Rollout(
            *trimmed(self.prompt_ids, self.prompt_mask),
            self.completion_ids[rows, :keep],
            mask[:, :keep],
            self.logprobs[rows, :keep],
            self.terminated[rows],
            *plain,
        )

    def token_lists(self) -> list[list[int]]:
        """The tokens of each completion without padding, the end token included."""
        return [ids[:n] for ids, n in zip(self.completion_ids.tolist(), self.lengths.tolist())]


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (P, longest)."""
    for i, s in enumerate(sequences):
        if len(s) == 0:
            raise ConfigError(f"prompt {i} has no tokens; every prompt needs at least one")
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    for i, s in enumerate(sequences):
        ids[i, longest - len(s) :] = torch.as_tensor(s, dtype=torch.long)
    lengths = torch.tensor([len(s) for s in sequences]).unsqueeze(-1)
    mask = torch.arange(longest) >= longest - lengths
    return ids.to(device), mask.to(device)


class Decoding(Protocol):
    """A source of the logits that rows draw their tokens from, one token at a time: `rollout` needs no more of a model."""

    def start(self) -> torch.Tensor:
        """(B, V), for the first token of each completion."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(rows, V), for the token after tokens (rows,)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Only these of the present rows (indices, ascending) go on."""


class BlendDecoding:
    """Logits of a policy, each row under its blend.

    prompt_ids, prompt_mask: (P, S), left-padded; blend: (P, D), or None for the base model; room: most tokens to come.
    """

    def __init__(
        self,
        policy: ConditionedPolicy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        blend: torch.Tensor | None,
        group: int,
        room: int,
    ):
        self._backbone, self._in_force, self._blend = policy.backbone, policy.blend, blend
        self._prompts, self._group, self._room = (prompt_ids, prompt_mask), group, room

    def start(self) -> torch.Tensor:
        with self._in_force.use(self._blend):
            hidden, self._context = self._backbone.prefill(*self._prompts)
            logits = self._backbone.head.logits(hidden[:, -1])
        self._context.repeat(self._group, room=self._room)
        if self._blend is not None:
            self._blend = self._blend.repeat_interleave(self._group, 0)
        return logits.repeat_interleave(self._group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._in_force.use(self._blend):
            hidden = self._backbone.extend(self._context, tokens.unsqueeze(1))
            return self._backbone.head.logits(hidden[:, -1])

    def keep(self, rows: torch.Tensor) -> None:
        self._context.select(rows)
        self._blend = None if self._blend is None else self._blend[rows]


@torch.no_grad()
def rollout(
    policy: ConditionedPolicy,
    prompt_ids: Sequence[Sequence[int]],
    conditions: Conditions,
    *,
    num_generations: int = 1,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    row_seeds: torch.Tensor | None = None,
    prompts: Sequence | None = None,
    begun: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Draw `num_generations` completions of each of P prompts, each prompt under its own condition.

    conditions: P rows. row_seeds: (P * num_generations,) int64, one stream of random numbers per completion; by default
    derived from `seed` and the completion's index. Equal row seeds give common random numbers. prompts: what prompt_ids were
    made from, where prompt conditioning has to find its place in chat messages.

    begun: of the one completion of each prompt (num_generations=1), the tokens that are there already. It goes on after them,
    read as a part of the prompt, with the random numbers of the positions that follow; only what follows is returned.
    """
    sampling = sampling or SamplingParams()
    if len(conditions) != len(prompt_ids):
        raise ValueError(
            f"conditions has {len(conditions)} rows for {len(prompt_ids)} prompts; expected one per prompt"
        )
    if begun is not None and num_generations != 1:
        raise ValueError(f"begun continues one completion per prompt; got num_generations={num_generations}")
    device = policy.device
    shown = policy.shown_prompts(prompt_ids, conditions, prompts)
    if begun is not None:
        shown, prompt_ids = (
            None if ids is None else [[*prompt, *tokens] for prompt, tokens in zip(ids, begun, strict=True)]
            for ids in (shown, prompt_ids)
        )
    plain = pad_left(prompt_ids, policy.pad_token_id, device)
    read_ids, read_mask = plain if shown is None else pad_left(shown, policy.pad_token_id, device)
    rows, steps = len(prompt_ids) * num_generations, sampling.max_new_tokens
    if row_seeds is None:
        row_seeds = derive(seed, torch.arange(rows))
    row_seeds = row_seeds.to(device)
    position = torch.tensor([len(b) for b in begun or [()] * rows], device=device)  # of the first token drawn

    decoding = policy.decoding(read_ids, read_mask, conditions, num_generations, steps)
    logits = decoding.start()

    tokens = torch.full((rows, steps), policy.pad_token_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, steps, device=device)
    lengths = torch.full((rows,), steps, dtype=torch.long, device=device)
    terminated = torch.zeros(rows, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(policy.stop_token_ids, device=device)

    # `running` holds the rows still in the batch; `done` those of them that have ended but were not dropped yet.
    running = torch.arange(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(steps):
        drawn, drawn_logprob = sample_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seeds=derive(row_seeds, position + step),
        )
        live = ~done
        tokens[running, step] = torch.where(live, drawn, policy.pad_token_id)
        logprobs[running, step] = torch.where(live, drawn_logprob, 0.0)
        ended = live & torch.isin(drawn, stop_ids)
        lengths[running] = torch.where(ended, step + 1, lengths[running])
        terminated[running] = terminated[running] | ended
        done = done | ended
        if step + 1 == steps:
            break
        finished = int(done.sum())
        if finished == len(running):
            break
        if finished >= _DROP_SHARE * len(running):
            keep = (~done).nonzero().squeeze(-1)
            decoding.keep(keep)
            running, drawn, row_seeds, done = running[keep], drawn[keep], row_seeds[keep], done[keep]
            position = position[keep]
        logits = decoding.step(drawn)

    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(-1)
    return Rollout(
        read_ids,
        read_mask,
        tokens[:, :longest],
        mask,
        logprobs[:, :longest],
        terminated,
        *((None, None) if shown is None else plain),
    )
