"""Fixed buffers, so that one captured CUDA graph can be replayed for every token.

A slot holds a prompt's keys and values once for all rows of its group, and the keys and values of each row's own tokens.
Prompts enter free slots and leave them. A step always runs over the first slots, as many as a bucket has, occupied or not:

    scores = [ q K_prompt^T | q K_own^T ],    y = softmax(scores + mask) [ V_prompt ; V_own ]

The rows of a group are one matrix product with their prompt's keys, which are therefore read once per group and token. Buckets
are powers of two, and the room for prompts and completions is a multiple of ROUND tokens, so that a few graphs serve a whole
run. Factors are converted to the model's dtype once per rollout, and a graph reads the converted copies.

Rows that draw by themselves keep their tokens, log-probs, seeds, ends and sampling options in buffers, too (`written`,
`options`), so that a graph holds the draw as well as the step: the host neither sees a token nor copies a logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from clp_kernels.decode_step import Completions
from clp_kernels.decoder import Draws
from transformers import AttentionInterface

from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines.llama_weights import rope_tables

NAME = "clp_slots"
ROUND = 64  # tokens; the room for prompts and for completions is a multiple
in_force: ContextVar[Step | None] = ContextVar("step", default=None)


def round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


@dataclass
class Slots:
    """Buffers for `count` prompts of at most `width` tokens, with `group` rows each and at most `room` own tokens per row.

    keys, values: by layer, those of prompts (count, Hkv, width, D) and of rows (count * group, Hkv, room, D).
    prompt_lengths: (count,), filled positions of each prompt. lengths: (count * group,), filled positions of each row.
    coefficients: (count * group, D), the blend, zero without one.
    factors: by layer, its low-rank factors in the model's dtype, if they are stored in another.
    written: the tokens that rows have drawn; a row without a prompt has a limit of 0. stop_ids: (k,), tokens that end a row.
    options: (count * group,) each, the sampling options of every row.
    graphs: by the number of slots, what was captured of the kind of step in force (`use_graphs`).
    """

    count: int
    width: int
    group: int
    room: int
    device: torch.device
    deltas: int
    prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = field(default_factory=dict)
    parameters: tuple[int, ...] = ()
    ropes: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows, like = self.count * self.group, {"device": self.device}
        self.prompt_lengths = torch.zeros(self.count, dtype=torch.long, **like)
        self.lengths = torch.zeros(rows, dtype=torch.long, **like)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, **like)
        self.coefficients = torch.zeros(rows, self.deltas, **like)
        self.written = Completions(
            torch.zeros(rows, self.room, dtype=torch.long, **like),
            torch.zeros(rows, self.room, **like),
            torch.zeros(rows, self.room, dtype=torch.long, **like),
            *(torch.zeros(rows, dtype=torch.long, **like) for _ in range(2)),
            self.tokens[:, 0],
            torch.zeros(rows, dtype=torch.long, **like),
            self.lengths,
        )
        self.stop_ids = torch.empty(0, dtype=torch.long, **like)
        self.options = {name: torch.ones(rows, **like) for name in ("temperature", "top_p", "min_p")}
        self.options["top_k"] = torch.zeros(rows, dtype=torch.long, **like)
        self._graphs: dict[tuple | None, dict] = {None: self.graphs}

    def use_graphs(self, kind: tuple | None) -> None:
        """`graphs` are those of steps of this kind from now on."""
        self.graphs = self._graphs.setdefault(kind, {})

    def forget_graphs(self) -> None:
        for graphs in self._graphs.values():
            graphs.clear()

    def set_sampling(self, draws: Draws) -> tuple[str, ...]:
        """Take the sampling options and stop tokens of `draws` for all rows. Returns the names of the options in use."""
        for name, buffer in self.options.items():
            buffer.fill_(getattr(draws, name))
        if self.stop_ids.shape != draws.stop_ids.shape:
            self.stop_ids = draws.stop_ids.clone()
            self.forget_graphs()
        self.stop_ids.copy_(draws.stop_ids)
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return "temperature", *(name for name, unused in off.items() if getattr(draws, name) != unused)

    def begin(self, rows: torch.Tensor, draws: Draws, which: slice) -> None:
        """These rows (n,) have drawn nothing, and have the seeds and limits of the rows `which` of `draws`."""
        w, place, last = self.written, draws.place[which], draws.last[which]
        steps = place.unsqueeze(1) + torch.arange(self.room, device=self.device)
        w.seeds[rows] = draws.seeds[steps.minimum(last.unsqueeze(1))]
        w.seed[rows] = draws.seeds[place]
        w.count[rows], w.limit[rows] = torch.zeros_like(place), last - place + 1

    def deliver(self, rows: torch.Tensor, draws: Draws, first: torch.Tensor) -> None:
        """Write what these rows (n,) have drawn to its places in `draws`; first (n,): the place of a row's first token."""
        w = self.written
        # Beyond a row's tokens the last of them once more, so that nothing depends on their number.
        at = torch.arange(self.room, device=self.device).minimum(w.count[rows].unsqueeze(1) - 1)
        place = (first.unsqueeze(1) + at).flatten()
        tokens, logprobs = (t[rows].gather(1, at).flatten() for t in (w.tokens, w.logprobs))
        draws.tokens.index_copy_(0, place, tokens)
        draws.logprobs.index_copy_(0, place, logprobs)
        draws.ended.index_copy_(0, place, (tokens.unsqueeze(1) == draws.stop_ids).any(1))
        draws.valid.index_fill_(0, place, True)

    def fits(self, count: int, width: int, group: int, room: int) -> bool:
        return self.count >= count and self.width >= width and self.group == group and self.room >= room

    @property
    def buckets(self) -> list[int]:
        return sorted({min(1 << i, self.count) for i in range(self.count.bit_length() + 1)})

    def rope(self, model: ConditionedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The model's tables of rotary embeddings for every position that fits in a slot."""
        if not self.ropes:
            self.ropes = [
                (cos.contiguous(), sin.contiguous())
                for cos, sin in rope_tables(model, self.width + self.room)
            ]
        return self.ropes

    def allocate(self, layer: int, keys: torch.Tensor) -> None:
        """Allocate the keys and values of a layer. keys: the prompts' keys (P, Hkv, S, D), for their form."""
        if layer in self.prompts:
            return
        _, heads, _, size = keys.shape
        self.prompts[layer] = tuple(keys.new_zeros(self.count, heads, self.width, size) for _ in range(2))
        self.own[layer] = tuple(
            keys.new_zeros(self.count * self.group, heads, self.room, size) for _ in range(2)
        )

    def convert(self, layers: Mapping[str, ConditionedLinear]) -> None:
        """Copy the layers' current factors, converted to the model's dtype. Once per rollout, not in every step."""
        for name, layer in layers.items():
            dtype, own = layer.weight.dtype, (layer.lora_a, layer.lora_b)
            if own[0].dtype is dtype:
                continue
            if name not in self.factors:
                self.factors[name] = tuple(torch.empty_like(t, dtype=dtype) for t in own)
            for kept, t in zip(self.factors[name], own):
                kept.copy_(t)

    def move(self, source: int, target: int) -> None:
        """Move a group from one slot to another."""
        for buffers in self.prompts.values():
            for buffer in buffers:
                buffer[target] = buffer[source]
        self.prompt_lengths[target] = self.prompt_lengths[source]
        rows = slice(source * self.group, (source + 1) * self.group)
        there = slice(target * self.group, (target + 1) * self.group)
        for buffers in self.own.values():
            for buffer in buffers:
                buffer[there] = buffer[rows]
        w = self.written
        of_rows = (self.tokens, w.tokens, w.logprobs, w.seeds, w.count, w.limit, w.seed)
        for buffer in (self.lengths, self.coefficients, *of_rows):
            buffer[there] = buffer[rows]
        w.limit[rows] = 0


@dataclass
class Step:
    """One token for the rows of the first `count` slots. The masks are made once for all layers."""

    slots: Slots
    count: int
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.count * self.slots.group

    def positions(self) -> torch.Tensor:
        """(rows, 1), the positions of the tokens being read."""
        prompts = self.slots.prompt_lengths[: self.count].repeat_interleave(
            self.slots.group, output_size=self.rows
        )
        return (prompts + self.slots.lengths[: self.rows]).unsqueeze(1)

    def mask(self, window: int | None) -> torch.Tensor:
        """(rows, width + room) bool, the keys that each row's token attends to."""
        if window not in self._masks:
            s, device = self.slots, self.slots.device
            now = self.positions()
            lengths = (now - s.lengths[: self.rows].unsqueeze(1)).squeeze(1)  # lengths of the rows' prompts
            prompt, own = torch.arange(s.width, device=device), torch.arange(s.room, device=device)
            seen = torch.cat([prompt < lengths.unsqueeze(1), own <= s.lengths[: self.rows].unsqueeze(1)], 1)
            if window is not None:
                at = torch.cat([prompt.expand(self.rows, -1), lengths.unsqueeze(1) + own], 1)
                seen = seen & (at > now - window)
            self._masks[window] = seen
        return self._masks[window]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for the step in force.

    query (rows, Hq, 1, D), key and value (rows, Hkv, 1, D) -> ((rows, 1, Hq, D), None). Key and value are stored in the rows'
    own buffers.
    """
    step = in_force.get()
    slots, rows, layer = step.slots, step.rows, module.layer_idx
    (prompt_keys, prompt_values), own = slots.prompts[layer], slots.own[layer]
    at = slots.lengths[:rows]
    everyone = torch.arange(rows, device=query.device)
    for buffer, new in zip(own, (key, value)):
        buffer[everyone, :, at] = new[:, :, 0]
    heads, size = key.shape[1], query.shape[-1]
    shared = query.shape[1] // heads
    # by_row (rows, Hkv, g, D): the query heads of a key head. Then (count, Hkv, group * g, D): those of a whole group.
    by_row = query.view(rows, heads, shared, size)
    by_group = by_row.view(step.count, slots.group, heads, shared, size).transpose(1, 2).flatten(2, 3)
    scores = torch.cat(
        [
            (by_group @ prompt_keys[: step.count].transpose(2, 3))
            .view(step.count, heads, slots.group, shared, -1)
            .transpose(1, 2)
            .reshape(rows, heads, shared, -1),
            by_row @ own[0][:rows].transpose(2, 3),
        ],
        -1,
    ).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~step.mask(sliding_window)[:, None, None], -torch.inf)
    shares = scores.softmax(-1).to(value.dtype)
    on_prompt = (
        shares[..., : slots.width]
        .view(step.count, slots.group, heads, shared, -1)
        .transpose(1, 2)
        .flatten(2, 3)
        @ prompt_values[: step.count]
    )
    out = (
        on_prompt.view(step.count, heads, slots.group, shared, size)
        .transpose(1, 2)
        .reshape(rows, heads, shared, size)
        + shares[..., slots.width :] @ own[1][:rows]
    )
    return out.reshape(rows, 1, heads * shared, size), None


AttentionInterface.register(NAME, slot_attention)
