"""Where the logits of a rollout come from: prompts join, step token by token, and leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy


class Decoding(Protocol):
    """A source of the logits that rows draw their tokens from, one token at a time: `rollout` needs no more of a model.

    drop_share: of the rows, how many must have ended before leaving them out is worth what it costs; 0 where it costs nothing.
    """

    drop_share: float

    @property
    def places(self) -> int:
        """Prompts that can be added now."""

    def add(self, prompts: slice) -> torch.Tensor:
        """Rows for these prompts, a group for each, behind those that are there; (new rows, V), for their first tokens."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(rows, V), for the token after tokens (rows,)."""

    def keep(self, rows: torch.Tensor) -> None:
        """Only these of the present rows (indices, ascending) go on."""


class BlendDecoding:
    """Logits of a policy, each row under its blend.

    prompt_ids, prompt_mask: (P, S), left-padded; blend: (P, D), or None for the base model; group: rows per prompt; room: most
    tokens of a row; at_once: most groups of rows together.
    """

    drop_share = 0.25  # the cache is copied

    def __init__(
        self,
        policy: ConditionedPolicy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        blend: torch.Tensor | None,
        group: int,
        room: int,
        at_once: int,
    ):
        self._backbone, self._in_force = policy.backbone, policy.blend
        self._prompts, self._blends, self._group, self._room = (prompt_ids, prompt_mask), blend, group, room
        self._context = self._blend = None
        self._rows, self._most = 0, at_once * group

    @property
    def places(self) -> int:
        free = self._backbone.contexts_join or self._rows == 0
        return (self._most - self._rows) // self._group if free else 0

    def add(self, prompts: slice) -> torch.Tensor:
        blend = None if self._blends is None else self._blends[prompts]
        ids, mask = (t[prompts] for t in self._prompts)
        skip = ids.shape[1] - int(mask.sum(-1).max())
        with self._in_force.use(blend):
            hidden, context = self._backbone.prefill(ids[:, skip:], mask[:, skip:])
            logits = self._backbone.head.logits(hidden[:, -1])
        context.repeat(self._group, room=self._room)
        blend = None if blend is None else blend.repeat_interleave(self._group, 0)
        if self._context is None:
            self._context, self._blend = context, blend
        else:
            self._context.join(context, self._room)
            self._blend = None if blend is None else torch.cat([self._blend, blend])
        self._rows += len(ids) * self._group
        return logits.repeat_interleave(self._group, 0)

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
