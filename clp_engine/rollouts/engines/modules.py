"""Decoding by transformers' modules, which serves every model and is the comparison for the other decoders."""

from __future__ import annotations

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

    def add(self, prompts: slice) -> torch.Tensor:
        blend, group, room = self._request.blends(prompts), self._request.group, self._request.room
        ids, mask = self._request.prompts(prompts)
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
