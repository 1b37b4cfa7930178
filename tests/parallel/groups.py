"""Groups of processes, simulated by threads, for tests of how they connect and end."""

import socket
import threading

from deepseek_jax.parallel.meeting import Group
from deepseek_jax.parallel.watch import Watch


def free_port():
    """The first of two consecutive free ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("localhost", port + 1))
                return port
            except (OSError, OverflowError):
                continue


def in_threads(functions, seconds=20):
    """Calls all functions at once. Returns what each returned or raised; None if it still runs after so many seconds.
    """
    found = [None] * len(functions)

    def call(i):
        try:
            found[i] = functions[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds)
    return found


def watches(count):
    """The connections of a group of this size."""
    address = f"localhost:{free_port()}"
    return in_threads([lambda i=i: Watch(Group(address, count, i)) for i in range(count)])


def close(group):
    """Closes them silently: none may end this process after its test."""
    for watch in group:
        watch.leaving = True
    for watch in group:
        for connection in watch.connections.values():
            connection.close()
