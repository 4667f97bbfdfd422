"""The process of a server: its socket, its guards on connections, and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError
from clp_engine.serving.app import make_app
from clp_engine.serving.guards import PATIENCE
from clp_engine.serving.served import Source
from clp_engine.serving.session import Session

_CONNECTIONS = 2000  # the most at a time; others are closed
_BACKLOG = 2048  # connections that the system holds while the model is loaded
_DRAIN = 30  # seconds that running completions have after Ctrl-C


def serve(
    run: str | Path,
    source: Callable[[], Source],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_remote: bool = False,
    api_key: str | None = None,
    page: bool = False,
    browser: bool = False,
    examples: str | Path | None = None,
) -> None:
    """Make the source of a run, and serve it until Ctrl-C. Running completions are finished then; Ctrl-C again ends them.

    host, port: the address to listen on; port 0 takes any free one. allow_remote: allow a host that other machines can reach.
    api_key: see `guards`. page: whether the user wants the page. browser: open it. examples: a file of prompts that it offers.
    Raises ConfigError where the run has no policy, where the server cannot listen on the address, or where other machines
    could reach the address without allow_remote.
    """
    listening = listen(host, port, allow_remote)  # first: loading takes seconds
    try:
        print(f"loading {run} ...", flush=True)
        session = Session(source(), examples)
        url = url_of(listening)
        app = make_app(session, url, allow_remote=allow_remote, api_key=api_key)
        said = f"steering {run} at {url}" if page else f"serving {session.served.name} at {url}v1"
        print(f"{said}  (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(url)
        make_server(app).run(sockets=[listening])
    except KeyboardInterrupt:
        print("\nstopped")
    finally:
        listening.close()


def listen(host: str, port: int, allow_remote: bool) -> socket.socket:
    """A listening socket. Raises ConfigError for an address, as `serve` does."""
    ranges.check(ranges.COMMANDS, port=port)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not known here: {error}") from error
    if not allow_remote and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"host {host} can be reached from other machines, and whoever reaches it could use the model; give "
            "--allow-remote where that is wanted, or leave --host out"
        )
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another with --port, or --port 0 for any that is free"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """The address of a server, for a browser."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app) -> uvicorn.Server:
    """uvicorn with this project's guards. It logs nothing: requests are many, and errors are printed where they happen."""
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=int(PATIENCE),
        timeout_graceful_shutdown=_DRAIN,
    )
    return uvicorn.Server(config)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, with limits on the connections, on the time from the first byte of a connection to the end of a
    request's head, and on the time in which a client takes what was written to it.

    uvicorn ends connections that are idle between two requests. One that sends half of a head would stay for ever, and so would
    one that takes no answer: a connection is closed when everything is sent, and then only.
    """

    _ending: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._taken()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # its head is here
            self._unwatch()
        elif self._ending is None:
            self._ending = self.loop.call_later(PATIENCE, self._end)

    def _end(self) -> None:
        self.transport.close()
        self._ending = self.loop.call_later(PATIENCE, self.transport.abort)

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _unwatch(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
