"""Admits requests at the pace of the engine, so that reading them takes little time from the running streams.

An engine admits at most as many sequences in a step as it has slots. Requests read faster than that would only wait
elsewhere, while their sockets, JSON and tokens cost processor time and Python's lock, which steps need.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math


class Turns:
    """`each` turns between two steps of an engine, first come, first served.

    `take` and `give_back` are for the event loop's thread, `renew` and `end` for the engine's.
    """

    def __init__(self, each: int):
        self._each: float = each
        self._left: float = each
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        self._loop: asyncio.AbstractEventLoop | None = None  # the event loop of the callers of `take`

    async def take(self) -> None:
        """Returns when it is the caller's turn."""
        self._loop = asyncio.get_running_loop()
        if self._left > 0:
            self._left -= 1
            return
        turn = self._loop.create_future()
        self._queue.append(turn)
        await turn

    def give_back(self) -> None:
        """Passes an unused turn, whose client has left, to the next caller."""
        self._grant(min(self._left + 1, self._each))

    def renew(self) -> None:
        """Renews the turns after a step."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._grant, self._each)

    def end(self) -> None:
        """Releases all callers: there will be no further step."""
        self._each = self._left = math.inf
        self.renew()

    def _grant(self, turns: float):
        self._left = turns
        while self._queue and self._left > 0:
            turn = self._queue.popleft()
            if not turn.done():  # cancelled, with the task that waited
                turn.set_result(None)
                self._left -= 1
