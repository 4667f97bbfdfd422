"""What a rollout is asked for, what it is drawn from, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from clp_kernels import TokenStats

from clp_engine.core import ranges
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError, shown
from clp_engine.data.positions import Room
from clp_engine.models.backbones.packing import Packed, pack
from clp_engine.models.conditioned import ConditionedModel

OWN_ENGINE = "clp_engine"


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. temperature 0 is greedy; top_k, top_p, min_p cut the distribution the token is drawn from.

    stop_strings: texts that end a completion, as end tokens do; the token that completes one is part of the completion.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges.check_fields(ranges.SAMPLING, self)
        for name, values in ranges.SAMPLING.items():  # plain numbers, for reports: numpy's are no JSON
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, values.kind(value))
        texts = self.stop_strings
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"stop_strings={shown(texts)}: expected a list of texts, none of them empty")
        object.__setattr__(self, "stop_strings", tuple(texts))  # a key of caches


@dataclass(frozen=True)
class Rollout:
    """Completions of P prompts, `group` of each, B = P * group; completion b belongs to prompt b // group.

    prompt_ids, prompt_mask: (P, S), left-padded; completion_ids: (B, T) int64, right-padded, the end token included;
    completion_mask: (B, T) bool; logprobs: (B, T) float32, as sampled, at the sampling temperature; terminated: (B,) bool.
    plain_ids, plain_mask: (P, S'), the prompts as the reference reads them, where the policy reads something else (prompt
    conditioning), or None. engine: whose log-probs these are; the engine's own (OWN_ENGINE) are the policy's to rounding.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logprobs: torch.Tensor
    terminated: torch.Tensor
    plain_ids: torch.Tensor | None = None
    plain_mask: torch.Tensor | None = None
    engine: str = OWN_ENGINE

    @property
    def group(self) -> int:
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        return self.completion_mask.sum(-1)

    @cached_property
    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each prompt (P,) and of each completion (B,), on the host; read from the device once, for all parts."""
        counts = torch.cat([self.prompt_mask.sum(-1), self.completion_mask.sum(-1)]).cpu()
        return counts[: len(self.prompt_ids)], counts[len(self.prompt_ids) :]

    @cached_property
    def tokens(self) -> int:
        """Completion tokens in all."""
        return int(self.counts[1].sum())

    @cached_property
    def rows(self) -> torch.Tensor:
        """(N,), on the host: the completion of each of the N completion tokens, in the order of completion_mask.nonzero()."""
        lengths = self.counts[1]
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    @cached_property
    def places(self) -> torch.Tensor:
        """(N,): where these tokens lie in (B, T), flattened: what a mask says, without asking the device how many there are."""
        lengths = self.counts[1]
        steps = torch.arange(len(self.rows)) - (lengths.cumsum(0) - lengths)[self.rows]
        return (self.rows * self.completion_mask.shape[1] + steps).to(self.completion_mask.device)

    @cached_property
    def packed(self) -> Packed:
        """Every token in one row, which policy and reference read alike."""
        return pack(self.prompt_ids, self.counts[0], self.completion_ids, self.counts[1])

    def prompts(self, start: int, stop: int) -> Rollout:
        """The part of prompts [start, stop), trimmed to its longest prompt and completion; itself, if that is all of it."""
        rows = slice(start * self.group, stop * self.group)
        prompt_lengths, lengths = self.counts[0][start:stop], self.counts[1][rows]
        skip, keep = self.prompt_ids.shape[1] - int(prompt_lengths.max()), max(int(lengths.max()), 1)
        if (stop - start, skip, keep) == (len(self.prompt_ids), 0, self.completion_ids.shape[1]):
            return self
        plain_ids, plain_mask = self.plain_ids, self.plain_mask
        if plain_ids is not None and plain_mask is not None:
            skipped = plain_mask.shape[1] - int(plain_mask[start:stop].sum(-1).max())
            plain_ids, plain_mask = (t[start:stop, skipped:] for t in (plain_ids, plain_mask))
        part = Rollout(
            self.prompt_ids[start:stop, skip:],
            self.prompt_mask[start:stop, skip:],
            self.completion_ids[rows, :keep],
            self.completion_mask[rows, :keep],
            self.logprobs[rows, :keep],
            self.terminated[rows],
            plain_ids,
            plain_mask,
            self.engine,
        )
        part.__dict__["counts"] = prompt_lengths, lengths
        return part

    def token_lists(self) -> list[list[int]]:
        """The tokens of each completion without padding, the end token included."""
        return [ids[:n] for ids, n in zip(self.completion_ids.tolist(), self.counts[1].tolist())]


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


@dataclass(frozen=True)
class Profile:
    """What a caller must know before it asks for completions.

    objectives: their names, in the order of weight vectors. kl_is_beta: whether the KL coefficient is beta. default_kl: its
    value where none is asked for. base_model: its name. tokenizer: or None. stop_token_ids: generation stops at any of them.
    room: how many tokens are read.
    """

    objectives: tuple[str, ...]
    kl_is_beta: bool
    default_kl: float
    base_model: str
    tokenizer: Any
    pad_token_id: int
    stop_token_ids: list[int]
    room: Room


class Samplable(Protocol):
    """What completions are drawn from and scored under: a policy, or a mixture of specialists.

    conditioned: the model that computes; threads that draw from one model take turns. engine: what draws, or None for the
    fastest that serves (`engines.choice`). moves_hidden: whether hidden states depend on the condition. joins_reference:
    whether scoring without gradients computes the reference's rows in the same pass.
    """

    engine: RolloutEngine | None

    @property
    def conditioned(self) -> ConditionedModel: ...
    @property
    def profile(self) -> Profile: ...
    @property
    def moves_hidden(self) -> bool: ...
    @property
    def joins_reference(self) -> bool: ...

    def conditions(self, weights: Any = None, kl: Any = None, rows: int = 1) -> Conditions:
        """Per-row conditions from what a user writes. Raises ConfigError."""

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """(rows, D) on the model's device, or None where every row is the reference."""

    def shown_prompts(
        self, prompt_ids: Sequence[Sequence[int]], conditions: Conditions, prompts: Sequence | None = None
    ) -> list[list[int]] | None:
        """What is read for each prompt under its condition; None where that is the prompt itself."""

    def completion_hidden(
        self, batch: Rollout, conditions: Conditions | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, H): the hidden state that predicts each completion token of `mask`; conditions: a row per prompt, None for the
        reference."""

    def token_stats(self, hidden: torch.Tensor, targets: torch.Tensor, **options: Any) -> TokenStats:
        """`linear_logprob` of these hidden states (rows, H); options: ref_hidden, conditions (a row each), temperature,
        outputs, differentiable."""


@dataclass(frozen=True)
class RolloutRequest:
    """Completions that an engine is to draw: `group` of each of P prompts.

    source: what they are drawn from, each prompt under its row of conditions. prompt_ids, prompt_mask: (P, S), left-padded, as
    the source reads them; plain: (ids, mask) as the reference reads them, or None where that is the same. row_seeds: (B,)
    int64, a stream of random numbers for each of the B = P * group completions. begun: tokens that a completion has already,
    which prompt_ids end with, or None. at_once: prompts whose completions are drawn together, at most.
    """

    source: Samplable
    conditions: Conditions
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    plain: tuple[torch.Tensor, torch.Tensor] | None
    group: int
    sampling: SamplingParams
    row_seeds: torch.Tensor
    begun: Sequence[Sequence[int]] | None
    at_once: int

    @cached_property
    def blend(self) -> torch.Tensor | None:
        """(P, D), or None where every prompt's completions are the reference's."""
        return self.source.coefficients(self.conditions)

    def rollout(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        logprobs: torch.Tensor,
        terminated: torch.Tensor,
        engine: str = OWN_ENGINE,
    ) -> Rollout:
        """What was drawn, as `Rollout` has it."""
        prompts, (plain_ids, plain_mask) = (self.prompt_ids, self.prompt_mask), self.plain or (None, None)
        return Rollout(*prompts, tokens, mask, logprobs, terminated, plain_ids, plain_mask, engine)


class RolloutEngine(Protocol):
    """Draws the completions of a request. `RolloutRequest.rollout` makes the Rollout of what was drawn."""

    def run(self, request: RolloutRequest) -> Rollout: ...
