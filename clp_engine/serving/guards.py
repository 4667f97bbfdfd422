"""Who may ask a server, how much, and for how long: the checks in front of every answer.

Sender. A page of any site can make a browser send requests to a local port, and a foreign name can be made to point to that
port (DNS rebinding). The Host must therefore be an address or this machine's own name, and a request from a page must come from
the server's own page (Origin, Sec-Fetch-Site). With an API key, which no such page knows, any Host may be asked.

Key. `Authorization: Bearer KEY`, if the server has one. /health and /metrics need none.

Body. JSON, declared as such (which the form of another site cannot do), of at most MAX_BODY bytes, within PATIENCE.

Answer. Nothing is cached. (`server` drops a client that does not take it.)
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clp_engine.core.errors import ConfigError
from clp_engine.serving.requests import MAX_CHARACTERS

MAX_BODY = 12 * MAX_CHARACTERS + 10_000  # JSON takes at most 12 bytes for a character: \uXXXX\uXXXX
PATIENCE = (
    60.0  # seconds for the head of a request, for its body, and for what is written of an answer to be taken
)
OPEN = ("/health", "/metrics")  # what is answered without a key
_ALWAYS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


class Refused(Exception):
    """An answer other than 200. code: OpenAI's name of the error, if it has one. param: the field that it is about."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers


def refusal(path: str, refused: Refused) -> Response:
    """The answer to a refused request: {"error": text}, under /v1/ in the form of OpenAI's errors."""
    error: Any = str(refused)
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        kind = "rate_limit_error" if refused.status == 429 else kind
        error = {"message": error, "type": kind, "param": refused.param, "code": refused.code}
    return Json({"error": error}, refused.status, headers=refused.headers)


class Json(JSONResponse):
    """JSON without NaN. A lone surrogate, which a tokenizer may produce and UTF-8 cannot hold, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


@dataclass(frozen=True)
class Guards:
    """The application behind the checks of its senders. url: the server's own address, for messages."""

    app: ASGIApp
    url: str
    allow_remote: bool = False
    api_key: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = _with_headers(send)
        try:
            self._check_sender(scope["path"], Headers(scope=scope))
        except Refused as refused:
            await refusal(scope["path"], refused)(scope, receive, sent)
            return
        await self.app(scope, receive, sent)

    def _check_sender(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.api_key is None and not self._is_own_name(_host_name(host)):
            raise Refused(403, f"Host {host!r} is not this machine; open {self.url} instead")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, f"a page of {origin} may not ask here")
        # "none": typed or a bookmark; not sent by what is not a browser.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and path != "/":
            raise Refused(403, "another site may not ask here")
        if self.api_key is not None and path not in OPEN:
            given = headers.get("authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
                raise Refused(401, message, code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    def _is_own_name(self, name: str) -> bool:
        """An address, or this machine's name: rebinding needs a name that its attacker owns. The port may be another one,
        where it is forwarded."""
        if name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return self.allow_remote and name == socket.gethostname().lower()
        return self.allow_remote or address.is_loopback


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d+)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _ALWAYS.items():
                headers[name] = value
        await send(message)

    return sent


async def read_json(request: Request) -> Any:
    """The body of a request. Raises Refused and ConfigError for one that is no JSON, too large or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be application/json")
    declared = request.headers.get("content-length", "").lstrip("0")
    if len(declared) > 18 or int(declared or 0) > MAX_BODY:  # int() refuses thousands of digits
        raise _too_large(declared)
    try:
        body = await asyncio.wait_for(_body(request), PATIENCE)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body was not there after {PATIENCE:g} seconds") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the request is not JSON: {error}") from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:  # its length was not declared
            raise _too_large(str(len(body)))
    return bytes(body)


def _too_large(size: str) -> Refused:
    shown = f"{int(size):,}" if len(size) <= 18 else "too many"
    return Refused(413, f"the request has {shown} bytes; a text has at most {MAX_CHARACTERS:,} characters")


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of a coroutine, which is cancelled if the client disconnects. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
