"""The engine on a thread of its own, and streams of text that an event loop can wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import NamedTuple

from deepseek_jax.config import ConfigError
from deepseek_jax.serving.engine import Engine, Token
from deepseek_jax.serving.openai.detokenize import TextStream
from deepseek_jax.serving.openai.requests import Asked, BadRequest

log = logging.getLogger(__name__)


class Said(NamedTuple):
    """A token, the text that it settled, and where in the whole text it begins."""

    token: Token
    text: str
    offset: int


class Piece(NamedTuple):
    """Text of one choice, and the tokens it came with. `end`: why it ended, with the sequence for its counts."""

    choice: int
    text: str
    tokens: list[Said]
    end: str | None = None


class Service:
    """Runs an engine for many clients.

    Args:
      most_waiting: sequences that may wait beside those that run; one more is refused with 429.
      template: of chats, as `serving.chat_template.read` gives it.
    """

    def __init__(self, engine: Engine, tokenizer, model: str, most_waiting: int, template=None):
        self.engine, self.tokenizer, self.model, self.most_waiting = engine, tokenizer, model, most_waiting
        self.template = template
        self.started, self.failure, self._stopping = time.time(), None, False
        self.live = set()  # the listeners of all sequences that run or wait
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        """Ends the thread after whatever still runs."""
        self._stopping = True
        self._thread.join()

    def _run(self):
        try:
            while not (self._stopping and not self.engine.busy):
                self.engine.wait(0.1)
                self.engine.step()
        except Exception as error:  # nothing that a client may wait for comes any more
            log.exception("the engine failed")
            self.failure = error
            for listen in list(self.live):
                listen(None, [])

    def submit(self, asked: Asked) -> Stream:
        """Queues all choices of a request, or none. Raises BadRequest (429) above capacity."""
        if self.failure:
            raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
        with self._lock:
            room = self.engine.max_sequences + self.most_waiting - len(self.live)
            if len(asked.requests) > room:
                raise BadRequest(None, f"{len(self.live)} sequences run or wait; try again later.", 429,
                                 "over_capacity")
            return Stream(self, asked)


class Stream:
    """The answer to one request: pieces of text, in the order they come, from all its choices."""

    def __init__(self, service: Service, asked: Asked):
        self.service, self.asked = service, asked
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.open = len(asked.requests)
        self.sequences = []
        for choice, request in enumerate(asked.requests):
            text = TextStream(service.tokenizer.decode, asked.stops)
            listen = self._listener(choice, text)
            service.live.add(listen)  # before the engine can end it
            try:
                self.sequences.append(service.engine.submit(request, listen))
            except ConfigError as error:
                service.live.discard(listen)
                self.cancel()
                raise BadRequest("max_tokens", str(error)) from None

    def _listener(self, choice, text):
        def listen(sequence, new) -> bool:
            said, tokens = "", []
            for token in new:
                if text.stopped:
                    break
                offset = text.offset
                part = text.feed(token.id)
                said += part
                tokens.append(Said(token, part, offset))
            end = None
            if not new:
                said += "" if text.stopped else text.flush()
                end = "error" if self.service.failure else sequence.finish
                self.service.live.discard(listen)
            if said or tokens or end:
                self._put(Piece(choice, said, tokens, end))
            return text.stopped

        return listen

    def _put(self, piece):
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it who asked
            self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)

    async def next(self, timeout: float | None = None) -> Piece | None:
        """The next piece; None when nothing came in time."""
        try:
            piece = await asyncio.wait_for(self.queue.get(), timeout)
        except TimeoutError:
            return None
        self.open -= piece.end is not None
        return piece

    def cancel(self):
        """Frees what is still held; harmless when all has ended."""
        for sequence in self.sequences:
            if sequence.finish is None:
                self.service.engine.cancel(sequence)

    def usage(self):
        made, drafted, accepted, reused = (sum(getattr(s, name) if name != "made" else len(s.made)
                                               for s in self.sequences)
                                           for name in ("made", "drafted", "accepted", "reused"))
        prompts = sum(len(s.request.prompt) for s in self.sequences)
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made,
                "prompt_tokens_details": {"cached_tokens": reused},
                "completion_tokens_details": {"accepted_prediction_tokens": accepted,
                                              "rejected_prediction_tokens": drafted - accepted}}
