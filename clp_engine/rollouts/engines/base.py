"""`Stepwise`, this project's own engine, and the protocol of the step decoders that it uses.

A RolloutEngine (`types`) turns a request into completions in any way. `Stepwise` draws them token by token from a StepDecoder,
which computes the logits of every row's next token. A step decoder uses transformers' modules, the native decoder, or CUDA
graphs over fixed slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from clp_kernels.decoder import Draws

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.rows import Rows
from clp_engine.rollouts.types import OWN_ENGINE, Rollout, RolloutRequest


def steps_between_looks(device: torch.device) -> int:
    """Steps between two checks for ended rows: several if a check makes the host wait for the device."""
    return 1 if device.type == "cpu" else 8


@dataclass(frozen=True)
class DecoderRequest:
    """The arguments for making a step decoder.

    model: the model whose logits it computes. blended: whether rows have a blend; otherwise all are the base model.
    longest: the most tokens of a prompt. group: rows per prompt. room: the most tokens of a row.
    at_once: the most groups of rows decoded together.
    alone: every row must get the same bits as it gets without other rows, if its prompt is added by itself.
    """

    model: ConditionedModel
    blended: bool
    longest: int
    group: int
    room: int
    at_once: int
    alone: bool = False

    @classmethod
    def of(cls, request: RolloutRequest) -> DecoderRequest:
        return cls(
            request.source.conditioned,
            request.blend is not None,
            request.prompt_ids.shape[1],
            request.group,
            request.sampling.max_new_tokens,
            request.at_once,
        )


def prompts_of(
    request: RolloutRequest, chosen: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(ids, mask, blend) of the chosen prompts, without the padding that they have in common: what a step decoder adds."""
    ids, mask = request.prompt_ids[chosen], request.prompt_mask[chosen]
    skip = ids.shape[1] - int(mask.sum(-1).max())
    return ids[:, skip:], mask[:, skip:], None if request.blend is None else request.blend[chosen]


class StepDecoder(Protocol):
    """The logits of every row's next token, one token at a time. Prompts join, and rows leave when they have ended.

    drop_share: the share of rows that must have ended before dropping them pays; 0 if dropping is free.
    write: None, or a function that draws by itself for the rows of `draws`, from logits (m, V) of the last m rows: the first
        n - m have drawn what they read next. It stops when all rows have ended, if prompts wait when there is a place for
        one, or when it pays to be called again. It returns (indices of the rows left, logits of the last of them, as above).
    """

    drop_share: float
    write: Callable[[torch.Tensor, Draws, bool], tuple[torch.Tensor, torch.Tensor]] | None

    @property
    def places(self) -> int:
        """The number of prompts that can be added now."""

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        """Add a group of rows for each prompt, behind the present rows. Returns the logits (new rows, V) of first tokens.

        ids, mask: (P, S), left-padded. blend: (P, D), or None where `DecoderRequest.blended` is False.
        """

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (rows, V) of the token after tokens (rows,)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Continue only with the present rows at these ascending indices."""


@dataclass(frozen=True)
class Stepwise:
    """The engine that draws token by token. decoder: makes the step decoder for a request."""

    decoder: Callable[[RolloutRequest], StepDecoder]

    def run(self, request: RolloutRequest) -> Rollout:
        rows = Rows(request)
        self._draw(self.decoder(request), rows, request)
        return request.rollout(*rows.completions(), engine=OWN_ENGINE)

    def _draw(self, decoder: StepDecoder, rows: Rows, request: RolloutRequest) -> None:
        """Draw every completion of every prompt. Waiting prompts join as places become free."""
        device, prompts, group = rows.running.device, len(request.prompt_ids), request.group
        every = steps_between_looks(device)
        logits, waiting = None, 0  # waiting: the first prompt that has not joined
        left = 0  # steps after which all present rows have reached their length limit
        while True:
            if waiting < prompts and (places := decoder.places):
                stop = min(prompts, waiting + places)
                first = decoder.add(*prompts_of(request, slice(waiting, stop)))
                logits = first if logits is None else torch.cat([logits, first])
                rows.join(torch.arange(waiting * group, stop * group, device=device))
                waiting, left = stop, rows.limit
            assert logits is not None  # at least one row has joined
            if decoder.write is not None and not rows.reads_text:
                draws = rows.draws()
                going_on, logits = decoder.write(logits, draws, waiting < prompts)
                rows.drawn_by(draws, going_on)
                if len(going_on) == 0 and waiting == prompts:
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
