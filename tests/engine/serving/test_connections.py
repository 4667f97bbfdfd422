"""The connections of a server: how many there are, and how long one stays whose client takes no answer."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from clp_engine.serving import server

REQUEST = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def endless():
    while True:
        yield b"x" * 30_000
        await asyncio.sleep(0)


ROUTES = {
    "short": lambda _: PlainTextResponse("short"),
    "some": lambda _: PlainTextResponse("x" * 50_000),  # less than a transport takes without a word
    "last": lambda _: PlainTextResponse("x" * 50_000, headers={"Connection": "close"}),
    "whole": lambda _: PlainTextResponse("x" * 3_000_000),
    "stream": lambda _: StreamingResponse(endless()),
}


@pytest.fixture
def made():
    """A server of answers of several sizes, to connections whose buffers in the system are small."""
    listening = server.listen("127.0.0.1", 0, False)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made = server.make_server(
        Starlette(routes=[Route(f"/{name}", answer) for name, answer in ROUTES.items()])
    )
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not made.started:
        time.sleep(0.005)
    made.address = listening.getsockname()
    yield made
    made.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@contextlib.contextmanager
def connected(made):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(made.address)
        yield client


def is_idle(made, seconds):
    """Whether the server has neither a connection nor a task within so many seconds."""
    state, until = made.server_state, time.perf_counter() + seconds
    while (state.connections or state.tasks) and time.perf_counter() < until:
        time.sleep(0.01)
    return not (state.connections or state.tasks)


@pytest.mark.parametrize("answer", [b"some", b"last", b"whole", b"stream"])
def test_a_client_that_takes_nothing_is_dropped(answer, made, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.15)
    with connected(made) as client:
        client.sendall(REQUEST % answer)
        assert client.recv(5) == b"HTTP/"
        assert is_idle(made, 5)


def test_a_client_that_takes_a_part_in_time_gets_all(made, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with connected(made) as client:
        client.sendall(REQUEST % b"stream")
        for _ in range(4):
            for _ in range(60):
                assert client.recv(65536)
            time.sleep(0.1)
        assert len(made.server_state.connections) == 1


def test_connections_above_the_limit_are_closed(made, monkeypatch):
    monkeypatch.setattr(server, "_CONNECTIONS", 2)

    def answered(client):
        client.sendall(REQUEST % b"short")
        answer = b""
        while not answer.endswith(b"short"):
            answer += client.recv(4096) or pytest.fail("closed")
        return answer.startswith(b"HTTP/1.1 200")

    with connected(made) as first, connected(made) as second:
        assert answered(first) and answered(second)
        for _ in range(3):
            with connected(made) as third, contextlib.suppress(ConnectionResetError):
                assert third.recv(1) == b""
        assert answered(first) and answered(second) and len(made.server_state.connections) == 2
        first.close()
        while len(made.server_state.connections) == 2:
            time.sleep(0.005)
        with connected(made) as third:
            assert answered(third)
