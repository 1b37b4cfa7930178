"""A watch over a run that hangs: when no step ends for some minutes, every thread shows its stack and the process ends.

The others of a run hear of it (`parallel.watch`) and end too, with the exit code of a lost process: the same command
continues from the last checkpoint. SIGQUIT shows the stacks and ends nothing (`stop.show_stacks`).
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from typing import Any

from deepseek_jax import stop

OTHERS = 5  # seconds in which the others of a run, which wait for this one, show theirs


class StallWatch:
    """Ends the process when `beat` has not been called for some minutes; None: never."""

    def __init__(self, minutes: float | None):
        self.limit, self.last, self.ended = (minutes or 0) * 60, time.monotonic(), threading.Event()
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

    def _look(self):
        while not self.ended.wait(min(1.0, self.limit / 10)):
            silent = time.monotonic() - self.last
            if silent > self.limit:
                print(f"\nerror: no step has ended for {silent:.0f} seconds (train.stall_minutes={self.limit / 60:g}); "
                      "the stacks of all threads follow, and the process ends. The same command continues from the "
                      "last checkpoint.", file=sys.stderr, flush=True)
                _show_stacks()
                time.sleep(OTHERS)
                stop.leave(stop.PEER_LOST)


def _show_stacks():
    copy = getattr(sys.stderr, "copy", None)  # the log of the process (`logs`)
    for file in (sys.__stderr__, copy):
        if file is not None:
            faulthandler.dump_traceback(file=file, all_threads=True)
