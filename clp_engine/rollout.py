"""Sampling completions: one prompt prefill per group, keys and values in buffers allocated once, finished rows dropped.

Rows of one batch may have different conditions; a row whose weights are all zero is the base model. The log-prob of each
token is kept as it was sampled, and row i of prompt p draws from a seed of its own, so that what a row says does not
depend on what else is in the batch, or on when it joined.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from clp_engine import ranges
from clp_engine.conditions import Conditions
from clp_engine.decoding import Decoding
from clp_engine.drawing import Drawing
from clp_engine.errors import ConfigError, shown
from clp_engine.memory import BOOKKEEPING, check_size
from clp_engine.native_decoding import NativeDecoding
from clp_engine.packing import Packed, pack
from clp_engine.seeds import derive

if TYPE_CHECKING:
    from clp_engine.policy import ConditionedPolicy

# Buffers of decoding belong to a policy: threads that draw from the same one take turns.
_TURNS: weakref.WeakKeyDictionary[ConditionedPolicy, threading.RLock] = weakref.WeakKeyDictionary()

# Steps between looks at who has ended, where looking makes the host wait for the device.
_LOOK_EVERY = 8


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
        plain = (None, None)
        if self.plain_ids is not None:
            longest = int(self.plain_mask[start:stop].sum(-1).max())
            plain = tuple(t[start:stop, t.shape[1] - longest :] for t in (self.plain_ids, self.plain_mask))
        part = Rollout(
            self.prompt_ids[start:stop, skip:],
            self.prompt_mask[start:stop, skip:],
            self.completion_ids[rows, :keep],
            self.completion_mask[rows, :keep],
            self.logprobs[rows, :keep],
            self.terminated[rows],
            *plain,
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
    max_rows: int | None = None,
    begun: Sequence[Sequence[int]] | None = None,
) -> Rollout:
    """Draw `num_generations` completions of each of P prompts, each prompt under its own condition.

    conditions: P rows. row_seeds: (P * num_generations,) int64, one stream of random numbers per completion; by default
    derived from `seed` and the completion's index. Equal row seeds give common random numbers. prompts: what prompt_ids were
    made from, where prompt conditioning has to find its place in chat messages. max_rows: completions that are decoded at
    once (at least a group); prompts wait and take the places of completions that have ended, so that a long one holds up
    nobody. None is all at once.

    begun: of the one completion of each prompt (num_generations=1), the tokens that are there already. It goes on after them,
    read as a part of the prompt, with the random numbers of the positions that follow; only what follows is returned.

    Any thread may call this; calls for one policy run one after another.
    """
    sampling = sampling or SamplingParams()
    if len(conditions) != len(prompt_ids):
        raise ValueError(
            f"conditions has {len(conditions)} rows for {len(prompt_ids)} prompts; expected one per prompt"
        )
    rows = len(prompt_ids) * num_generations
    check_size(
        f"{rows:,} completions of up to {sampling.max_new_tokens:,} tokens",
        rows * sampling.max_new_tokens * BOOKKEEPING,
        policy.device,
    )
    if begun is not None and num_generations != 1:
        raise ValueError(f"begun continues one completion per prompt; got num_generations={num_generations}")
    device = policy.device
    shown = policy.shown_prompts(prompt_ids, conditions, prompts)
    for i, ids in enumerate(prompt_ids if shown is None else shown):
        policy.room.check_prompt(ids, sampling.max_new_tokens, f"prompt {i}", policy.tokenizer)
    policy.room.check_ids([policy.pad_token_id], "padding", policy.tokenizer)
    if begun is not None:
        shown, prompt_ids = (
            None if ids is None else [[*prompt, *tokens] for prompt, tokens in zip(ids, begun, strict=True)]
            for ids in (shown, prompt_ids)
        )
    plain = pad_left(prompt_ids, policy.pad_token_id, device)
    read_ids, read_mask = plain if shown is None else pad_left(shown, policy.pad_token_id, device)
    if row_seeds is None:
        row_seeds = derive(seed, torch.arange(rows))
    drawing = Drawing(policy, sampling, row_seeds.to(device), begun)
    with _TURNS.setdefault(policy, threading.RLock()):
        if policy.shares_prompts:
            at_once = len(prompt_ids) if max_rows is None else max(1, max_rows // num_generations)
            decoding = policy.decoding(
                read_ids, read_mask, conditions, num_generations, sampling.max_new_tokens, at_once
            )
            _decode(drawing, decoding, len(prompt_ids), num_generations)
        else:
            _generate(drawing, policy, read_ids, read_mask, conditions, num_generations)

    tokens, mask, logprobs, terminated = drawing.completions()
    return Rollout(
        read_ids, read_mask, tokens, mask, logprobs, terminated, *((None, None) if shown is None else plain)
    )


def _decode(drawing: Drawing, decoding: Decoding, prompts: int, group: int) -> None:
    """Every completion of every prompt, as places come free."""
    device = drawing.running.device
    every = 1 if device.type == "cpu" else _LOOK_EVERY
    logits, waiting = None, 0  # the first prompt that has not joined
    left = 0  # steps after which whoever is in the batch has ended, whatever it says
    while True:
        if waiting < prompts and (places := decoding.places):
            stop = min(prompts, waiting + places)
            first = decoding.add(slice(waiting, stop))
            logits = first if logits is None else torch.cat([logits, first])
            drawing.join(torch.arange(waiting * group, stop * group, device=device))
            waiting, left = stop, drawing.limit
        if isinstance(decoding, NativeDecoding) and not drawing.reads_text:
            logits = drawing.hand_to(decoding, logits, waiting < prompts)
            if len(logits) == 0 and waiting == prompts:
                return
            continue
        drawn = drawing.draw(logits)
        left -= 1
        if left % every == 0:
            finished = int(drawing.done.sum())  # the host waits for the device here
            if finished == len(drawn) and waiting == prompts:
                return
            if finished and finished >= decoding.drop_share * len(drawn):
                keep = (~drawing.done).nonzero().squeeze(-1)
                decoding.keep(keep)
                drawing.keep(keep)
                drawn = drawn[keep]
        logits = decoding.step(drawn) if len(drawn) else None


def _generate(
    drawing: Drawing,
    policy: ConditionedPolicy,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    conditions: Conditions,
    group: int,
) -> None:
    """Every completion by transformers' generate, prompt after prompt: nothing is padded, whatever the model makes of it."""
    blend = policy.coefficients(conditions)
    for p in range(len(prompt_ids)):
        rows = torch.arange(p * group, (p + 1) * group, device=prompt_ids.device)
        drawing.keep(rows[:0])
        drawing.join(rows)

        def draw(logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
            drawn = drawing.draw(logits)
            return drawn, bool(drawing.done.all())

        with policy.blend.use(None if blend is None else blend[p : p + 1].expand(group, -1)):
            policy.backbone.generate(prompt_ids[p : p + 1, prompt_mask[p]], group, drawing.limit, draw)
