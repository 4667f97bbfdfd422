"""The running batch of a server: completions of all weightings join it at the next token, and leave it when they end.

    one step    cancelled rows leave; waiting rows take the free places, each with a prefill of its own;
                every row draws a token; rows that have ended leave; the others are computed one token further

A row's tokens are those that the same row gets alone, bit for bit. Three things make it so. Each prompt is read by itself. The
decoder keeps a row's bits whatever the other rows are (`DecoderRequest.alone`). Token t of a row is drawn with the seed
derive(row seed, t), as in a rollout, so that `policy.generate` with the same seed gives the same text.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from clp_kernels import sample_tokens

from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.rollouts.engines.base import DecoderRequest, StepDecoder
from clp_engine.rollouts.engines.choice import detours, step_decoder
from clp_engine.rollouts.types import Samplable, SamplingParams
from clp_engine.serving.stream_text import StreamText


class Full(Exception):
    """As many rows wait as may."""


class Failed(Exception):
    """The engine failed on a row. The thread of the batch has printed the traceback."""


@dataclass(frozen=True)
class Event:
    """What a row has got in a step: a token, or the message of the error that ended the row.

    text: the text that is certain now. logprob: of the token, at the temperature, untruncated (`sample_tokens`).
    top: (token, log-prob) of the likeliest tokens, as many as the row asked for.
    finish: None while the row goes on; "stop" after an end token or a stop string, otherwise "length".
    """

    text: str = ""
    token: int = -1
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Row:
    """A completion to be drawn.

    ids: the prompt, as the model reads it. blend: (D,), zeros for the base model. seed: int64, see `clp_engine.rollout`.
    text: makes text of tokens, and knows the stop strings. deliver: called with every event of the row, the last of which has
    a finish or an error. top: the number of likeliest tokens to report with each token.
    """

    ids: Sequence[int]
    blend: torch.Tensor
    sampling: SamplingParams
    seed: int
    text: StreamText
    deliver: Callable[[Event], None]
    top: int = 0
    cancelled: bool = field(default=False, init=False)
    drawn: int = field(default=0, init=False)


def _in_turn(events: Sequence[tuple[Row, Event]]) -> None:
    for row, event in events:
        row.deliver(event)


class RunningBatch:
    """At most `max_rows` rows that are decoded together, and at most `queue` rows that wait.

    longest: the most tokens of a prompt. room: the most tokens of a completion.
    post: called in the thread of `work` with the events of a step; by default it delivers them there.
    Raises ConfigError for a model whose completions transformers' generate writes as wholes, and what its decoder raises.
    """

    def __init__(
        self,
        source: Samplable,
        *,
        max_rows: int,
        queue: int,
        longest: int,
        room: int,
        post: Callable[[Sequence[tuple[Row, Event]]], None] = _in_turn,
    ):
        model = source.conditioned
        if not model.shares_prompts:
            raise ConfigError(
                f"this model cannot be served, because rows cannot join a batch: {detours(model)[0]}"
            )
        self._stop_ids, self._device, self.post = set(source.profile.stop_token_ids), model.device, post
        self._request = DecoderRequest(model, True, longest, 1, room, max_rows, alone=True)
        self._queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._stopping = False
        self._reset()
        self._make_decoder()  # a fault ends the start, and not the first requests

    def _reset(self) -> None:
        self._running.clear()
        self._decoder: StepDecoder | None = None
        self._logits: torch.Tensor | None = None
        self._counters = torch.empty(0, 3, dtype=torch.long, device=self._device)  # seed, token number, top_k
        self._options = torch.empty(0, 3, device=self._device)  # temperature, top_p, min_p

    # -- from any thread ----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, rows: Sequence[Row]) -> None:
        """Let these rows wait for places. Raises Full, and takes none, where the queue has no room for all."""
        with self._changed:
            if self._stopping:
                raise Full("the server is stopping")
            if len(self._waiting) + len(rows) > self._queue:
                raise Full(
                    f"{len(self._waiting)} completions are waiting already; the queue holds {self._queue}"
                )
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Let these rows leave before the next token. They get no further event."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
            self._changed.notify()

    def stop(self) -> None:
        """Make `work` return once all rows have ended. No more rows are taken."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    # -- in one thread ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def work(self) -> None:
        """Decode until `stop`. An error of a step ends the rows that run, and the batch goes on with others.

        An error in making the next decoder ends the rows that wait: none of them could ever run.
        """
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                if not (self._waiting or self._running):
                    return
            try:
                self._step()
            except Exception as error:
                self._end(list(self._running) if self._decoder is not None else self._take_all(), error)
                self._reset()

    def _take_all(self) -> list[Row]:
        with self._changed:
            rows = [*self._running, *self._waiting]
            self._waiting.clear()
        return rows

    def _end(self, rows: Sequence[Row], error: Exception) -> None:
        """End these rows with an error. They get its message: the error itself holds the frames, and these the decoder."""
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
        self.post([(row, Event(error=message)) for row in rows if not row.cancelled])

    def _step(self) -> None:
        self._leave([not row.cancelled for row in self._running])
        self._join()
        if not self._running or self._logits is None:
            return
        tokens, events = self._draw(self._logits)
        self._leave([event.finish is None for _, event in events])
        # Clients get their tokens while the next ones are computed.
        self.post([(row, event) for row, event in events if not row.cancelled])
        if self._running and self._decoder is not None:
            stay = [i for i, (_, event) in enumerate(events) if event.finish is None]
            self._logits = self._decoder.step(tokens[torch.tensor(stay, device=tokens.device)])

    def _leave(self, stays: Sequence[bool]) -> None:
        """Continue with the rows that stay."""
        if all(stays):
            return
        at = torch.tensor([i for i, stay in enumerate(stays) if stay], dtype=torch.long, device=self._device)
        assert self._decoder is not None and self._logits is not None  # rows run
        self._decoder.keep(at)
        self._logits, self._counters, self._options = (
            t.index_select(0, at) for t in (self._logits, self._counters, self._options)
        )
        self._running = [row for row, stay in zip(self._running, stays) if stay]

    @torch.no_grad()
    def _make_decoder(self) -> StepDecoder:
        if self._decoder is None:
            self._decoder = step_decoder(self._request)
        return self._decoder

    def _join(self) -> None:
        """Waiting rows take the free places."""
        decoder = self._make_decoder()
        while decoder.places:
            with self._changed:
                if not self._waiting:
                    return
                row = self._waiting.popleft()
            s, places = row.sampling, decoder.places
            try:
                ids = torch.tensor([list(row.ids)], dtype=torch.long, device=self._device)
                blend = row.blend.to(self._device).unsqueeze(0)
                counters = torch.tensor([[row.seed, 0, s.top_k or 0]], dtype=torch.long, device=self._device)
                options = torch.tensor([[s.temperature, s.top_p or 1.0, s.min_p or 0.0]], device=self._device)
                first = decoder.add(ids, torch.ones_like(ids, dtype=torch.bool), blend)
            except Exception as error:
                self._end([row], error)
                if decoder.places != places:  # it holds a part of the row
                    raise
                continue
            # The decoder has the row: from here on an error ends it with those that run.
            self._running.append(row)
            joined = len(self._running) > 1 and self._logits is not None
            self._logits = torch.cat([self._logits, first.float()]) if joined else first.float()
            self._counters = torch.cat([self._counters, counters])
            self._options = torch.cat([self._options, options])

    def _draw(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[tuple[Row, Event]]]:
        """The next token of each row (n,), and its event."""
        seeds, count, top_k = self._counters.unbind(1)
        temperature, top_p, min_p = self._options.unbind(1)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        tokens, logprobs = sample_tokens(logits, seeds=derive(seeds, count), **options)
        self._counters[:, 1] += 1
        events = []
        for i, (row, token, logprob) in enumerate(zip(self._running, tokens.tolist(), logprobs.tolist())):
            row.drawn += 1
            text, stopped = row.text.push(token)
            ended = token in self._stop_ids or stopped
            finish = "stop" if ended else "length" if row.drawn == row.sampling.max_new_tokens else None
            if finish is not None:
                text += row.text.rest()
            top = self._top(logits[i], row) if row.top else ()
            events.append((row, Event(text, token, logprob, top, finish)))
        return tokens, events

    def _top(self, logits: torch.Tensor, row: Row) -> tuple[tuple[int, float], ...]:
        found = torch.log_softmax(logits.float() / (row.sampling.temperature or 1.0), -1).topk(
            min(row.top, len(logits))
        )
        return tuple(zip(found.indices.tolist(), found.values.tolist()))
