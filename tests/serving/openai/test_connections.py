"""Connections have time limits: a client that sends half of a request, or does not read, is disconnected; others are
not.
"""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

import h11  # noqa: E402
from starlette.responses import StreamingResponse  # noqa: E402

from deepseek_jax.serving.openai import connections  # noqa: E402

ended_answers = []  # endless ones


async def endless():
    try:
        while True:
            yield bytes(2**16)
            await asyncio.sleep(0)
    finally:
        ended_answers.append(True)


async def app(scope, receive, send):
    """/endless never ends; every other request is read, and answered with the length of its body."""
    if scope["path"] == "/endless":
        return await StreamingResponse(endless())(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message["body"]), message["more_body"]
    await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture(scope="module")
def port():
    before = dict(connections.SECONDS), connections.READ_SECONDS
    connections.SECONDS.update({h11.IDLE: 1.0, h11.SEND_BODY: 1.0})
    connections.READ_SECONDS = 1.0
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http=connections.Connection, ws="none", lifespan="off",
                                               log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()
    connections.SECONDS.update(before[0])
    connections.READ_SECONDS = before[1]


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        yield client


def ended(client):
    """Seconds until the server ends the connection."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while client.recv(2**16):
            pass
    return time.monotonic() - began


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize("part", [b"", b"POST / HT", HEAD[:-2], HEAD, HEAD + b"a"],
                         ids=["nothing", "half a line", "half a head", "no body", "half a body"])
def test_half_a_request_is_waited_for_so_long(port, part):
    with connected(port) as client:
        client.sendall(part)
        assert 0.5 < ended(client) < 10


def test_a_trickle_does_not_help(port):
    with connected(port) as client:
        began = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)):
            for i in range(200):
                client.sendall(HEAD[i % len(HEAD):][:1])
                time.sleep(0.1)
        assert time.monotonic() - began < 15


def test_a_second_request_has_its_own_time(port):
    with connected(port) as client:
        for _ in range(3):
            client.sendall(HEAD)
            time.sleep(0.6)
            client.sendall(b"abc")
            while not client.recv(2**16).endswith(b"0\r\n\r\n"):
                pass


def test_whoever_reads_nothing_is_let_go(port):
    with connected(port) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        end = time.monotonic() + 15
        while not ended_answers and time.monotonic() < end:
            time.sleep(0.1)
        assert ended_answers == [True]


def test_more_connections_than_files_are_closed_at_once(port, monkeypatch):
    monkeypatch.setattr(connections.resource, "getrlimit", lambda which: (2, 2))
    with connected(port) as first, connected(port) as second:
        assert min(ended(second), ended(first)) < 0.9
