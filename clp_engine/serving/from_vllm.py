"""A run whose completions come from a vLLM server: the steering page before `vllm serve` with the plug-in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.policy.steering import Description
from clp_engine.rollouts.engines.vllm.draws import parameters_of
from clp_engine.rollouts.engines.vllm.server import Lost, Server, said
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving.batching import Full
from clp_engine.serving.guards import Refused
from clp_engine.serving.served import Completion, Source
from clp_engine.training import running

_SECONDS = 120.0  # without a byte of an answer
_AT_ONCE = 32  # completions that are asked for, each in a thread


class FromVllm(Source):
    """The policy of a run as a vLLM server serves it. Its weights are not loaded here.

    url: the server's, as http://localhost:8000. model: the name of the stack there (--lora-modules NAME=FOLDER); None: the only
    adapter that the server has. The key of a server that asks for one is in VLLM_API_KEY.

    Raises ConfigError where the server does not answer, has no such model, or does not blend.
    """

    def __init__(self, run: str | Path, url: str, model: str | None = None, most_tokens: int = 2048):
        super().__init__(Path(run), Description.read(running.policy_directory(run)))
        self.room, self._server = most_tokens, Server(url, timeout=_SECONDS)
        self._threads, self._asked = ThreadPoolExecutor(_AT_ONCE), set[Future]()
        try:
            self._base, self._model = self._names(model)
            self._server.check_blending(self._model)
            self._check_stack()
        except Lost as lost:
            raise ConfigError(
                f"vLLM at {url} does not answer ({lost}); start it, or give its address"
            ) from None

    def _names(self, asked: str | None) -> tuple[str, str]:
        """Names of the base model and of the stack on the server."""
        base, adapters = self._server.models()
        if (asked or "") not in ("", *adapters) or asked is None and len(adapters) != 1:
            raise ConfigError(
                f"vLLM at {self._server.url} has the adapters {', '.join(adapters) or '(none)'}; give one of them with "
                "--model, and serve the run as one: clp-engine export RUN --to FOLDER --stack, then vllm serve ... "
                "--lora-modules NAME=FOLDER"
            )
        return base, asked or adapters[0]

    def _check_stack(self) -> None:
        weights = json.dumps(
            {"weights": dict.fromkeys(self.policy.objectives, 1 / len(self.policy.objectives))}
        )
        body = {"model": self._model, "prompt": [1, 1], "max_tokens": 1, "vllm_xargs": {"clp": weights}}
        status, answer = self._server.ask("POST", "/v1/completions", body)
        if status != 200:
            raise ConfigError(
                f"{self._model} on vLLM at {self._server.url} is no stack of this run ({said(answer)}); give the name of the "
                "one that clp-engine export --stack wrote from it"
            )

    async def complete(
        self, ids: Sequence[int], conditions: Conditions, sampling: SamplingParams, seed: int
    ) -> Completion:
        """As `Source.complete`. Raises ConfigError for what the server refuses, Refused (502) where it does not answer, and
        Full where _AT_ONCE completions are asked for already, with those of clients that have left."""
        body: dict[str, Any] = {
            **parameters_of(sampling),
            "model": self._base,
            "prompt": list(ids),
            "seed": seed,
            "return_token_ids": True,
        }
        if bool(conditions.weights.any()):
            weights = dict(zip(self.policy.objectives, conditions.weights[0].tolist()))
            asked = {"weights": weights} | ({} if self.kl_fixed else {"kl": conditions.kl[0].item()})
            body |= {"model": self._model, "vllm_xargs": {"clp": json.dumps(asked)}}
        if len(self._asked) >= _AT_ONCE:
            raise Full(f"{_AT_ONCE} completions are asked for already")
        answering = self._threads.submit(self._server.ask, "POST", "/v1/completions", body, _SECONDS)
        self._asked.add(answering)
        answering.add_done_callback(self._asked.discard)
        try:
            status, answer = await asyncio.wrap_future(answering)
        except Lost as lost:
            raise Refused(
                502, f"vLLM at {self._server.url} does not answer ({lost}); is it running?"
            ) from None
        if status != 200:
            raise ConfigError(f"vLLM refused the request ({status}): {said(answer)}")
        (choice,) = answer["choices"]
        return Completion(choice["text"], len(choice["token_ids"]), choice["finish_reason"] == "length")
