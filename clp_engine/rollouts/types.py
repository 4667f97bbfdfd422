"""The request, the source and the result of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """How completions are drawn. temperature 0 is greedy. top_k, top_p and min_p truncate the distribution of a token.

    stop_strings: texts that end a completion, as end tokens do. The token that completes one is part of the completion.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges.check_fields(ranges.SAMPLING, self)
        for name, values in ranges.SAMPLING.items():  # plain numbers, as JSON cannot hold numpy's
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, values.kind(value))
        texts = self.stop_strings
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"stop_strings={shown(texts)}: expected a list of texts, none of them empty")
        object.__setattr__(self, "stop_strings", tuple(texts))  # hashable, for use as a key of caches


@dataclass(frozen=True)
class Rollout:
    """Completions of P prompts, `group` of each, B = P * group. Completion b belongs to prompt b // group.

    prompt_ids, prompt_mask: (P, S), left-padded.
    completion_ids: (B, T) int64, right-padded, with the end token. completion_mask: (B, T) bool.
    logprobs: (B, T) float32, from sampling, at the sampling temperature. terminated: (B,) bool.
    plain_ids, plain_mask: (P, S'), the prompts for the reference if the policy reads others (prompt conditioning), or None.
    engine: the engine that drew; log-probs of OWN_ENGINE are the policy's to rounding.
    sampled: (B, T) float32, what another engine drew with, None for OWN_ENGINE. NaN where it does not know. logprobs may then
        have been computed by the policy.
    written: (B, T) bool, the completion tokens that the policy wrote. Others, which an environment wrote, are read and not
        trained on. None: all of completion_mask.
    columns: values of each completion for the reward functions, by name, or None.
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
    sampled: torch.Tensor | None = None
    written: torch.Tensor | None = None
    columns: Mapping[str, list] | None = None

    @property
    def trained(self) -> torch.Tensor:
        """(B, T) bool: the tokens that the policy wrote."""
        return self.completion_mask if self.written is None else self.completion_mask & self.written

    @property
    def group(self) -> int:
        return self.completion_ids.shape[0] // self.prompt_ids.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        return self.completion_mask.sum(-1)

    @cached_property
    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each prompt (P,) and of each completion (B,), on the host. Read from the device once for all parts."""
        counts = torch.cat([self.prompt_mask.sum(-1), self.completion_mask.sum(-1)]).cpu()
        return counts[: len(self.prompt_ids)], counts[len(self.prompt_ids) :]

    @cached_property
    def tokens(self) -> int:
        """The total number of completion tokens that the policy wrote."""
        return len(self.rows) if self.written is None else int(self.trained.sum())

    @cached_property
    def rows(self) -> torch.Tensor:
        """(N,), on the host: the completion of each of the N completion tokens, in the order of completion_mask.nonzero()."""
        lengths = self.counts[1]
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    @cached_property
    def places(self) -> torch.Tensor:
        """(N,): the index of each completion token in (B, T), flattened.

        It is computed on the host, without waiting for the device to count the tokens of a mask.
        """
        lengths = self.counts[1]
        steps = torch.arange(len(self.rows)) - (lengths.cumsum(0) - lengths)[self.rows]
        return (self.rows * self.completion_mask.shape[1] + steps).to(self.completion_mask.device)

    @cached_property
    def packed(self) -> Packed:
        """All tokens packed in one row. Policy and reference must read the same prompts."""
        return pack(self.prompt_ids, self.counts[0], self.completion_ids, self.counts[1])

    def prompts(self, start: int, stop: int) -> Rollout:
        """The part with prompts [start, stop), trimmed to its longest prompt and completion. `self` for all prompts."""
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
            sampled=None if self.sampled is None else self.sampled[rows, :keep],
            written=None if self.written is None else self.written[rows, :keep],
            columns=self.columns_of(range(len(self.completion_ids))[rows]),
        )
        part.__dict__["counts"] = prompt_lengths, lengths
        return part

    def taken(self, prompts: Sequence[int]) -> Rollout:
        """The part with these prompts, in this order, trimmed as by `prompts`."""
        at = torch.as_tensor(prompts, dtype=torch.long, device=self.prompt_ids.device)
        rows = (at.unsqueeze(-1) * self.group + torch.arange(self.group, device=at.device)).flatten()
        plain_ids, plain_mask = (None if t is None else t[at] for t in (self.plain_ids, self.plain_mask))
        part = Rollout(
            self.prompt_ids[at],
            self.prompt_mask[at],
            self.completion_ids[rows],
            self.completion_mask[rows],
            self.logprobs[rows],
            self.terminated[rows],
            plain_ids,
            plain_mask,
            self.engine,
            sampled=None if self.sampled is None else self.sampled[rows],
            written=None if self.written is None else self.written[rows],
            columns=self.columns_of(rows.tolist()),
        )
        return part.prompts(0, len(prompts))

    def columns_of(self, rows: Sequence[int]) -> dict[str, list] | None:
        """The columns of these completions, in this order."""
        if self.columns is None:
            return None
        return {name: [values[i] for i in rows] for name, values in self.columns.items()}

    def token_lists(self) -> list[list[int]]:
        """The tokens of each completion without padding, with the end token."""
        return [ids[:n] for ids, n in zip(self.completion_ids.tolist(), self.counts[1].tolist())]


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded (ids, mask), both (P, longest)."""
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
    """The properties of a source that a caller needs before it asks for completions.

    objectives: their names, in the order of weight vectors. kl_is_beta: whether the KL coefficient is beta.
    default_kl: the KL coefficient used by default. base_model: the base model's name. tokenizer: a tokenizer or None.
    stop_token_ids: any of these tokens ends a completion. room: the limits of the model's input.
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
    """A source of completions and scores: a policy, or a mixture of specialists.

    conditioned: the model that computes. Threads that draw from one model take turns.
    engine: the engine that draws, or None for the fastest that serves the model (`engines.choice`).
    moves_hidden: whether hidden states depend on the condition.
    joins_reference: whether scoring without gradients computes the reference's rows in the same pass.
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
        """Per-row conditions from a user's weights and KL coefficient. Raises ConfigError for invalid ones."""

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """The blend (rows, D) on the model's device, or None if every row is the reference."""

    def shown_prompts(
        self, prompt_ids: Sequence[Sequence[int]], conditions: Conditions, prompts: Sequence | None = None
    ) -> list[list[int]] | None:
        """The tokens that the model reads for each prompt under its condition. None if they are the prompt's own."""

    def completion_hidden(
        self, batch: Rollout, conditions: Conditions | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, H): the hidden state that predicts each completion token of `mask`.

        conditions: one row per prompt, or None for the reference.
        """

    def token_stats(self, hidden: torch.Tensor, targets: torch.Tensor, **options: Any) -> TokenStats:
        """`linear_logprob` of these hidden states (rows, H).

        options: ref_hidden, conditions (one row per hidden state), temperature, outputs, differentiable.
        """


@dataclass(frozen=True)
class RolloutRequest:
    """A request to an engine for completions: `group` of each of P prompts, B = P * group in all.

    source: the policy or mixture to draw from, each prompt under its row of conditions.
    prompt_ids, prompt_mask: (P, S), left-padded, as the source reads them.
    plain: (ids, mask) as the reference reads them, or None if they are the same.
    row_seeds: (B,) int64, one stream of random numbers per completion.
    begun: the existing tokens of each completion, with which prompt_ids end, or None. Only the tokens after them are returned.
    at_once: the most prompts whose completions are drawn together.
    prompts: the texts or chats that the prompts were made from, for an engine that reads them; None if they are unknown.
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
    prompts: Sequence | None = None

    @cached_property
    def blend(self) -> torch.Tensor | None:
        """The blend (P, D), or None if all completions are the reference's."""
        return self.source.coefficients(self.conditions)

    def rollout(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        logprobs: torch.Tensor,
        terminated: torch.Tensor,
        engine: str,
    ) -> Rollout:
        """The drawn completions as a `Rollout`."""
        prompts, (plain_ids, plain_mask) = (self.prompt_ids, self.prompt_mask), self.plain or (None, None)
        return Rollout(*prompts, tokens, mask, logprobs, terminated, plain_ids, plain_mask, engine)


class RolloutEngine(Protocol):
    """An engine that draws the completions of a request. `RolloutRequest.rollout` turns its results into a Rollout."""

    def run(self, request: RolloutRequest) -> Rollout: ...
