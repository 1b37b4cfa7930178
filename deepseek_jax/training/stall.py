"""A watch over a run that hangs: when no step ends for some minutes, every thread shows its stack and the process ends.

The others of a run hear of it (`parallel.watch`) and end too, with the exit code of a lost process: the same command
continues from the last checkpoint. SIGQUIT shows the stacks and ends nothing (`stop.show_stacks`).
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

OTHERS = 5  # seconds in which the others of a run, which wait for this one, show theirs, and for a log to be written


class StallWatch:
    """Ends the process when `beat` has not been called for some minutes; None: never."""

    def __init__(self, minutes: float | None):
        self.limit, self.last, self.ended = (minutes or 0) * 60, time.monotonic(), threading.Event()
        self.pauses = 0  # `suspended` that are inside one another, all in the loop's thread
        self.thread = threading.Thread(target=self._look, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self.beat()
        if self.limit:
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()

    def beat(self) -> None:
        """Says that the run lives."""
        self.last = time.monotonic()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, nothing counts: it has no steps and may take longer than they do, as a compiler or a store does."""
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
    """On stderr, and then in the log of the process (`logs`), whose disk may be what hangs."""
    copy = getattr(sys.stderr, "copy", None)

    def show(file):
        if file is not None:
            with contextlib.suppress(OSError, ValueError):  # a full disk, or a stream that is closed
                file.write(words)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    show(sys.__stderr__)
    log = threading.Thread(target=show, args=(copy,), daemon=True)
    log.start()
    time.sleep(OTHERS)  # also where the log is written at once: the others wait for this one
