"""The processes of a run connect to each other: process 0 listens until all others have connected to it.

A process sends its number and its --processes. Process 0 answers once all have connected, and until then names the
missing ones. A message is five bytes, a word and the number of a process: the word is `MET`, or the exit code that the
process ends with (`parallel.watch`).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from deepseek_jax import stop
from deepseek_jax.config import ConfigError

STARTUP_TIMEOUT = 1800  # seconds to wait for the others: a large allocation takes many minutes to boot
REPORT_EVERY = 30  # seconds between two lines that name the missing processes
SILENCE = 10  # seconds after which an unidentified connection, such as a port scan, is closed

MET = 255  # not an exit code of any command here
MESSAGE = struct.Struct(">BI")
HELLO = struct.Struct(">8sII")  # MAGIC, the process, its --processes
MAGIC = b"dsjax-1\n"


class Group(NamedTuple):
    """This process among those of the run."""

    coordinator: str  # HOST:PORT of process 0; it also listens on the next port
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # devices of this machine that this process uses; None: all visible ones


def check(group: Group) -> None:
    """Raises ConfigError for an address, or for numbers, that no group can have."""
    host, _, port = group.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigError(f"--coordinator={group.coordinator!r} should be HOST:PORT of process 0, such as "
                          "localhost:9900.")
    if not 0 <= group.process < group.processes:
        raise ConfigError(f"--process={group.process} must lie in [0, {group.processes}), one number for each of the "
                          f"--processes={group.processes}.")


def meet(group: Group, timeout: float) -> dict[int, socket.socket]:
    """{process: connection} once all have connected: in process 0 to all others, in the others to process 0.

    Args:
      timeout: seconds to wait for them.
    Raises:
      ConfigError: the port is taken, or the processes got different flags.
      PeerLostError: not all connected in time.
    """
    host, _, port = group.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    try:
        if group.process == 0:
            return _wait_for_all(group, int(port) + 1, deadline)
        return {0: _find_first(group, (host.strip("[]"), int(port) + 1), deadline, timeout)}
    except OSError as error:
        raise ConfigError(f"process {group.process} of {group.processes} could not meet the others at "
                          f"{group.coordinator} (and the port after it): {error}; give all of them one --coordinator, "
                          "with two ports that are free.") from error


def tell(connections: Iterable[socket.socket], word: int, process: int) -> None:
    """Sends a message to all of them, except those that have ended."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(MESSAGE.pack(word, process))


def received(connection: socket.socket) -> tuple[int, int] | None:
    """The next message, (word, process); None if the other end is gone."""
    data = b""
    with contextlib.suppress(OSError):
        data = connection.recv(MESSAGE.size, socket.MSG_WAITALL)
    return MESSAGE.unpack(data) if len(data) == MESSAGE.size else None


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end is gone, with nothing left to read."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Reception:
    """The connections of process 0. found: by process. unnamed: arrival time and received bytes of the connections that
    have not sent their process yet."""

    def __init__(self, group: Group):
        self.group, self.ready = group, selectors.DefaultSelector()
        self.found: dict[int, socket.socket] = {}
        self.unnamed: dict[socket.socket, tuple[float, bytes]] = {}

    def __enter__(self) -> _Reception:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        """Closes connections that are no longer needed: all, after an error."""
        self.close_silent(-1)
        self.ready.close()
        for connection in self.found.values() if error else ():
            connection.close()

    def missing(self) -> list[int]:
        """Processes that have not connected, or have disconnected: those may be restarted."""
        for process in [process for process, connection in self.found.items() if has_ended(connection)]:
            self.found.pop(process).close()
        return [i for i in range(1, self.group.processes) if i not in self.found]

    def accept(self, server: socket.socket) -> None:
        """Accepts all pending connections."""
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                connection, _ = server.accept()
                connection.setblocking(False)
                self.unnamed[connection] = time.monotonic(), b""
                self.ready.register(connection, selectors.EVENT_READ, connection)

    def read(self, connection: socket.socket) -> None:
        """Reads the identification of a connection."""
        began, said = self.unnamed[connection]
        try:
            more = connection.recv(HELLO.size - len(said))
        except OSError:
            more = b""
        said += more
        if len(said) < HELLO.size and more and MAGIC.startswith(said[:len(MAGIC)]):
            self.unnamed[connection] = began, said
            return
        self._release(connection)
        magic, process, processes = HELLO.unpack(said) if len(said) == HELLO.size else (b"", 0, 0)
        if magic != MAGIC or not process:
            connection.close()  # not a process of a run
            return
        connection.setblocking(True)
        if processes != self.group.processes:
            self._refuse(connection, f"process {process} was told --processes={processes}, and process 0 "
                                     f"--processes={self.group.processes}; start all with the same number.")
        if before := self.found.pop(process, None):
            with before:
                if not has_ended(before):
                    tell([before], stop.MISTAKE, 0)
                    self._refuse(connection, f"two processes are --process={process} of {processes}; give each a "
                                             "number of its own.")
        self.found[process] = _kept_alive(connection)

    def _refuse(self, connection, complaint):
        with connection:
            tell([connection, *self.found.values()], stop.MISTAKE, 0)
        raise ConfigError(complaint)

    def _release(self, connection):
        self.ready.unregister(connection)
        del self.unnamed[connection]

    def close_silent(self, seconds: float) -> None:
        """Closes connections that have not identified themselves in time."""
        now = time.monotonic()
        for connection in [c for c, (began, _) in self.unnamed.items() if now - began > seconds]:
            self._release(connection)
            connection.close()


def _wait_for_all(group, port, deadline):
    _allow_files(group.processes)
    _server(port - 1).close()  # JAX's service listens there, and ends with a traceback if it cannot
    with _server(port) as server, _Reception(group) as at:
        at.ready.register(server, selectors.EVENT_READ)
        reported = time.monotonic()
        while missing := at.missing():
            for key, _ in at.ready.select(timeout=0.5):
                at.read(key.data) if key.data else at.accept(server)
            at.close_silent(SILENCE)
            now = time.monotonic()
            if now > deadline:
                tell(at.found.values(), stop.PEER_LOST, missing[0])
                raise stop.PeerLostError(f"{_some(missing)} of {group.processes} did not come to {group.coordinator} "
                                         "in time; see what they said, and start all with the same --coordinator "
                                         "(--startup-timeout: seconds to wait).")
            if now - reported > REPORT_EVERY:
                print(f"waiting for {_some(missing)} of {group.processes}", file=sys.stderr, flush=True)
                reported = now
        tell(at.found.values(), MET, 0)
        return at.found


def _find_first(group, address, deadline, timeout):
    """The connection to process 0, after its answer that all have connected."""
    reported = time.monotonic()
    while True:
        try:
            connection, (word, process) = _introduce(group, address, timeout)
            if word == MET:
                return connection
            connection.close()
            if word == stop.PEER_LOST:
                raise stop.PeerLostError(f"process {process} of {group.processes} did not come in time; see what "
                                         "process 0 said, and start all of them again.")
            if word is not None:
                raise ConfigError(f"process 0 of {group.processes} has refused this one (process {group.process}); see "
                                  "what that one said.")
            why = "it closes the connection"
        except OSError as error:
            why = error.strerror or str(error)
        now = time.monotonic()
        where = f"process 0 of {group.processes} at {group.coordinator} ({why})"
        if now > deadline:
            raise stop.PeerLostError(f"process {group.process} could not reach {where} in time; start all with the "
                                     "same --coordinator (--startup-timeout: seconds to wait).")
        if now - reported > REPORT_EVERY:
            print(f"process {group.process} waits for {where}", file=sys.stderr, flush=True)
            reported = now
        time.sleep(0.2)


def _introduce(group, address, timeout):
    """A connection to process 0, and its answer; (None, 0) if there is none."""
    connection = _kept_alive(socket.create_connection(address, timeout=5))
    connection.settimeout(timeout + SILENCE)  # process 0 gives up first
    with contextlib.suppress(OSError):
        connection.sendall(HELLO.pack(MAGIC, group.process, group.processes))
    answer = received(connection) or (None, 0)
    connection.settimeout(None)
    return connection, answer


def _server(port):
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
    server.setblocking(False)
    return server


def _allow_files(processes):
    """Raises the soft limit of open files, 1,024 by default: a process needs one for its connection, and one for JAX's
    service."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    needed = 2 * processes + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        enough = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _some(missing):
    """"process 3", or "processes 1, 2, 3 and 40 more"."""
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"process{'es' * (len(missing) > 1)} {named}"


def _kept_alive(connection):
    """Sets keep-alives that detect within half a minute that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
