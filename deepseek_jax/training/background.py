"""A thread that does, in order, what the training loop need not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

MOST = 256  # calls that wait: a disk that hangs ends in waiting for it, not in memory


class Background:
    """Calls functions in a thread of its own. What one raises comes out of the next `do`, or of `flush` or `close`, and
    what was to be done after it is not."""

    def __init__(self, name: str):
        self._calls: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue(MOST)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls it soon; at once, where this thread calls. Raises what an earlier one has raised."""
        if threading.current_thread() is self._thread:
            call(*arguments)
            return
        self._raise()
        self._calls.put((call, arguments))

    def flush(self) -> None:
        """Returns when all is done. Raises as `do` does."""
        self._calls.join()
        self._raise()

    def close(self) -> None:
        """Returns when all is done, and the thread has ended. Raises as `do` does."""
        self._calls.put(None)
        self._thread.join()
        self._raise()

    def _work(self):
        while (found := self._calls.get()) is not None:
            call, arguments = found
            if self._error is None:
                try:
                    call(*arguments)
                except BaseException as error:
                    self._error = error
            self._calls.task_done()

    def _raise(self):
        if self._error is not None:
            raise self._error
