"""Decoding by transformers' modules, which serves every model and is the comparison for the other decoders."""

from __future__ import annotations

import dataclasses

import torch

from clp_engine.rollouts.engines.base import DecoderRequest


class ModulesDecoder:
    """Logits by transformers' modules, each row under its blend; see `base.StepDecoder`."""

    drop_share = 0.25  # dropping rows copies the cache
    write = None

    def __init__(self, request: DecoderRequest):
        self._request, self._backbone, self._in_force = request, request.model.backbone, request.model.blend
        self._context = self._blend = None
        self._rows = 0

    @property
    def places(self) -> int:
        free = self._backbone.contexts_join or self._rows == 0
        request = self._request
        return (request.at_once * request.group - self._rows) // request.group if free else 0

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        group, room = self._request.group, self._request.room
        with self._in_force.use(blend):
            hidden, context = self._backbone.prefill(ids, mask)
            logits = self._backbone.head.logits(hidden[:, -1])
        context.repeat(group, room=room)
        blend = None if blend is None else blend.repeat_interleave(group, 0)
        if self._context is None:
            self._context, self._blend = context, blend
        else:
            self._context.join(context, room)
            self._blend = None if blend is None else torch.cat([self._blend, blend])
        self._rows += len(ids) * group
        return logits.repeat_interleave(group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._in_force.use(self._blend):
            hidden = self._backbone.extend(self._context, tokens.unsqueeze(1))
            return self._backbone.head.logits(hidden[:, -1])

    def keep(self, rows: torch.Tensor) -> None:
        self._rows = len(rows)
        if len(rows) == 0:
            self._context = self._blend = None
            return
        self._context.select(rows)
        self._blend = None if self._blend is None else self._blend[rows]


class ApartDecoder:
    """Logits by transformers' modules, one prompt's rows at a time, so that they do not depend on other prompts' rows.

    A library's matrix products are summed in another order for another number of rows. `DecoderRequest.alone` asks for this
    decoder where no faster one keeps a row's bits. A step reads the weights once per prompt; see `base.StepDecoder`.
    """

    drop_share = 0.0
    write = None

    def __init__(self, request: DecoderRequest):
        self._request = request
        self._decoders: list[ModulesDecoder] = []
        self._rows: list[int] = []  # of each decoder

    @property
    def places(self) -> int:
        return self._request.at_once - len(self._decoders)

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        found = []
        for p in range(len(ids)):
            length = int(mask[p].sum())
            one = ModulesDecoder(dataclasses.replace(self._request, at_once=1))
            blend_of_one = None if blend is None else blend[p : p + 1]
            found.append(one.add(ids[p : p + 1, -length:], mask[p : p + 1, -length:], blend_of_one))
            self._decoders.append(one)
            self._rows.append(self._request.group)
        return torch.cat(found)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = zip(self._decoders, tokens.split(self._rows))
        return torch.cat([decoder.step(own) for decoder, own in parts])

    def keep(self, rows: torch.Tensor) -> None:
        left, first, kept = [], 0, rows.tolist()
        for decoder, count in zip(self._decoders, self._rows):
            own = [row - first for row in kept if first <= row < first + count]
            first += count
            if own and len(own) < count:
                decoder.keep(torch.tensor(own, device=rows.device))
            if own:
                left.append((decoder, len(own)))
        self._decoders, self._rows = [d for d, _ in left], [count for _, count in left]
