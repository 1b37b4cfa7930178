"""A run of several processes, one command each: how they connect, agree, and notice that one has ended.

JAX's own service notices a lost process only after a timeout, and then aborts. Here every process also holds a TCP
connection to the first one, from before JAX starts: the kernel closes it when a process ends, however it ends, and the
others stop with one line. A process that ends normally sends one byte first.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import ConfigError

DONE = b"."
STARTUP_TIMEOUT = 300  # seconds to wait for the others to start
LONGEST_WORK = 24 * 3600  # seconds that others wait for one, for example while it tokenizes a large corpus


class Group(NamedTuple):
    """This process among those of the run."""

    coordinator: str  # HOST:PORT of process 0; it also listens on the next port
    processes: int
    process: int


def check(group: Group) -> None:
    """Raises ConfigError for an address, or for numbers, that no group can have."""
    host, _, port = group.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigError(f"--coordinator={group.coordinator!r} should be HOST:PORT of process 0, such as "
                          "localhost:9900.")
    if not 0 <= group.process < group.processes:
        raise ConfigError(f"--process={group.process} must lie in [0, {group.processes}), one number for each of the "
                          f"--processes={group.processes}.")


@contextlib.contextmanager
def joined(group: Group | None) -> Iterator[None]:
    """Inside, JAX spans all processes of the group. Nothing happens without one.

    Raises:
      ConfigError: the others cannot be reached.
    """
    if group is None:
        yield
        return
    check(group)
    watch = Watch(group)
    try:
        if hasattr(jax.config, "jax_enable_preemption_service"):  # the run has its own handler of SIGTERM
            jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(group.coordinator, group.processes, group.process)
        yield
    except BaseException:
        # JAX would wait for the others before this process may end, and they wait for it.
        atexit.register(_leave_at_once)
        raise
    watch.part()


def _leave_at_once():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


class Watch:
    """The connections: from process 0 to all others, from each other to process 0."""

    def __init__(self, group: Group):
        self.group = group
        host, _, port = group.coordinator.rpartition(":")
        meet = self._wait_for_all if group.process == 0 else self._find_first
        try:
            self.connections = meet(host.strip("[]"), int(port) + 1)
        except OSError as error:
            raise ConfigError(f"process {group.process} of {group.processes} could not meet the others at "
                              f"{group.coordinator} (and the port after it): {error}; start all of them, with the "
                              "same --coordinator.") from error
        self.gone = {peer: threading.Event() for peer in self.connections}
        for peer, connection in self.connections.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def part(self) -> None:
        """Announces a normal end, and returns once all peers have announced theirs."""
        for connection in self.connections.values():
            connection.sendall(DONE)
        for peer, connection in self.connections.items():
            self.gone[peer].wait()
            connection.close()

    def _wait_for_all(self, host, port):
        connections, deadline = {}, time.monotonic() + STARTUP_TIMEOUT
        with socket.create_server(("", port), backlog=self.group.processes) as server:
            while len(connections) < self.group.processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = server.accept()
                process = self._asked(connection)
                if 0 < process < self.group.processes:
                    connections[process] = _kept_alive(connection)
                else:
                    connection.close()  # not a process of this run
        return connections

    @staticmethod
    def _asked(connection):
        """The number of the process at the other end; 0 if it does not say."""
        connection.settimeout(5)
        try:
            return int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
        except OSError:
            return 0
        finally:
            connection.settimeout(None)

    def _find_first(self, host, port):
        deadline = time.monotonic() + STARTUP_TIMEOUT
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=5)
                connection.settimeout(None)
                connection.sendall(self.group.process.to_bytes(4, "big"))
                return {0: _kept_alive(connection)}
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _listen(self, peer, connection):
        try:
            last = connection.recv(1)
        except OSError:
            last = b""
        if last == DONE:
            self.gone[peer].set()
            return
        print(f"\nerror: process {peer} of {self.group.processes} has ended, so this one (process "
              f"{self.group.process}) stops; see what that one said, then start all of them again: the run continues "
              "from its last checkpoint.", file=sys.stderr)
        _leave_at_once()


def _kept_alive(connection):
    """Notices within half a minute that the other machine is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def is_first() -> bool:
    """Whether this process writes metrics and pictures and prints."""
    return jax.process_index() == 0


def first_then_others(make: Callable[[], Any], name: str) -> Any:
    """Runs make() in process 0 first, so that the others find its files."""
    made = make() if is_first() else None
    wait_for_all(name)
    return made if is_first() else make()


def wait_for_all(name: str) -> None:
    """Returns once every process has called this.

    Not by an exchange between devices: before its first one, gloo waits for the others for 30 seconds only.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WORK * 1000)


def check_same(config: str) -> None:
    """Raises ConfigError, in all processes, where their configs differ: they would wait for each other for ever."""
    if jax.process_count() > 1 and len(set(multihost_utils.process_allgather(
            np.uint32(zlib.crc32(config.encode()))).tolist())) > 1:
        raise ConfigError("the processes of this run were given different configs; start all of them with the same "
                          "command, but for --process.")


def any_process(flag: bool) -> bool | jax.Array:
    """Whether it is set in any process; the same answer in all. An array, so that its reader decides when to wait."""
    if jax.process_count() == 1:
        return flag
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    flags = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")),
                                                   np.full(jax.local_device_count(), flag))
    return _any(flags, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=1)
def _any(flags, replicated):
    return jax.lax.with_sharding_constraint(flags.any(), replicated)
