"""The engine of this project, `Stepwise`, and the step decoders that it is made of.

A RolloutEngine (`types`) takes a request and returns completions, however it makes them. `Stepwise` draws token by token from a
StepDecoder, which knows the logits of the next token of every row: transformers' modules, the native decoder, or CUDA graphs
over fixed slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from clp_kernels.decoder import Draws

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.rows import Rows
from clp_engine.rollouts.types import Rollout, RolloutRequest

# Steps between looks at who has ended, where looking makes the host wait for the device.
_LOOK_EVERY = 8


@dataclass(frozen=True)
class DecoderRequest:
    """What a step decoder is made for.

    model: whose logits. prompt_ids, prompt_mask: (P, S), left-padded. blend: (P, D), or None for the base model. group: rows
    per prompt. room: the most tokens of a row. at_once: the most groups of rows together.
    """

    model: ConditionedModel
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    blend: torch.Tensor | None
    group: int
    room: int
    at_once: int

    @classmethod
    def of(cls, request: RolloutRequest) -> DecoderRequest:
        return cls(
            request.source.conditioned,
            request.prompt_ids,
            request.prompt_mask,
            request.blend,
            request.group,
            request.sampling.max_new_tokens,
            request.at_once,
        )

    def prompts(self, chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask) of some prompts, without the padding that all of them have."""
        ids, mask = self.prompt_ids[chosen], self.prompt_mask[chosen]
        skip = ids.shape[1] - int(mask.sum(-1).max())
        return ids[:, skip:], mask[:, skip:]

    def blends(self, chosen: slice) -> torch.Tensor | None:
        return None if self.blend is None else self.blend[chosen]


class StepDecoder(Protocol):
    """The logits that rows draw their tokens from, one token at a time. Prompts join, and rows leave when they have ended.

    drop_share: of the rows, how many must have ended before leaving them out is worth what it costs; 0 where it costs nothing.
    write: None, or a function that draws by itself: from logits (n, V), for the rows of `draws`, until all have ended or, if
        others wait, there is a place for a prompt; returns (indices of the rows that have not ended, their logits).
    """

    drop_share: float
    write: Callable[[torch.Tensor, Draws, bool], tuple[torch.Tensor, torch.Tensor]] | None

    @property
    def places(self) -> int:
        """Prompts that can be added now."""

    def add(self, prompts: slice) -> torch.Tensor:
        """Rows for these prompts, a group for each, behind the present rows; (new rows, V), for their first tokens."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(rows, V), for the token after tokens (rows,)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Only these of the present rows (indices, ascending) go on."""


@dataclass(frozen=True)
class Stepwise:
    """The engine that draws token by token. decoder: makes the step decoder of a request."""

    decoder: Callable[[RolloutRequest], StepDecoder]

    def run(self, request: RolloutRequest) -> Rollout:
        rows = Rows(request)
        self._draw(self.decoder(request), rows, len(request.prompt_ids), request.group)
        return request.rollout(*rows.completions())

    def _draw(self, decoder: StepDecoder, rows: Rows, prompts: int, group: int) -> None:
        """Every completion of every prompt, as places come free."""
        device = rows.running.device
        every = 1 if device.type == "cpu" else _LOOK_EVERY
        logits, waiting = None, 0  # the first prompt that has not joined
        left = 0  # steps after which whoever is in the batch has ended, whatever it says
        while True:
            if waiting < prompts and (places := decoder.places):
                stop = min(prompts, waiting + places)
                first = decoder.add(slice(waiting, stop))
                logits = first if logits is None else torch.cat([logits, first])
                rows.join(torch.arange(waiting * group, stop * group, device=device))
                waiting, left = stop, rows.limit
            if decoder.write is not None and not rows.reads_text:
                draws = rows.draws()
                going_on, logits = decoder.write(logits, draws, waiting < prompts)
                rows.drawn_by(draws, going_on)
                if len(logits) == 0 and waiting == prompts:
                    return
                continue
            drawn = rows.draw(logits)
            left -= 1
            if left % every == 0:
                finished = int(rows.done.sum())  # the host waits for the device here
                if finished == len(drawn) and waiting == prompts:
                    return
                if finished and finished >= decoder.drop_share * len(drawn):
                    keep = (~rows.done).nonzero().squeeze(-1)
                    decoder.keep(keep)
                    rows.keep(keep)
                    drawn = drawn[keep]
            logits = decoder.step(drawn) if len(drawn) else None
