"""`vllm serve` elsewhere: completions over its OpenAI API, adapters by its runtime updates, and its loss."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.rollouts.engines.vllm.draws import Draw, Drawn
from clp_engine.rollouts.engines.vllm.stacks import Stack

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # how often the same completions are asked for before a server that dies of them is given up
_ALIVE = 20  # seconds of silence after which the other host is asked whether it is there
_CONNECT, _LOOK = 10.0, 2.0  # seconds: to connect, and between two looks at the server
_START = "vllm serve MODEL --enable-lora --max-lora-rank R --logprobs-mode processed_logprobs"


class Lost(Exception):
    """The server gave no answer, or one with a status of 500 and more: its engine is dead, or it cannot do this."""

    def __init__(self, reason: str, status: int = 0, answer: dict | None = None):
        super().__init__(reason)
        self.status, self.answer = status, answer or {}


class Server:
    """A `Vllm`. url: as http://localhost:8000. timeout: seconds that a server which does not answer is waited for.

    connections: the most completions asked for at once. The key of a server that asks for one is in VLLM_API_KEY.
    """

    def __init__(self, url: str, timeout: float, connections: int = 256):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"vllm_server_base_url={url!r}: expected an address such as http://localhost:8000"
            )
        self.url, self._timeout, self._connections = url.rstrip("/"), timeout, connections
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(parts.hostname or "", parts.port, timeout=_CONNECT)
        self._below = parts.path.rstrip("/")
        self._base: str | None = None  # the base model's name there
        self._sockets: set[socket.socket] = set()
        self._stopped = threading.Event()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def load(self, stack: Stack) -> None:
        self._until_answered(lambda: self._load(stack))

    def _load(self, stack: Stack) -> None:
        new = self._base is None
        if new:
            self._meet()
        adapter = {"lora_name": stack.name, "lora_path": str(stack.path)}
        try:
            status, answer = self.ask("POST", "/v1/load_lora_adapter", adapter)
        except Lost as lost:  # vLLM answers 500 for an adapter that it cannot load, and lives
            if not lost.status or not self._healthy():
                raise
            status, answer = lost.status, lost.answer
        if status == 404 and not isinstance(answer.get("error"), dict):
            raise ConfigError(
                f"vLLM at {self.url} loads no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if status != 200 and "already" not in (reason := said(answer)):
            raise ConfigError(
                f"vLLM at {self.url} refused the adapters in {stack.path} ({reason}); the server reads this path "
                "(vllm_stack_dir), its --max-lora-rank must be at least "
                f"{stack.rank}, and it must have LoRA on these layers (target_modules, conditioning)"
            )
        if new:
            self.check_blending(stack.name)

    def unload(self, stack: Stack) -> None:
        with contextlib.suppress(Lost):  # a server that has gone has no adapters
            self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": stack.name})

    # -- what the server must be --------------------------------------------------------------------------------------

    def models(self) -> tuple[str, list[str]]:
        """Names of the base model and of the adapters."""
        status, answer = self.ask("GET", "/v1/models")
        if status != 200:
            raise ConfigError(f"vLLM at {self.url} names no models ({status}: {said(answer)})")
        adapters = [model["id"] for model in answer["data"] if model.get("parent")]
        return next(model["id"] for model in answer["data"] if not model.get("parent")), adapters

    def _meet(self) -> None:
        """The base model's name, and whether log-probs are those of sampling: with one token allowed its log-prob is 0."""
        base, _ = self.models()
        only_one = {"allowed_token_ids": [1], "max_tokens": 1, "logprobs": 0, "return_token_ids": True}
        status, answer = self.ask("POST", "/v1/completions", {"model": base, "prompt": [1, 1], **only_one})
        if status != 200 or not answer["choices"][0].get("token_ids"):
            raise ConfigError(
                f"the server at {self.url} does not complete tokens ({status}: {said(answer)}); expected vLLM"
            )
        if answer["choices"][0]["logprobs"]["token_logprobs"][0] < -1e-3:
            raise ConfigError(
                f"vLLM at {self.url} gives log-probs of another distribution than it draws from; start it with "
                "--logprobs-mode processed_logprobs"
            )
        self._base = base

    def check_blending(self, name: str) -> None:
        """Without the plug-in vLLM would add up all deltas, whatever the weights. The plug-in refuses an unknown key."""
        body = {"prompt": [1, 1], "max_tokens": 1, "vllm_xargs": {"clp_engine": "?"}}
        status, answer = self.ask("POST", "/v1/completions", {"model": name, **body})
        if status != 400 or "clp_engine" not in said(answer):
            raise ConfigError(
                f"vLLM at {self.url} does not blend: clp-engine's plug-in is not there; install clp-engine beside it "
                '(pip install "clp-engine[vllm]") and start it again'
            )

    # -- completions --------------------------------------------------------------------------------------------------

    def complete(self, draws: Sequence[Draw], options: dict[str, Any], stack: Stack) -> list[Drawn]:
        found: list[Drawn | None] = [None] * len(draws)
        if self._base is None:  # another process met the server
            self._until_answered(self._meet)
        for _ in range(ATTEMPTS):
            lost = self._complete(draws, options, stack, found)
            if lost is None:
                return [drawn for drawn in found if drawn is not None]
            logger.warning(
                "vLLM at %s was lost with %d of %d completions drawn (%s); waiting up to %g seconds for it, then the others "
                "are drawn again",
                self.url,
                sum(drawn is not None for drawn in found),
                len(draws),
                lost,
                self._timeout,
            )
            self._base = None  # what comes back may have been started in another way
            self._until_answered(lambda: self._load(stack), lost)
        raise DrawingFailed(
            f"vLLM at {self.url} was lost {ATTEMPTS} times while it drew the same completions"
        )

    def _complete(
        self, draws: Sequence[Draw], options: dict[str, Any], stack: Stack, found: list[Drawn | None]
    ) -> Lost | None:
        """Fill the gaps of `found`. Returns why the server was lost, None if it was not."""
        missing = [i for i, drawn in enumerate(found) if drawn is None]
        self._stopped.clear()

        def one(i: int) -> None:
            if not self._stopped.is_set():
                found[i] = self._completed(draws[i], options, stack)

        with ThreadPoolExecutor(min(len(missing), self._connections)) as pool:
            try:
                pending = {pool.submit(one, i) for i in missing}
                heard = time.monotonic()
                while pending:
                    done, pending = wait(pending, _LOOK, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if done or self._healthy():
                        heard = time.monotonic()
                    elif time.monotonic() - heard > self._timeout:
                        return Lost(f"it has not answered for {self._timeout:g} seconds")
            except Lost as lost:
                return lost
            finally:
                self._stopped.set()
                self._hang_up()
        return None

    def _completed(self, draw: Draw, options: dict[str, Any], stack: Stack) -> Drawn:
        body = {"prompt": draw.prompt, **options, "seed": draw.seed, "return_token_ids": True}
        body["model"] = self._base if draw.clp is None else stack.name
        if draw.clp is not None:
            body["vllm_xargs"] = {"clp": json.dumps(draw.clp)}
        status, answer = self.ask("POST", "/v1/completions", body, None)
        if status == 404:  # a server that was started again since has no adapters
            raise Lost(said(answer))
        if status != 200:
            raise ConfigError(f"vLLM at {self.url} refused a completion ({status}: {said(answer)})")
        (choice,) = answer["choices"]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] not in ("stop", "length") or len(tokens) != len(logprobs):
            raise Lost(f"a completion ended by {choice['finish_reason']}")
        return Drawn(tokens, logprobs, choice["finish_reason"] == "stop")

    # -- asking -------------------------------------------------------------------------------------------------------

    def _until_answered(self, act: Any, lost: Lost | None = None) -> None:
        """`act`, as soon as the server answers. Raises DrawingFailed after `timeout` seconds in which it did not."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                if lost is None or self._healthy():
                    return act()
            except Lost as error:
                lost = error
            if time.monotonic() > end:
                raise DrawingFailed(
                    f"vLLM at {self.url} does not answer ({lost}); it was waited for {self._timeout:g} seconds "
                    f"(vllm_server_timeout): start it ({_START}) and go on from the last checkpoint"
                )
            time.sleep(min(1.0, self._timeout / 10))

    def _healthy(self) -> bool:
        try:
            return self.ask("GET", "/health", timeout=_CONNECT)[0] == 200
        except Lost:
            return False

    def ask(
        self, method: str, path: str, body: dict | None = None, timeout: float | None = 60.0
    ) -> tuple[int, dict]:
        """(status, answer). timeout: seconds between two bytes of the answer; None waits until the socket is hung up.

        Raises Lost where no answer comes, and for the answer that the engine has died.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connect()
        try:
            connection.connect()
            with self._held(connection.sock, timeout):
                connection.request(
                    method, self._below + path, None if body is None else json.dumps(body), headers
                )
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        finally:
            connection.close()
        try:
            found = json.loads(text) if text[:1] in b"{[" and text else {}
        except ValueError:
            found = {}
        found = found if isinstance(found, dict) else {"detail": found}
        if status >= 500:
            raise Lost(f"{status}: {text[:200].decode(errors='replace')}", status, found)
        return status, found

    @contextlib.contextmanager
    def _held(self, sock: socket.socket, timeout: float | None) -> Iterator[None]:
        sock.settimeout(timeout)
        # A host that is switched off says nothing; without these a completion would be waited for without end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", _ALIVE), ("TCP_KEEPINTVL", _ALIVE), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):  # Linux
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._sockets.add(sock)
        try:
            if timeout is None and self._stopped.is_set():  # no one hangs this one up any more
                raise Lost("given up")
            yield
        finally:
            self._sockets.discard(sock)

    def _hang_up(self) -> None:
        """End the requests under way: their threads stop waiting, and the server stops drawing."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self, stack: Stack | None) -> None:
        if stack is not None:
            self.unload(stack)
        self._base = None


def said(answer: dict) -> str:
    """The message of an error that vLLM answered with."""
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)
