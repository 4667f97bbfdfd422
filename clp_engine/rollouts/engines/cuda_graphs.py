"""Decoding over buffers that never move: what a CUDA graph can be captured of and replayed for every token.

A slot holds a prompt's keys and values once, for all rows of its group, and each row's own. Prompts take free slots and leave
them; a step runs over the first so many slots, a bucket, whoever is in them:

    scores = [ q K_prompt^T | q K_own^T ],    y = softmax(scores + mask) [ V_prompt ; V_own ]

The rows of a group are one matrix product with their prompt's keys: these are read once per group and token. Buckets are powers
of two, prompts and completions have room for a multiple of ROUND tokens, so that a few graphs serve a whole run; they outlive
the rollout with their buffers and are captured again where a parameter has moved. Factors are converted to the model's dtype
once for a rollout: what the graph reads of them are copies.

On a GPU a step is one graph launch. Elsewhere, or where capture fails (said once), the same step runs as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines import fused_step
from clp_engine.rollouts.engines.fused_step import FusedStep
from clp_engine.rollouts.engines.slots import NAME, Slots, Step, _round_up, _step, slot_attention

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy

logger = logging.getLogger(__name__)

_WARM_UP = 3  # steps before capture: libraries choose and allocate in the first ones
def serves(policy: ConditionedPolicy) -> bool:
    """Whether every step of the policy is the same work on the same buffers: low-rank factors, attention that packs."""
    return (
        isinstance(policy.backbone, CausalBackbone)
        and policy.backbone.packing_fault is None
        and all(isinstance(layer, ConditionedLinear) for layer in policy.layers.values())
    )


AttentionInterface.register(NAME, slot_attention)


class SlotDecoding:
    """Logits of a policy, each row under its blend; see `modules.Decoding`. Arguments as of `BlendDecoding`.

    A prompt's slot is free when the last of its rows has left.
    """

    drop_share = 0.25  # groups move, and another graph may have to be captured

    def __init__(
        self,
        policy: ConditionedPolicy,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        blend: torch.Tensor | None,
        group: int,
        room: int,
        at_once: int,
        fused: FusedStep | None = None,
    ):
        self._policy, self._backbone = policy, policy.backbone
        self._fused = fused
        self._prompts, self._blends, self._group = (prompt_ids, prompt_mask), blend, group
        self._slots = _slots_for(policy, at_once, prompt_ids.shape[1], group, room)
        with torch.no_grad():
            self._slots.convert(policy.layers)
        self._taken = [0] * self._slots.count  # rows that still run, by slot
        self._rows = torch.empty(0, dtype=torch.long, device=policy.device)  # where each running row lies

    @property
    def places(self) -> int:
        return self._taken.count(0)

    def add(self, prompts: slice) -> torch.Tensor:
        s = self._slots
        ids, mask = (t[prompts] for t in self._prompts)
        skip = ids.shape[1] - int(mask.sum(-1).max())
        ids, mask = ids[:, skip:], mask[:, skip:]
        blend = None if self._blends is None else self._blends[prompts]
        with self._policy.blend.use(blend):
            hidden, context = self._backbone.prefill(ids, mask)
            logits = self._backbone.head.logits(hidden[:, -1])
        free = [slot for slot, rows in enumerate(self._taken) if rows == 0][: len(ids)]
        for slot in free:
            self._taken[slot] = self._group
        where = torch.tensor(free, device=s.device)
        # Prompts lie from position 0 on in their slots: padding goes behind.
        order = (~mask).long().argsort(dim=-1, stable=True)
        for layer, cached in enumerate(context.cache.layers):
            s.allocate(layer, cached.keys)
            for buffer, states in zip(s.prompts[layer], (cached.keys, cached.values)):
                index = order[:, None, :, None].expand_as(states)
                buffer[where, :, : ids.shape[1]] = states.gather(2, index)
        s.prompt_lengths[where] = mask.sum(-1)
        rows = (where.unsqueeze(1) * self._group + torch.arange(self._group, device=s.device)).flatten()
        s.lengths[rows] = 0
        s.coefficients[rows] = 0.0 if blend is None else blend.repeat_interleave(self._group, 0)
        self._rows = torch.cat([self._rows, rows])
        return logits.repeat_interleave(self._group, 0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        s = self._slots
        used = max((i + 1 for i, rows in enumerate(self._taken) if rows), default=1)
        count = next(b for b in s.buckets if b >= used)
        s.tokens[self._rows, 0] = tokens
        logits = self._run(count)[self._rows]
        s.lengths[self._rows] += 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        self._rows = self._rows[rows]
        groups = (self._rows // self._group).tolist()
        self._taken = [groups.count(slot) for slot in range(len(self._taken))]
        self._close_ranks()

    def _close_ranks(self) -> None:
        """Move groups to the first slots where a smaller bucket will then do."""
        s, taken = self._slots, self._taken
        used = [slot for slot, rows in enumerate(taken) if rows]
        target = next((b for b in s.buckets if b >= len(used)), s.count)
        free = [slot for slot in range(target) if not taken[slot]]
        where = torch.arange(s.count, device=s.device)
        for slot in (slot for slot in used if slot >= target):
            there = free.pop(0)
            s.move(slot, there)
            taken[there], taken[slot] = taken[slot], 0
            where[slot] = there
        self._rows = where[self._rows // self._group] * self._group + self._rows % self._group

    # -- one step -----------------------------------------------------------------------------------------------------

    def _run(self, count: int) -> torch.Tensor:
        """(count * group, V): logits after the tokens in the buffers."""
        s = self._slots
        if s.device.type != "cuda" or s.graphs is None:
            return self._forward(count)
        if count not in s.graphs:
            try:
                s.graphs[count] = self._capture(count)
            except RuntimeError as error:
                logger.warning("decoding without CUDA graphs, which could not be captured: %s", error)
                s.graphs = None
                return self._forward(count)
        graph, logits = s.graphs[count]
        graph.replay()
        return logits

    def _capture(self, count: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # A step puts the same keys and values in the same places however often it runs.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._forward(count)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(count)
        return graph, logits

    def compared(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`step`, (logits of the fused step, of transformers' modules)."""
        s, count = self._slots, self._slots.count
        s.tokens[self._rows, 0] = tokens
        found = self._forward(count), self._forward_of_modules(count)
        s.lengths[self._rows] += 1
        return tuple(logits[self._rows] for logits in found)

    @contextlib.contextmanager
    def _blended(self, step: Step) -> Iterator[None]:
        s, policy = self._slots, self._policy
        # A new tensor, so that nothing derived from other coefficients at the same address is used again.
        blend = s.coefficients[: step.rows]
        with policy.blend.use(blend, factors={policy.layers[name]: kept for name, kept in s.factors.items()}):
            yield

    def _forward(self, count: int) -> torch.Tensor:
        if self._fused is None:
            return self._forward_of_modules(count)
        step = Step(self._slots, count)
        with self._blended(step):
            return fused_step.logits(self._policy, self._fused, step)

    def _forward_of_modules(self, count: int) -> torch.Tensor:
        s = self._slots
        step = Step(s, count)
        token = _step.set(step)
        try:
            with self._blended(step), self._backbone.attention(NAME):
                hidden = self._backbone.decoder(
                    input_ids=s.tokens[: step.rows], position_ids=step.positions(), use_cache=False
                ).last_hidden_state
                return self._backbone.head.logits(hidden[:, -1])
        finally:
            _step.reset(token)


def _slots_for(policy: ConditionedPolicy, at_once: int, width: int, group: int, room: int) -> Slots:
    """The policy's slots of the last rollout where they are large enough, or new ones."""
    addresses = tuple(p.data_ptr() for p in policy.parameters())
    slots = policy.slots
    width, room = _round_up(width), _round_up(room)
    if slots is None or not slots.fits(at_once, width, group, room) or slots.device != policy.device:
        deltas = len(policy.spec.ranks)
        slots = policy.slots = Slots(at_once, width, group, room, policy.device, deltas)
    if slots.parameters != addresses:
        slots.parameters, slots.factors, slots.graphs = addresses, {}, {}
    return slots
