"""A thread for work that the training loop need not wait for, done in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

MOST = 256  # queued calls: if a disk hangs, the loop waits for it instead of filling the memory


class Background:
    """Calls functions in a separate thread. An exception is raised again by the next `do`, `flush` or `close`, and the
    calls queued after it are dropped."""

    def __init__(self, name: str):
        self._calls: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue(MOST)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, call: Callable[..., None], *arguments: Any) -> None:
        """Queues the call; made at once when called from this thread. Raises the exception of an earlier call."""
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
