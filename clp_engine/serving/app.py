"""The HTTP server of the page and its two requests, for this machine alone.

    GET  /               page.html
    GET  /api/model      the policy: objectives, KL coefficient, limits, examples, front (`Session.describe`)
    POST /api/generate   takes JSON (`GenerateRequest`), answers with the completions (`Session.generate`)

An answer with another status than 200 is {"error": "what is wrong"}.

A page of any site can make the browser send requests to a local port, and a foreign name can be made to point to that port
(DNS rebinding). The server therefore checks three things. The Host must be an address or this machine's own name. A request
from a page must come from the server's own page (Origin, Sec-Fetch-Site). A body must be declared as JSON, which the form of
another site cannot do.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import select
import socket
import socketserver
import sys
import threading
import traceback
import webbrowser
from concurrent.futures import Future, wait
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clp_engine import __version__
from clp_engine.core import ranges
from clp_engine.core.errors import ConfigError, shown
from clp_engine.serving.jobs import Full, Jobs
from clp_engine.serving.requests import MAX_CHARACTERS, GenerateRequest
from clp_engine.serving.session import Session

_MAX_BODY = 12 * MAX_CHARACTERS + 10_000  # JSON takes at most 12 bytes for a character: \uXXXX\uXXXX
_LOOK_EVERY = 0.5  # seconds between looks at whether the client is still there
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    allow_remote: bool = False,
    browser: bool = True,
    device: str | None = None,
    examples: str | Path | None = None,
) -> None:
    """Load the policy of a run and serve the page until Ctrl-C.

    host, port: the address to listen on; port 0 takes any free one. allow_remote: allow a host that other machines can reach.
    browser: open the page. examples: a file of prompts that the page offers. Raises ConfigError where the run has no policy,
    where the server cannot listen on the address, or where other machines could reach the address without allow_remote.
    """
    jobs = Jobs()
    server = listen(host, port, allow_remote, jobs)  # first: loading takes seconds
    try:
        print(f"loading {run} ...", flush=True)
        server.session = Session(run, device, examples)
        threading.Thread(target=server.serve_forever, name="clp-steer", daemon=True).start()
        print(f"steering {run} at {server.url}  (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(server.url)
        jobs.work()
    except KeyboardInterrupt:
        print("\nstopped")
    finally:
        server.server_close()


def listen(host: str, port: int, allow_remote: bool, jobs: Jobs) -> SteerServer:
    """A listening server, which answers once it has a session. Raises ConfigError for an address, as `serve` does."""
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
    try:
        return SteerServer(family, address, allow_remote, jobs)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another with --port, or --port 0 for any that is free"
        ) from error


class SteerServer(ThreadingHTTPServer):
    """Each request is answered in a thread of its own; completions are submitted to `jobs`, which another thread runs."""

    daemon_threads = True
    # A browser opens several connections at once; socketserver's default of 5 would refuse some.
    request_queue_size = 128
    block_on_close = False  # a browser keeps its connections open

    def __init__(self, family: socket.AddressFamily, address: tuple, allow_remote: bool, jobs: Jobs):
        self.address_family = family
        self.allow_remote, self.jobs = allow_remote, jobs
        self.session: Session | None = None
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self.page, self.policy_header = page.encode(), _content_policy(page)
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        host, port = self.server_address[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def server_bind(self) -> None:
        # HTTPServer's own asks the network for this machine's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # a client that hung up
            super().handle_error(request, client_address)


def _content_policy(page: str) -> str:
    """The Content-Security-Policy of the page: it names the hash of the page's script, so that no text of a model runs."""
    scripts = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page)]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


class Handler(BaseHTTPRequestHandler):
    """The answer to one connection: it checks the sender and the request, and sends JSON or the page."""

    server: SteerServer
    protocol_version = "HTTP/1.1"
    server_version = f"clp-engine/{__version__}"
    sys_version = ""
    timeout = 60  # of a connection that says nothing

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            self._check_sender()
            path = self._path()
            route = {
                "/": ("GET", self._page),
                "/api/model": ("GET", self._model),
                "/api/generate": ("POST", self._generate),
            }
            if path not in route:
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path} here")
            allowed, answer = route[path]
            if method != allowed:
                raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {allowed}", Allow=allowed)
            answer()
        except Refused as refused:
            # The unread rest of a body would be taken for the next request.
            self.close_connection = True
            self._send_json({"error": str(refused)}, refused.status, **refused.headers)
        except ConfigError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has left
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error} (the terminal of clp-engine steer has more)"
            self._send_json({"error": message}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _path(self) -> str:
        try:
            return urlsplit(self.path).path
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{shown(self.path)} is no address") from None

    # -- who may ask --------------------------------------------------------------------------------------------------

    def _check_sender(self) -> None:
        host = self.headers.get("Host", "")
        if not self._is_own_name(_host_name(host)):
            raise Refused(
                HTTPStatus.FORBIDDEN, f"Host {host!r} is not this machine; open {self.server.url} instead"
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"a page of {origin} may not ask here")
        # "none": typed or a bookmark; not sent by what is not a browser.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and self.path != "/":
            raise Refused(HTTPStatus.FORBIDDEN, "another site may not ask here")

    def _is_own_name(self, name: str) -> bool:
        """An address, or this machine's name: rebinding needs a name that its attacker owns. The port may be another one,
        where it is forwarded."""
        if name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return self.server.allow_remote and name == socket.gethostname().lower()
        return self.server.allow_remote or address.is_loopback

    # -- what is asked ------------------------------------------------------------------------------------------------

    def _page(self) -> None:
        self._send(
            self.server.page,
            "text/html; charset=utf-8",
            **{"Content-Security-Policy": self.server.policy_header},
        )

    def _model(self) -> None:
        self._send_json(self._session().describe())

    def _generate(self) -> None:
        session, request = self._session(), GenerateRequest.parse(self._body())
        try:
            future = self.server.jobs.submit(lambda: session.generate(request))
        except Full as error:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; try again in a moment") from None
        self._send_json(self._wait(future))

    def _session(self) -> Session:
        if self.server.session is None:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the model is still being loaded")
        return self.server.session

    def _wait(self, future: Future) -> dict[str, Any]:
        """The result of a job. A job that has not begun is cancelled when its client hangs up."""
        while not wait([future], _LOOK_EVERY).done:
            if self._hung_up() and future.cancel():
                raise ConnectionAbortedError("the client hung up")
        return future.result()

    def _hung_up(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        # int() refuses thousands of digits; the first 19 are still too large a number.
        size = int(length.lstrip("0")[:19] or 0)
        if size > _MAX_BODY:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request has {size:,} bytes; a text has at most {MAX_CHARACTERS:,} characters",
            )
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the client hung up before its request was whole")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the request is not JSON: {error}") from None

    # -- answers ------------------------------------------------------------------------------------------------------

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # A lone surrogate cannot be sent; a tokenizer may produce one.
        self._send(text.encode("utf-8", "replace"), "application/json; charset=utf-8", status, **headers)

    def _send(
        self, body: bytes, content_type: str, status: HTTPStatus = HTTPStatus.OK, **headers: str
    ) -> None:
        fixed = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        try:
            self.send_response(status)
            for name, value in {**fixed, **headers}.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: requests are many, and errors are printed where they happen."""


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d+)?", host)
    return "" if match is None else (match[1] or match[2]).lower()
