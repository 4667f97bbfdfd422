"""A policy behind a server: its running batch, and the tickets with which requests wait for their completions."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.core.seeds import derive
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.batching import Event, Failed, Row, RunningBatch
from clp_engine.serving.metrics import Metrics
from clp_engine.serving.stream_text import StreamText
from clp_engine.training import running
from clp_engine.training.runs import run_spec

if TYPE_CHECKING:
    from clp_engine.policy.policy import ConditionedPolicy
    from clp_engine.policy.steering import Description


_SPELLED = 1 << 16  # tokens whose text is remembered


@dataclass(frozen=True)
class Limits:
    """max_rows: the most completions that are decoded together. queue: the most that wait.

    max_prompt_tokens, max_new_tokens: the most tokens of a prompt and of a completion. Buffers are allocated for
    max_rows completions of these lengths, so that large limits take memory.
    """

    max_rows: int = 32
    queue: int = 256
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 1024


class Completion(NamedTuple):
    """tokens: how many it has. cut: whether the limit of tokens ended it."""

    text: str
    tokens: int
    cut: bool


class Ticket:
    """The completions of one request. Used in the thread of the event loop, as a context manager: rows that still run at its
    end are cancelled."""

    def __init__(self, served: Served, prompt_tokens: int):
        self._served, self._metrics = served, served.metrics
        self.rows: list[Row] = []
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._begun = time.perf_counter()
        self._first: dict[int, float] = {}

    def deliver(self, index: int, event: Event) -> None:
        """Take an event of a row, and count it: a client that reads slowly, or has left, changes no metric."""
        if event.error is None:
            self.completion_tokens += 1
            self._measure(index, event)
        self._events.put_nowait((index, event))

    def __enter__(self) -> Ticket:
        self._served.batch.submit(self.rows)
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        return self

    def __exit__(self, *error: object) -> None:
        self._served.batch.cancel(self.rows)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(row, event) until every row has ended. Raises Failed with the message of the error that ended a row."""
        left = len(self.rows)
        while left:
            index, event = await self._events.get()
            if event.error is not None:
                raise Failed(event.error)
            left -= event.finish is not None
            yield index, event

    def _measure(self, index: int, event: Event) -> None:
        now, metrics = time.perf_counter(), self._metrics
        metrics.completion_tokens.inc()
        if index not in self._first:
            self._first[index] = now
            metrics.first_token.observe(now - self._begun)
        if event.finish is not None and (more := self.rows[index].drawn - 1):
            metrics.token.observe((now - self._first[index]) / more)


class Source(ABC):
    """A run that answers: its files, its policy, and what a request asks of it.

    run: a run folder, or a policy folder or checkpoint in it. policy: with its weights, or a `Description`. name: of the model,
    for clients. room: the most tokens of a completion.
    """

    room: int

    def __init__(self, run: Path, policy: ConditionedPolicy | Description):
        self.run, self.policy = run, policy
        self.spec = run_spec.RunSpec.find(run)
        self.config: dict[str, Any] = {} if self.spec is None else self.spec.config
        folder = run.resolve()
        self.name = folder.name if folder.name != "policy" else folder.parent.name

    @abstractmethod
    async def complete(
        self, ids: Sequence[int], conditions: Conditions, sampling: SamplingParams, seed: int
    ) -> Completion:
        """The completion of a prompt, as the model reads it, under one condition."""

    def check(self, ids: Sequence[int], max_new_tokens: int, where: str) -> None:
        """Raises ConfigError for a prompt that cannot be completed here."""
        if not ids:
            raise ConfigError(f"{where} has no tokens; it needs at least one")

    def conditions(self, weights: Any = None, kl: Any = None, base: bool = False) -> Conditions:
        """The condition of a request. Raises ConfigError for one that the policy cannot take."""
        if base:
            if weights is not None or kl is not None:
                raise ConfigError(
                    "base: true is the base model, which takes no weights and no kl; leave them out"
                )
            return Conditions.reference(1, len(self.policy.objectives))
        if kl is not None and (reason := self.kl_fixed) is not None:
            raise ConfigError(f"kl was given, and {reason[0].lower()}{reason[1:]}")
        return self.policy.conditions(weights, kl)

    @property
    def kl_fixed(self) -> str | None:
        """The reason why the policy is the same at every KL coefficient, or None."""
        name, spec = "beta" if self.policy.kl_is_beta else "alpha", self.policy.spec
        if spec.kl_conditioning != "none" or "{kl}" in (spec.prompt_template or ""):
            return None
        return f"The policy is not conditioned on {name}: kl_conditioning was none in training, so it is the same at any value."

    def read(self, token_ids: Sequence[int], conditions: Conditions, prompt: Any = None) -> list[int]:
        """The tokens that the model reads for a prompt under a condition (prompt conditioning adds some)."""
        shown = self.policy.shown_prompts([list(token_ids)], conditions, None if prompt is None else [prompt])
        return list(token_ids) if shown is None else shown[0]


class Served(Source):
    """The policy of a run, and the thread that decodes its running batch between `begin` and `end`.

    run: a run folder, or a policy folder or checkpoint in it. name: of the model, for clients.
    Raises ConfigError where the run has no policy, the policy has no tokenizer, or its rows cannot join a batch.
    """

    def __init__(self, run: str | Path, device: str | None = None, limits: Limits | None = None):
        limits = limits or Limits()
        super().__init__(Path(run), running.load_policy(run, device))
        if self.policy.tokenizer is None:
            raise ConfigError(f"{self.run}: the policy has no tokenizer; save it with one to give it text")
        most = self.policy.room.tokens
        self.longest, self.room = (
            limit if most is None else min(limit, most)
            for limit in (limits.max_prompt_tokens, limits.max_new_tokens)
        )
        self.queue, self.max_rows = limits.queue, limits.max_rows
        self.batch = RunningBatch(
            self.policy, max_rows=limits.max_rows, queue=limits.queue, longest=self.longest, room=self.room
        )
        self.metrics = Metrics(self.batch)
        self.spelled = functools.lru_cache(_SPELLED)(lambda token: self.policy.tokenizer.decode([token]))
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start decoding. Events are delivered in the event loop that runs now."""
        loop = asyncio.get_running_loop()
        self.batch.post = lambda events: _post(loop, events)
        self._thread = threading.Thread(target=self.batch.work, name="clp-batch", daemon=True)
        self._thread.start()

    async def end(self) -> None:
        """Stop decoding once all rows have ended or were cancelled."""
        self.batch.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def complete(
        self, ids: Sequence[int], conditions: Conditions, sampling: SamplingParams, seed: int
    ) -> Completion:
        with self.ticket([(ids, sampling)], conditions, seed) as ticket:
            events = [event async for _, event in ticket.events()]
        text = "".join(event.text for event in events)
        return Completion(text, len(events), events[-1].finish == "length")

    def check(self, ids: Sequence[int], max_new_tokens: int, where: str) -> None:
        """Raises ConfigError for a prompt that the model or this server cannot take."""
        super().check(ids, max_new_tokens, where)
        self.policy.room.check_prompt(ids, max_new_tokens, where, self.policy.tokenizer)
        for what, tokens, most, flag in (
            (where, len(ids), self.longest, "--max-prompt-tokens"),
            ("its completion", max_new_tokens, self.room, "--max-new-tokens"),
        ):
            if tokens > most:
                raise ConfigError(
                    f"{what} has up to {tokens:,} tokens; this server takes at most {most:,} ({flag})"
                )

    def check_rows(self, rows: int) -> None:
        """Raises ConfigError for more completions than the queue can ever hold."""
        if rows > self.queue:
            raise ConfigError(
                f"the request asks for {rows:,} completions; the queue of this server holds {self.queue}"
            )

    def ticket(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        conditions: Conditions,
        seed: int,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        top: int = 0,
    ) -> Ticket:
        """A ticket for n completions of each of these prompts (ids as the model reads them), under one condition.

        Completion i of prompt p is row p * n + i, and draws with the random numbers that it has in `rollout` with that seed.
        """
        rows = len(prompts) * n
        blend = self.policy.coefficients(conditions)
        blend = torch.zeros(self.policy.deltas) if blend is None else blend[0]
        ticket = Ticket(self, sum(len(ids) for ids, _ in prompts))
        for index, row_seed in enumerate(derive(seed, torch.arange(rows)).tolist()):
            text = StreamText(self.policy.tokenizer, stop)
            ids, sampling = prompts[index // n]
            ticket.rows.append(
                Row(ids, blend, sampling, row_seed, text, functools.partial(ticket.deliver, index), top)
            )
        return ticket


def _post(loop: asyncio.AbstractEventLoop, events: Sequence[tuple[Row, Event]]) -> None:
    try:
        loop.call_soon_threadsafe(_deliver, events)
    except RuntimeError:
        if not loop.is_closed():  # as Ctrl-C twice leaves it: nobody waits for events
            raise


def _deliver(events: Sequence[tuple[Row, Event]]) -> None:
    for row, event in events:
        row.deliver(event)
