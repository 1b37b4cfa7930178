"""The watch over a run's processes: each is told at once that another has ended, and why.

JAX's own service notices a lost process only after a timeout, and then aborts. Here every process also has a TCP
connection to the first one, from before JAX starts: the kernel closes it when a process ends, however it ends. If it
still can, a process sends its exit code first, and the others end with the same code. Process 0 forwards messages, so
that all name the process that ended first.
"""

from __future__ import annotations

import selectors
import sys
import threading
import time

from deepseek_jax import stop
from deepseek_jax.parallel.meeting import STARTUP_TIMEOUT, Group, has_ended, meet, received, tell

LINGER = 5  # seconds that process 0 waits for the others to end first: when its JAX service ends, it aborts them

# The fate of a process by its exit code, and the advice for it.
FATES = {
    stop.MISTAKE: ("has ended with a mistake", "see what that one said"),
    stop.STOPPED: ("was stopped by a signal", "start all of them again"),
    stop.PEER_LOST: ("has ended", "see what that one said, then start all of them again: the run continues from its "
                                  "last checkpoint"),
}


class Watch:
    """The connections: from process 0 to all others, from each other to process 0."""

    def __init__(self, group: Group, timeout: float = STARTUP_TIMEOUT):
        """Returns once all are connected. timeout: seconds to wait for them. Raises: as `meet`."""
        self.group, self.connections = group, meet(group, timeout)
        self.leaving = False
        self.parted = {peer: threading.Event() for peer in self.connections}
        threading.Thread(target=self._listen, daemon=True).start()

    def part(self) -> None:
        """Announces a normal end, and returns once all peers have announced theirs."""
        tell(self.connections.values(), stop.DONE, self.group.process)
        for peer, connection in self.connections.items():
            self.parted[peer].wait()
            connection.close()

    def leave(self, code: int, process: int | None = None) -> None:
        """Tells the others that a process (None: this one) ends with this exit code."""
        self.leaving = True
        tell(self.connections.values(), code, self.group.process if process is None else process)
        ends = time.monotonic() + LINGER * (self.group.process == 0)
        while time.monotonic() < ends and not all(map(has_ended, self.connections.values())):
            time.sleep(0.01)

    def _listen(self):
        with selectors.DefaultSelector() as ready:
            for peer, connection in self.connections.items():
                ready.register(connection, selectors.EVENT_READ, peer)
            while ready.get_map():
                for key, _ in ready.select():
                    word, process = received(self.connections[key.data]) or (stop.PEER_LOST, key.data)
                    ready.unregister(key.fileobj)  # a process that has sent its exit code sends nothing else
                    if word == stop.DONE:
                        self.parted[key.data].set()
                    elif not self.leaving:
                        self._end(word, process)

    def _end(self, word, process):
        how, then = FATES.get(word, (f"has ended with exit code {word}", "see what that one said"))
        print(f"\nerror: process {process} of {self.group.processes} {how}, so this one (process {self.group.process}) "
              f"stops; {then}.", file=sys.stderr)
        if self.group.process == 0:
            self.leave(word, process)
        stop.end(word)
