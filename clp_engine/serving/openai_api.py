"""OpenAI's API over a policy: /v1/models, /v1/chat/completions and /v1/completions, whole or as server-sent events."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from clp_engine.core.errors import ConfigError
from clp_engine.data.prompts import encode_prompts
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.batching import Event, Failed
from clp_engine.serving.guards import Json, Refused, read_json, unless_gone
from clp_engine.serving.openai_requests import OpenAIRequest
from clp_engine.serving.served import Served, Ticket

DEFAULT_TOKENS = 128  # of a completion, if neither the request nor the run's training says how many
_ENTRIES = 200_000  # tokens with log-probs of one answer: it is written in the thread that answers everybody


class OpenAIRoutes:
    """The routes of a served policy."""

    def __init__(self, served: Served):
        self._served, self._created = served, int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]

    # -- models -------------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return Json(self._described())

    def _described(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "clp-engine",
            "objectives": list(served.policy.objectives),
            "max_model_len": served.policy.room.tokens,
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._served.name):
            message = f"the model {name!r} does not exist; this server has {self._served.name!r}"
            raise Refused(404, message, code="model_not_found", param="model")

    # -- completions --------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        asked = OpenAIRequest.parse(await read_json(request), chat)
        self._check_model(asked.model)
        form = (_Chat if chat else _Text)(self._served, asked)
        with contextlib.ExitStack() as stack:
            ticket = stack.enter_context(self._ticket(asked))
            if not asked.stream:
                return Json(await unless_gone(request, form.whole(ticket)))
            return _Streamed(form, ticket, stack.pop_all())

    def _ticket(self, asked: OpenAIRequest) -> Ticket:
        served = self._served
        served.check_rows(len(asked.prompts) * asked.n)  # before the prompts are read
        conditions = served.conditions(asked.weights, asked.kl, asked.base)
        prompts, options = [], (asked.temperature, asked.top_k, asked.top_p, asked.min_p)
        for i, prompt in enumerate(asked.prompts):
            where = "the prompt" if len(asked.prompts) == 1 else f"prompt {i}"
            ids = _encoded(prompt, served.policy.tokenizer)
            ids = served.read(ids, conditions, None if _is_ids(prompt) else prompt)
            tokens = asked.max_tokens or self._default_tokens(len(ids))
            served.check(ids, tokens, where)
            prompts.append((ids, SamplingParams(tokens, *options)))
        if asked.top is not None:
            _check_entries(sum(s.max_new_tokens for _, s in prompts) * asked.n * (asked.top + 1))
        return served.ticket(prompts, conditions, asked.seed, n=asked.n, stop=asked.stop, top=asked.top or 0)

    def _default_tokens(self, prompt: int) -> int:
        """As many as in training, as far as the model has room for them after a prompt of so many tokens."""
        served = self._served
        tokens = min(served.config.get("max_completion_length") or DEFAULT_TOKENS, served.room)
        room = served.policy.room
        left = tokens if room.tokens is None or room.apart else room.tokens - prompt
        return max(1, min(tokens, left))


def _check_entries(entries: int) -> None:
    if entries > _ENTRIES:
        raise ConfigError(
            f"logprobs: the answer may have {entries:,} tokens with their log-probs, and at most {_ENTRIES:,} are given; "
            "ask for fewer completions, tokens or likeliest tokens"
        )


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int))


def _encoded(prompt: Any, tokenizer: Any) -> list[int]:
    if _is_ids(prompt):
        return prompt
    if not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("this policy's tokenizer has no chat template; use /v1/completions")
    return encode_prompts([prompt], tokenizer)[0]


class _Streamed(StreamingResponse):
    """An answer as server-sent events. stack: is left when the answer has been sent, or its client has gone."""

    def __init__(self, form: _Form, ticket: Ticket, stack: contextlib.ExitStack):
        super().__init__(_sent(form, ticket), media_type="text/event-stream")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack:
            await super().__call__(scope, receive, send)


async def _sent(form: _Form, ticket: Ticket) -> AsyncIterator[bytes]:
    """An error after the first event is an event, because the status is sent."""
    try:
        async for chunk in form.chunks(ticket):
            yield _event(chunk)
    except Exception as error:
        message = str(error)
        if not isinstance(error, Failed):
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
        return
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


# -- the form of answers -----------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """A completion so far."""

    text: str = ""
    events: list[Event] = field(default_factory=list)
    offset: int = 0  # characters of the text before the tokens that `events` holds


class _Form(ABC):
    """The answer to one request, in the form of its endpoint."""

    kind = chunk = prefix = ""

    def __init__(self, served: Served, asked: OpenAIRequest):
        self._asked, self._spelled = asked, served.spelled
        self._about = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.name,
        }

    @abstractmethod
    def choice(self, index: int, so_far: _Choice) -> dict[str, Any]:
        """A whole completion."""

    @abstractmethod
    def delta(self, index: int, so_far: _Choice, event: Event) -> dict[str, Any]:
        """What an event adds to a completion."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What precedes the events of a completion."""
        return None

    async def whole(self, ticket: Ticket) -> dict[str, Any]:
        choices = [_Choice() for _ in ticket.rows]
        async for index, event in ticket.events():
            choices[index].text += event.text
            choices[index].events.append(event)
        answers = [self.choice(i, choice) for i, choice in enumerate(choices)]
        return {**self._about, "object": self.kind, "choices": answers, "usage": _usage(ticket)}

    async def chunks(self, ticket: Ticket) -> AsyncIterator[dict[str, Any]]:
        # With include_usage every chunk has the field, null before the last.
        usage = {"usage": None} if self._asked.include_usage else {}
        about = {**self._about, "object": self.chunk}
        choices: dict[int, _Choice] = {}
        async for index, event in ticket.events():
            if index not in choices:
                choices[index] = _Choice()
                if (opening := self.opening(index)) is not None:
                    yield {**about, "choices": [opening], **usage}
            so_far = choices[index]
            if event.text or event.finish or self._asked.top is not None:
                yield {**about, "choices": [self.delta(index, so_far, event)], **usage}
            so_far.offset += len(event.text)
        if usage:
            yield {**about, "choices": [], "usage": _usage(ticket)}


def _usage(ticket: Ticket) -> dict[str, int]:
    prompt, completion = ticket.prompt_tokens, ticket.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Chat(_Form):
    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, so_far: _Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": so_far.text, "refusal": None},
            "logprobs": self._logprobs(so_far.events),
            "finish_reason": so_far.events[-1].finish,
        }

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, so_far: _Choice, event: Event) -> dict[str, Any]:
        delta = {"content": event.text} if event.text else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs([event]),
            "finish_reason": event.finish,
        }

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        if self._asked.top is None:
            return None
        content = [
            self._entry(e.token, e.logprob) | {"top_logprobs": [self._entry(*top) for top in e.top]}
            for e in events
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._spelled(token)
        # A token with a part of a character has other bytes than its text, in which the part is U+FFFD.
        known = None if "\ufffd" in spelled else list(spelled.encode("utf-8", "replace"))
        return {"token": spelled, "logprob": logprob, "bytes": known}


class _Text(_Form):
    kind = chunk = "text_completion"
    prefix = "cmpl-"

    def choice(self, index: int, so_far: _Choice) -> dict[str, Any]:
        return self._choice(index, so_far.text, so_far.events, 0)

    def delta(self, index: int, so_far: _Choice, event: Event) -> dict[str, Any]:
        return self._choice(index, event.text, [event], so_far.offset)

    def _choice(self, index: int, text: str, events: Sequence[Event], offset: int) -> dict[str, Any]:
        finish = events[-1].finish
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(events, offset),
            "finish_reason": finish,
        }

    def _logprobs(self, events: Sequence[Event], offset: int) -> dict[str, Any] | None:
        """text_offset: where the text stood before each token."""
        if self._asked.top is None:
            return None
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += len(event.text)
        return {
            "tokens": [self._spelled(e.token) for e in events],
            "token_logprobs": [e.logprob for e in events],
            # Of tokens that are spelled alike the likeliest stays.
            "top_logprobs": [{self._spelled(token): p for token, p in reversed(e.top)} for e in events]
            if self._asked.top
            else None,
            "text_offset": offsets,
        }
