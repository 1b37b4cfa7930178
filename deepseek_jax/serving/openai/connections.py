"""Connections with time limits: a client that sends half a request, or stops reading, loses its connection."""

from __future__ import annotations

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds that a client may take for the head of a request, and for its body.
SECONDS = {h11.IDLE: 15.0, h11.SEND_BODY: 60.0}
READ_SECONDS = 30.0  # seconds that a reader may take nothing while there is more for it


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with limits of time, and of connections: half of the files that may be open."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Accepts the connection, or closes it if there are too many already."""
        super().connection_made(transport)
        self._state, self._sender, self._reader = None, None, None
        if 2 * len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        super().data_received(data)
        self._watch()

    def _watch(self):
        """Starts the time limit for the client's data, once for each head and body."""
        state = self.conn.their_state
        if state is self._state:
            return
        self._state = state
        self._stop(self._sender)
        self._sender = self.loop.call_later(SECONDS[state], self.transport.abort) if state in SECONDS else None

    def pause_writing(self) -> None:
        """The client has stopped reading."""
        super().pause_writing()
        self._stop(self._reader)
        self._reader = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop(self._reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the time limits of the connection."""
        super().connection_lost(exc)
        self._stop(self._sender)
        self._stop(self._reader)

    @staticmethod
    def _stop(clock: asyncio.TimerHandle | None):
        if clock is not None:
            clock.cancel()
