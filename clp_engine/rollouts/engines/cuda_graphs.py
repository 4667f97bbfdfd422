"""Decoding by CUDA graphs over fixed slots: on a GPU a decode step, the draw of its tokens included, is one launch.

    step of a graph     logits of the last tokens; the next tokens, log-probs, ends, lengths and seeds (`slots.Slots.written`)

Beside the model's own launches a step has three (two to draw, one to record; more with top_k, top_p or min_p). The host looks
every few steps which rows run. Drawing outside the graph took some twelve launches and as many tensor operations a token, and a
copy of all logits (39 MB a token for 64 rows of 152,064 in bfloat16, 9 us at 4.3 TB/s by count). Rows that a stop string may
end are drawn outside still, as their text is read on the host.

Graphs and their buffers (`slots`) outlive the rollout. A graph is captured again after a parameter has moved. Work that other
threads launch during a capture (a reward on the GPU) does not break it. A capture that fails is tried once more. If that fails,
too, the rollout's steps of that size run without a graph, with a warning; with CLP_ENGINE_DECODING=native that is an error. On
other devices the same step runs without a graph.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator

import torch
from clp_kernels import decode_step, sample_tokens
from clp_kernels.backends import forced_backend
from clp_kernels.decoder import Draws
from clp_kernels.launch_errors import launch_errors
from torch import nn

from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.rollouts.engines import fused_step, llama_weights, trials
from clp_engine.rollouts.engines.base import DecoderRequest, steps_between_looks
from clp_engine.rollouts.engines.fused_step import FusedStep
from clp_engine.rollouts.engines.slots import NAME, Slots, Step, in_force, round_up
from clp_engine.rollouts.engines.trials import Unsupported

logger = logging.getLogger(__name__)

_WARM_UP = 3  # steps before capture, in which libraries choose algorithms and allocate memory
# The slots of each model's last rollout, for reuse. The plans of models, including those that are not served.
_SLOTS: weakref.WeakKeyDictionary[nn.Module, Slots] = weakref.WeakKeyDictionary()
_PLANS: weakref.WeakKeyDictionary[nn.Module, FusedStep] = weakref.WeakKeyDictionary()


def serves(model: ConditionedModel) -> bool:
    """Whether every step of the model does the same work on the same buffers: low-rank factors, attention that packs."""
    return (
        isinstance(model.backbone, CausalBackbone)
        and model.backbone.packing_fault is None
        and all(isinstance(layer, ConditionedLinear) for layer in model.layers.values())
    )


def plan(model: ConditionedModel) -> FusedStep:
    """The plan for computing this model's step.

    The plan is made at the first call and kept while the base weights stay the same. Hooks and other changes to the modules are
    checked at every call.
    """
    kept = trials.current(_PLANS, model, tuple(llama_weights.frozen_weights(model)), _make)
    try:
        if kept.reason is None:
            llama_weights.check_modules(model, llama_weights.base_dtype(model), model.device)
    except Unsupported as error:
        return FusedStep(None, {}, str(error))
    return kept


def choose(model: ConditionedModel) -> FusedStep | None:
    """The plan of a model whose step is fused, or None.

    None also with CLP_ENGINE_DECODING=torch, which selects transformers' modules, and if a kernel back-end that does not run on
    a GPU is forced.
    """
    if forced_backend() in ("reference", "cpu"):
        return None
    return trials.unless_refused(lambda: plan(model))


def _make(model: ConditionedModel, identity: tuple) -> FusedStep:
    def make() -> FusedStep:
        made = fused_step.read(model, identity)
        _verify(model, made)
        return made

    return trials.made_or_refused(model, make, lambda reason: FusedStep(None, {}, reason, identity))


def _verify(model: ConditionedModel, made: FusedStep) -> None:
    """Raises Unsupported if the fused step and transformers' modules differ over the same slots."""
    trial = trials.Trial.of(model)
    before = _SLOTS.pop(model, None)
    try:
        decoder = GraphDecoder(trial.request, made)
        decoder.add(*trial.prompts)
        tolerance = fused_step.TOLERANCE[llama_weights.base_dtype(model)]
        for tokens in trial.tokens:
            trials.check_alike(model, *decoder.compared(tokens), tolerance)
    finally:
        _SLOTS.pop(model, None)
        if before is not None:
            _SLOTS[model] = before


class GraphDecoder:
    """Logits of slots, each row under its blend; see `base.StepDecoder`. A slot is free after the last of its rows has left.

    fused: the model's plan, None for transformers' modules.
    """

    drop_share = 0.25  # dropping rows moves groups, and may require the capture of another graph

    def __init__(self, request: DecoderRequest, fused: FusedStep | None = None):
        self._request, self._model, self._group, self._fused = request, request.model, request.group, fused
        self._slots = _slots_for(request)
        self._uncaptured: set[int] = set()  # the numbers of slots whose step no graph holds
        with torch.no_grad():
            self._slots.convert(self._model.layers)
        self._taken = [0] * self._slots.count  # running rows in each slot
        # The place of each running row in the slots' buffers, and of its first token among those of all rows.
        self._rows = torch.empty(0, dtype=torch.long, device=self._model.device)
        self._first = self._rows
        self._options: tuple[str, ...] | None = None  # of a step that draws, those in use
        self._left = 0  # steps after which every row has ended
        self._slots.use_graphs(None)
        self._slots.written.limit.zero_()

    @property
    def places(self) -> int:
        return self._taken.count(0)

    def add(self, ids: torch.Tensor, mask: torch.Tensor, blend: torch.Tensor | None) -> torch.Tensor:
        s, backbone = self._slots, self._model.backbone
        with self._model.blend.use(blend):
            hidden, context = backbone.prefill(ids, mask)
            logits = backbone.head.logits(hidden[:, -1])
        free = [slot for slot, rows in enumerate(self._taken) if rows == 0][: len(ids)]
        for slot in free:
            self._taken[slot] = self._group
        where = torch.tensor(free, device=s.device)
        # A prompt starts at position 0 of its slot, so its padding moves behind it.
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
        s.tokens[self._rows, 0] = tokens
        logits = self._run(self._bucket(self._used()))[self._rows]
        s.lengths[self._rows] += 1
        return logits

    def write(
        self, logits: torch.Tensor, draws: Draws, others_wait: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `base.StepDecoder`. The rows left have drawn a token that they have not read, so that they have no logits.

        It pays to return when other prompts could have a slot, or when the slots in use fit in a smaller bucket.
        """
        s = self._slots
        self._options = s.set_sampling(draws)
        s.use_graphs(self._options)
        if joined := len(logits):
            new = slice(len(self._rows) - joined, None)
            self._first = torch.cat([self._first, draws.place[new]])
            s.begin(self._rows[new], draws, new)
            self._draw(logits, self._rows[new])
            self._left = self._request.room - 1
        every = steps_between_looks(s.device)
        while True:
            running = (s.written.count < s.written.limit)[self._rows]
            rows, runs = torch.stack(
                [self._rows, running.long()]
            ).tolist()  # the host waits for the device here
            used = {row // self._group for row, going_on in zip(rows, runs) if going_on}
            if (
                not used
                or self._bucket(len(used)) < self._bucket(self._used())
                or others_wait
                and len(used) < s.count
            ):
                break
            for _ in range(max(1, min(every, self._left))):
                self._run(self._bucket(self._used()))
            self._left -= every
        return self._without_ended(running, draws), logits[:0]

    def _draw(self, logits: torch.Tensor, rows: torch.Tensor | slice) -> None:
        """Draw a token of these rows from logits (n, V), and record it. rows: their places, or the slice of the first n."""
        s = self._slots
        options = {name: s.options[name][rows] for name in self._options}
        drawn = sample_tokens(logits, seeds=s.written.seed[rows], **options)
        decode_step.record(*drawn, s.stop_ids, s.written, None if isinstance(rows, slice) else rows)

    def _without_ended(self, runs: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Deliver the tokens of rows that have ended, and continue without them. Returns the indices of the others."""
        s, ended, left = self._slots, (~runs).nonzero()[:, 0], runs.nonzero()[:, 0]
        s.deliver(self._rows[ended], draws, self._first[ended])
        draws.place = self._first[left] + s.written.count[self._rows[left]]
        draws.last = draws.last[left]
        self._first = self._first[left]
        self.keep(left)
        return left

    def _used(self) -> int:
        """The number of slots, from the first, that hold all running rows."""
        return max((i + 1 for i, rows in enumerate(self._taken) if rows), default=1)

    def _bucket(self, used: int) -> int:
        """The number of slots of a step. Libraries sum products of one shape in one order, whatever its rows hold."""
        if self._request.alone:
            return self._slots.count
        return next(b for b in self._slots.buckets if b >= used)

    def keep(self, rows: torch.Tensor) -> None:
        self._rows = self._rows[rows]
        groups = (self._rows // self._group).tolist()
        self._taken = [groups.count(slot) for slot in range(len(self._taken))]
        if not self._request.alone:
            self._close_ranks()

    def _close_ranks(self) -> None:
        """Move groups to the first slots if a smaller bucket then suffices."""
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
        """The logits (count * group, V) after the tokens in the buffers."""
        s = self._slots
        if s.device.type == "cuda" and count not in s.graphs and count not in self._uncaptured:
            self._try_capture(count)
        if count not in s.graphs:
            return self._whole(count)
        graph, logits = s.graphs[count]
        graph.replay()
        return logits

    def _try_capture(self, count: int) -> None:
        for last in (False, True):
            try:
                self._slots.graphs[count] = self._capture(count)
                return
            except launch_errors() as error:
                if last and trials.insisted():
                    raise
                logger.warning(
                    "decoding %d slots in a CUDA graph: the capture failed (%s); %s",
                    count,
                    error,
                    "this rollout decodes without the graph" if last else "it is tried once more",
                )
        self._uncaptured.add(count)

    def _capture(self, count: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # A step writes the same keys and values to the same places however often it runs. What it draws is drawn again.
        w = self._slots.written
        moving = [(t, t.clone()) for t in (w.count, w.limit, w.last, w.seed, w.lengths)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._whole(count)
        finally:  # also for the step that runs without a graph, if this one fails
            torch.cuda.current_stream().wait_stream(side)
            for buffer, before in moving:
                buffer.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._whole(count)
        return graph, logits

    def _whole(self, count: int) -> torch.Tensor:
        """What a graph holds: the logits (count * group, V), and if rows draw by themselves the draw from them."""
        logits = self._forward(count)
        if self._options is not None:
            self._draw(logits, slice(0, count * self._group))
        return logits

    def compared(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `step`, with (logits of the fused step, logits of transformers' modules)."""
        s, count = self._slots, self._slots.count
        s.tokens[self._rows, 0] = tokens
        found = self._forward(count), self._forward_of_modules(count)
        s.lengths[self._rows] += 1
        return tuple(logits[self._rows] for logits in found)

    @contextlib.contextmanager
    def _blended(self, step: Step) -> Iterator[None]:
        s, model = self._slots, self._model
        # A new tensor object, so that values derived from other coefficients at the same address are not reused.
        blend = s.coefficients[: step.rows]
        with model.blend.use(blend, factors={model.layers[name]: kept for name, kept in s.factors.items()}):
            yield

    def _forward(self, count: int) -> torch.Tensor:
        if self._fused is None:
            return self._forward_of_modules(count)
        step = Step(self._slots, count)
        with self._blended(step):
            return fused_step.logits(self._model, self._fused, step)

    def _forward_of_modules(self, count: int) -> torch.Tensor:
        s = self._slots
        step = Step(s, count)
        token = in_force.set(step)
        try:
            with self._blended(step), self._model.backbone.attention(NAME):
                hidden = self._model.backbone.decoder(
                    input_ids=s.tokens[: step.rows], position_ids=step.positions(), use_cache=False
                ).last_hidden_state
                return self._model.backbone.head.logits(hidden[:, -1])
        finally:
            in_force.reset(token)


def _slots_for(request: DecoderRequest) -> Slots:
    """The slots of the model's last rollout if they are large enough, otherwise new ones."""
    model, at_once, group = request.model, request.at_once, request.group
    addresses = tuple(p.data_ptr() for p in model.parameters())
    slots = _SLOTS.get(model)
    width, room = round_up(request.longest), round_up(request.room)
    if slots is None or not slots.fits(at_once, width, group, room) or slots.device != model.device:
        slots = _SLOTS[model] = Slots(at_once, width, group, room, model.device, model.deltas)
    if slots.parameters != addresses:
        slots.parameters, slots.factors = addresses, {}
        slots.forget_graphs()
    return slots
