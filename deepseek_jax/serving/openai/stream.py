"""The engine on its own thread, and text streams for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.config import ConfigError
from deepseek_jax.serving.engine import Engine, Sequence, Token
from deepseek_jax.serving.openai.chat import PLAIN, Conventions, Tokenizer
from deepseek_jax.serving.openai.detokenize import TextStream
from deepseek_jax.serving.openai.requests import BadRequest, CompletionRequest, ServedModel

log = logging.getLogger(__name__)


class TextToken(NamedTuple):
    """A token, the text that it completed, and the offset at which it begins in the text of its choice."""

    token: Token
    text: str
    offset: int


class Delta(NamedTuple):
    """New text of one choice, and the tokens it came with.

    finish_reason: None until the choice ends, then the engine's `Sequence.finish`, or "error" if the engine failed.
    """

    choice: int
    text: str
    tokens: list[TextToken]
    finish_reason: str | None = None


class Service:
    """Runs an engine for many clients.

    Args:
      model: its name. max_waiting: sequences that may wait in addition to those that run; one more is refused with 429.
      text: what the checkpoint says about its text, as `chat_template.of_folder` returns it.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, max_waiting: int,
                 text: Conventions = PLAIN):
        self.engine, self.max_waiting = engine, max_waiting
        self.served = ServedModel(model, tokenizer, engine.cfg.vocab_size, engine.max_length, text)
        self.started = time.time()
        self.failure: Exception | None = None
        self.live: set[Callable] = set()  # the listeners of all sequences that run or wait
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after every sequence in the engine has ended."""
        self._stopping = True
        self._thread.join()

    def _run(self):
        try:
            while not (self._stopping and not self.engine.busy):
                self.engine.wait(0.1)
                self.engine.step()
        except Exception as error:  # no client will get anything that it waits for
            log.exception("the engine failed")
            self.failure = error
            for listen in list(self.live):
                listen(None, [])

    def submit(self, completion: CompletionRequest) -> Stream:
        """Queues all choices of a request, or none. Raises BadRequest (429) above capacity."""
        if self.failure:
            raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
        with self._lock:
            room = self.engine.max_sequences + self.max_waiting - len(self.live)
            if len(completion.requests) > room:
                raise BadRequest(None, f"{len(self.live)} sequences run or wait; try again later.", 429,
                                 "over_capacity")
            return Stream(self, completion)


class Stream:
    """The answer to one request: deltas from all its choices, in the order they come."""

    def __init__(self, service: Service, completion: CompletionRequest):
        self.service = service
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.open = len(completion.requests)  # choices that have not ended
        self.sequences: list[Sequence] = []
        for choice, request in enumerate(completion.requests):
            listen = self._listener(choice, TextStream(service.served.tokenizer.bytes_of, completion.stops))
            service.live.add(listen)  # before the engine can end it
            try:
                self.sequences.append(service.engine.submit(request, listen))
            except ConfigError as error:
                service.live.discard(listen)
                self.cancel()
                raise BadRequest("max_tokens", str(error)) from None

    def _listener(self, choice: int, text: TextStream):
        """What the engine's thread calls with new tokens; without any when the sequence has ended."""
        def listen(sequence: Sequence | None, new: list[Token]) -> bool:
            new_text, tokens = "", []
            for token in new:
                if text.stopped:
                    break
                offset = text.offset
                completed = text.feed(token.id)
                new_text += completed
                tokens.append(TextToken(token, completed, offset))
            finish_reason = None
            if not new:
                new_text += "" if text.stopped else text.flush()
                finish_reason = "error" if self.service.failure or sequence is None else sequence.finish
                self.service.live.discard(listen)
            if new_text or tokens or finish_reason:
                self._put(Delta(choice, new_text, tokens, finish_reason))
            return text.stopped

        return listen

    def _put(self, delta: Delta):
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
            self.loop.call_soon_threadsafe(self.queue.put_nowait, delta)

    async def next(self) -> Delta:
        """The next delta, however long it takes."""
        delta = await self.queue.get()
        self.open -= delta.finish_reason is not None
        return delta

    async def next_within(self, seconds: float) -> Delta | None:
        """The next delta; None when there was none in time."""
        try:
            return await asyncio.wait_for(self.next(), seconds)
        except TimeoutError:
            return None

    def cancel(self) -> None:
        """Ends the sequences that still run; harmless when all have ended."""
        for sequence in self.sequences:
            if sequence.finish is None:
                self.service.engine.cancel(sequence)

    def usage(self) -> dict[str, Any]:
        """Token counts of all choices, as the API names them."""
        total = lambda count: sum(map(count, self.sequences))
        prompts, made = total(lambda s: len(s.request.prompt)), total(lambda s: len(s.made))
        drafted, accepted = total(lambda s: s.drafted), total(lambda s: s.accepted)
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made,
                "prompt_tokens_details": {"cached_tokens": total(lambda s: s.reused)},
                "completion_tokens_details": {"accepted_prediction_tokens": accepted,
                                              "rejected_prediction_tokens": drafted - accepted}}
