"""A server and its hostile clients, each kind in a separate process, for `attackers`."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from benchmarks.machine import ROOT

STREAMS, NEW, ATTACKERS = 64, 60, 16  # streams to be served, tokens of each; usual connections of an attack
PAUSE = 0.05  # seconds between two looks at /health
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG = "word " * 780_000  # 3.9 MB


def request(path: str, length: int | None = None, **body: Any) -> bytes:
    """A POST of JSON; `length`: a Content-Length other than the body's own."""
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {length or len(data)}\r\n\r\n").encode() + data


def completion(**fields: Any) -> bytes:
    """A streamed completion of NEW tokens."""
    return request("/v1/completions", **{"prompt": "def ", "max_tokens": NEW, "stream": True} | fields)


async def ask(port: int, sent: bytes, limit: int = -1, seconds: float = 0.0) -> bytes:
    """Sends the request, reads at most `limit` bytes of the answer (-1: all) and disconnects."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(seconds)
        return await reader.read(limit)
    finally:
        writer.transport.abort()


async def read_all(port: int) -> bytes:
    """The requests of the stalled readers, but read normally: the cost of the requests themselves."""
    answer = await ask(port, LONG_ANSWER)
    await asyncio.sleep(60)
    return answer


LONG_ANSWER = completion(logprobs=20, max_tokens=200)
ATTACKS: dict[str, Callable[[int], Awaitable[bytes]]] = {
    "long stops": lambda port: ask(port, completion(stop=[f"{i:02}" * 512 for i in range(16)])),
    "prompts of 3.9 MB": lambda port: ask(port, completion(prompt=LONG)),
    "half bodies": lambda port: ask(port, request("/v1/completions", length=4_000_000, prompt="x" * 1000)),
    "stalled readers": lambda port: ask(port, LONG_ANSWER, 0, seconds=60),
    "readers of the same": read_all,
    "a cancel storm": lambda port: ask(port, completion(), 200),
    "a hostile template": lambda port: ask(port, request("/v1/chat/completions", messages=[
        {"role": "user", "content": "hi"}]))}


def attack(name: str, port: int, count: int) -> None:
    """Runs until it is killed. Refused and broken connections are expected."""
    async def one():
        while True:
            with contextlib.suppress(OSError):
                await ATTACKS[name](port)

    async def together():
        await asyncio.gather(*(one() for _ in range(count)))

    asyncio.run(together())


def healthy(port: int) -> bool:
    """Whether /health returns 200."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in sock.recv(4096)
    return False


def tokens_of(port: int) -> float:
    """Tokens that the server has delivered so far, to all clients."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("deepseek_jax_tokens_total "))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, of all its threads together."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def probe(port: int, longest: Any) -> None:
    """Records the longest response time of /health, in seconds."""
    while True:
        start = time.monotonic()
        healthy(port)
        longest.value = max(longest.value, time.monotonic() - start)
        time.sleep(PAUSE)


@contextlib.contextmanager
def process(work: Callable, *args: Any) -> Iterator[int]:
    """Runs a function in a separate process during the `with` block; yields the process id."""
    started = multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True)
    started.start()
    try:
        assert started.pid is not None
        yield started.pid
    finally:
        started.kill()
        started.join()


def idle(port: int) -> None:
    """A server that answers 400 to every request: attacking it shows the cost of the attackers themselves."""
    async def answer(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r")[0])
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async def serve():
        async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
            await server.serve_forever()

    asyncio.run(serve())


def free_port() -> int:
    """A TCP port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def served(workdir: str) -> Iterator[tuple[int, int]]:
    """The port and the process id of a server of the run, with a chat template that never ends."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        for path in pathlib.Path(workdir).resolve().iterdir():
            if path.name != "chat_template.jinja":
                os.symlink(path, os.path.join(folder, path.name))
        pathlib.Path(folder, "chat_template.jinja").write_text(ENDLESS)
        command = [sys.executable, "-m", "deepseek_jax.serve", "--workdir", folder, "--port", str(port),
                   "--max-length=256", f"--max-waiting={STREAMS + 2 * ATTACKERS}"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not healthy(port):
                if server.poll() is not None:
                    sys.exit(f"the server has ended with {server.returncode}; try it: {' '.join(command)}")
                time.sleep(1)
            yield port, server.pid
        finally:
            server.kill()
            server.wait()
