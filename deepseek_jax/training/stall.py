"""A watchdog for a run that hangs: when no step ends for some minutes, all stacks are printed and the process ends.

The other processes of a run are told (`parallel.watch`) and end too, with the exit code of a lost process: the same
command continues from the last checkpoint. SIGQUIT prints the stacks without ending the process (`stop.show_stacks`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from deepseek_jax import stop

OTHERS = 5  # seconds for the other processes, which wait for this one, to print theirs, and for the log to be written


class StallWatch:
    """Ends the process if `beat` has not been called for some minutes; None: never."""

    def __init__(self, minutes: float | None):
        self.limit, self.last, self.ended = (minutes or 0) * 60, time.monotonic(), threading.Event()
        self.pauses = 0  # depth of nested `suspended`, all in the loop's thread
        self.thread = threading.Thread(target=self._look, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self.beat()
        if self.limit:
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()

    def beat(self) -> None:
        """Signals that the run is alive."""
        self.last = time.monotonic()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which the clock is stopped: for work without steps that may take longer, such as compiling or
        saving."""
        self.pauses += 1
        try:
            yield
        finally:
            self.beat()
            self.pauses -= 1

    def _look(self):
        while not self.ended.wait(min(1.0, self.limit / 10)):
            silent = time.monotonic() - self.last
            if silent > self.limit and not self.pauses:
                _show_stacks(
                    f"\nerror: no step has ended for {silent:.0f} seconds (train.stall_minutes={self.limit / 60:g}); "
                    "the stacks of all threads follow, and the process ends. The same command continues from the "
                    "last checkpoint.\n")
                stop.leave(stop.PEER_LOST)


def _show_stacks(words):
    """Prints to stderr first, and then to the log of the process (`logs`), whose disk may be the cause of the hang."""
    copy = getattr(sys.stderr, "copy", None)

    def show(file):
        if file is not None:
            with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed stream
                file.write(words)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    show(sys.__stderr__)
    log = threading.Thread(target=show, args=(copy,), daemon=True)
    log.start()
    time.sleep(OTHERS)  # even if the log is written at once: the other processes wait for this one
