"""The application behind `clp-engine serve` and `clp-engine steer`: one set of routes, behind one set of guards. A page before
a vLLM server (`from_vllm`) has the first three and the last of them.

    GET  /               page.html
    GET  /api/model      the policy: objectives, KL coefficient, limits, examples, front (`Session.describe`)
    POST /api/generate   takes JSON (`GenerateRequest`), answers with the completions (`Session.generate`)
    /v1/...              OpenAI's API (`openai_api`)
    GET  /metrics        Prometheus' text format
    GET  /health         200 while the server answers

An answer with another status than 200 is {"error": "what is wrong"}; under /v1/ the error has OpenAI's form.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import traceback
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clp_engine.core.errors import ConfigError
from clp_engine.serving.batching import Failed, Full
from clp_engine.serving.guards import Guards, Json, Refused, read_json, refusal, unless_gone
from clp_engine.serving.metrics import CONTENT_TYPE, Metrics
from clp_engine.serving.openai_api import OpenAIRoutes
from clp_engine.serving.requests import GenerateRequest
from clp_engine.serving.served import Served
from clp_engine.serving.session import Session

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_RETRY_AFTER = "1"  # seconds


def make_app(
    session: Session,
    url: str = "http://127.0.0.1/",
    *,
    allow_remote: bool = False,
    api_key: str | None = None,
) -> Starlette:
    """The application of a session. While it runs, the running batch is decoded in a thread of its own.

    url: the server's address, for messages. allow_remote: answer under any address, and under this machine's name.
    api_key: a key that every request must bring, see `guards`.
    """
    served = session.served
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    policy_header = {"Content-Security-Policy": _content_policy(page)}

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers=policy_header)

    async def model(request: Request) -> Response:
        return Json(session.describe())

    async def generate(request: Request) -> Response:
        asked = GenerateRequest.parse(await read_json(request))
        return Json(await unless_gone(request, session.generate(asked)))

    async def health(request: Request) -> Response:
        return Json({"status": "ok"})

    routes = [
        Route("/", show_page),
        Route("/api/model", model),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/health", health),
    ]
    outermost, lifespan = [], None
    if isinstance(served, Served):
        routes += [*OpenAIRoutes(served).routes(), Route("/metrics", _metrics_of(served))]
        outermost = [Middleware(_Counting, metrics=served.metrics, paths={route.path for route in routes})]
        lifespan = _running(served)
    return Starlette(
        routes=routes,
        middleware=[
            *outermost,
            Middleware(Guards, url=url, allow_remote=allow_remote, api_key=api_key),
            Middleware(_Catching),
        ],
        exception_handlers={kind: _refuse for kind in (Refused, ConfigError, Full, HTTPException)}
        | {ClientDisconnect: _nobody},
        lifespan=lifespan,
    )


def _metrics_of(served: Served) -> Callable:
    async def metrics(request: Request) -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    return metrics


def _running(served: Served) -> Callable:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.begin()
        yield
        await served.end()

    return lifespan


def _content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: it names the hash of the page's script, so that no text of a model runs."""
    scripts = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page)]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refuse(request: Request, error: Exception) -> Response:
    return refusal(request.url.path, _refused(request, error))


def _refused(request: Request, error: Exception) -> Refused:
    """What a client is told of an error. An error of the engine is also printed, with its traceback."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ConfigError):
        return Refused(400, str(error))
    if isinstance(error, Full):
        return Refused(429, f"{error}; try again in a moment", **{"Retry-After": _RETRY_AFTER})
    path = request.scope["path"]
    if isinstance(error, HTTPException):
        allowed = dict(error.headers or {})
        message = (
            f"{path} takes {allowed.get('Allow')}" if error.status_code == 405 else f"there is no {path} here"
        )
        return Refused(error.status_code, message, **allowed)
    message = str(error)
    if not isinstance(error, Failed):
        message = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    return Refused(500, f"{message} (the terminal of the server has more)")


async def _nobody(request: Request, error: Exception) -> Response:
    """The answer to a client that has gone. It is counted, and not sent."""
    return Response(status_code=499)


class _Counting:
    """Counts the answers by path and status. All paths that the application does not have count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted)


class _Catching:
    """Answers with 500 where the engine fails. Starlette's own handler raises the error again, for which uvicorn closes the
    connection, and a client that sends its next request at that moment would get no answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            if started or scope["type"] != "http":  # the rest of the answer will not come
                raise
            await (await _refuse(Request(scope), error))(scope, receive, send)
