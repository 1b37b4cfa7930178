"""The engine on its own thread, and text streams for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.chat.messages import PLAIN, Conventions, Tokenizer, thinking_marks
from deepseek_jax.config import ConfigError
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.openai.detokenize import AnswerStream, TextStream
from deepseek_jax.serving.openai.metrics import Metrics
from deepseek_jax.serving.openai.requests import BadRequest, CompletionRequest, ServedModel
from deepseek_jax.serving.openai.turns import Turns
from deepseek_jax.serving.sequence import Sequence, Token

log = logging.getLogger(__name__)


class TextToken(NamedTuple):
    """A token, the text that it completed, the offset of that text in its choice, and whether it belongs to the
    reasoning before the answer."""

    token: Token
    text: str
    offset: int
    reasoning: bool = False


class Delta(NamedTuple):
    """New text of one choice, and its tokens. reasoning: the part before the answer proper.

    finish_reason: None until the choice ends, then the engine's `Sequence.finish`, or "failed" if the engine has.
    """

    choice: int
    text: str
    tokens: list[TextToken]
    finish_reason: str | None = None
    reasoning: str = ""


class Service:
    """Runs an engine for many clients.

    Args:
      model: its name. max_waiting: sequences that may wait in addition to those that run; one more is refused with 429.
      text: the checkpoint's tokenizer and template, as `chat_template.of_folder` returns them.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, max_waiting: int,
                 text: Conventions = PLAIN):
        self.engine, self.capacity = engine, engine.max_sequences + max_waiting
        self.served = ServedModel(model, tokenizer, engine.cfg.vocab_size, engine.max_length, text, self.capacity)
        self.metrics: Metrics | None = None
        self.failure: Exception | None = None
        self.turns = Turns(engine.max_sequences)  # of requests that are to be read
        self.live: set[Callable] = set()  # the listeners of all sequences that run or wait
        self._stopping = False
        self._step_began: float | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Cancels everything in the engine and ends its thread; returns whether it ended within `seconds`."""
        self._stopping = True
        self.engine.cancel_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """The seconds that the engine's present step has taken; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _run(self):
        try:
            while not (self._stopping and not self.engine.busy):
                self.engine.wait(0.1)
                self._step_began = time.monotonic()
                self.engine.step()
                self._step_began = None
                self.turns.renew()
        except Exception as error:  # no client will get another answer
            log.exception("the engine failed")
            self.failure = error
            for listen in list(self.live):
                listen(None, [])
        finally:
            self.turns.end()

    def submit(self, completion: CompletionRequest) -> Stream:
        """Queues all choices of a request, or none. Raises BadRequest (429) above capacity."""
        if self.failure:
            raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
        with self._lock:
            if len(completion.requests) > self.capacity - len(self.live):
                raise BadRequest(None, f"{len(self.live)} sequences run or wait; try again later.", 429,
                                 "over_capacity")
            return Stream(self, completion)


class Stream:
    """The answer to one request: deltas from all its choices, in the order of arrival.

    Raises BadRequest if the engine has no room for a choice of this length.
    """

    def __init__(self, service: Service, completion: CompletionRequest):
        self.service, self.completion = service, completion
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.open = len(completion.requests)  # choices that have not ended
        self.sequences: list[Sequence] = []
        for choice, request in enumerate(completion.requests):
            listen = _Listener(self, choice)
            service.live.add(listen)  # before the engine can end it
            try:
                self.sequences.append(service.engine.submit(request, listen))
            except ConfigError as error:
                service.live.discard(listen)
                self.cancel()
                raise BadRequest("max_tokens", str(error)) from None

    def put(self, delta: Delta) -> None:
        """Adds a delta; called from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the connection
            self.loop.call_soon_threadsafe(self.queue.put_nowait, delta)

    async def next_within(self, seconds: float) -> Delta | None:
        """The next delta; None if there was none in time."""
        try:
            delta = await asyncio.wait_for(self.queue.get(), seconds)
        except TimeoutError:
            return None
        self.open -= delta.finish_reason is not None
        return delta

    def place(self) -> int:
        """The place of its first choice in the queue, from 1; 0 once that has been admitted."""
        return self.service.engine.place(self.sequences[0])

    def cancel(self) -> None:
        """Ends the sequences that still run; harmless when all have ended."""
        for sequence in self.sequences:
            if sequence.finish is None:
                self.service.engine.cancel(sequence)

    def usage(self) -> dict[str, Any]:
        """Token counts with the API's names: each prompt once, and the delivered tokens of each choice."""
        total = lambda count, sequences=self.sequences: sum(map(count, sequences))
        firsts = self.sequences[::len(self.sequences) // self.completion.prompts]
        prompts, made = total(lambda s: len(s.request.prompt), firsts), total(lambda s: len(s.made))
        drafted, accepted = total(lambda s: s.drafted), total(lambda s: s.accepted)
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made,
                "prompt_tokens_details": {"cached_tokens": total(lambda s: s.reused, firsts)},
                "completion_tokens_details": {"accepted_prediction_tokens": accepted,
                                              "rejected_prediction_tokens": drafted - accepted}}


class _Listener:
    """Called by the engine's thread with new tokens of a choice, and without any when the sequence has ended."""

    def __init__(self, stream: Stream, choice: int):
        self._stream, self._choice, self._service = stream, choice, stream.service
        completion = stream.completion
        served, prompt = stream.service.served, completion.requests[choice].prompt
        self._text = AnswerStream(served.tokenizer.bytes_of, completion.stops,
                                  thinking_marks(served.tokenizer) if completion.chat else None, prompt)
        self._echo = completion.echo  # whether the prompt is still to come
        self._start = 0  # characters of the prompt
        self._last: float | None = None  # when the last tokens came

    def __call__(self, sequence: Sequence | None, new: list[Token]) -> int | None:
        text, tokens, kept, finish = ["", ""], [], None, None
        if self._echo and sequence is not None:
            text[0], tokens = self._prompt(sequence)
        for i, token in enumerate(new, 1):
            completed, offset, reasoning = self._text.feed(token.id)
            text[reasoning] += completed
            tokens.append(TextToken(token, completed, self._start + offset, reasoning))
            if self._text.stopped:
                kept = i
                break
        if new and sequence is not None:
            self._time(sequence, len(new))
        if not new:
            text[self._text.reasons] += self._text.flush()
            if self._stream.completion.echo and sequence is not None and sequence.end is not None:
                # lm-eval takes the last logprob for that of a new token, and leaves it out.
                tokens.append(TextToken(sequence.end, "", self._start + self._text.offset))
            finish = "failed" if self._service.failure or sequence is None else sequence.finish
            self._service.live.discard(self)
        if any(text) or tokens or finish:
            self._stream.put(Delta(self._choice, text[0], tokens, finish, text[1]))
        return kept

    def _prompt(self, sequence: Sequence) -> tuple[str, list[TextToken]]:
        """The prompt's text and tokens, with their logprobs if requested; NaN for the first one."""
        self._echo = False
        text, tokens = TextStream(self._service.served.tokenizer.bytes_of), []
        scored = sequence.scored or [Token(i, "none") for i in sequence.request.prompt[1:]]
        for token in (Token(sequence.request.prompt[0], "none", math.nan), *scored):
            offset = text.offset
            tokens.append(TextToken(token, text.feed(token.id), offset))
        tail = text.flush()
        self._start = text.offset
        return "".join(token.text for token in tokens) + tail, tokens

    def _time(self, sequence: Sequence, count: int):
        metrics, now = self._service.metrics, time.monotonic()
        if metrics is not None:
            if self._last is None:
                metrics.queue.observe(sequence.admitted - sequence.submitted)
                metrics.first_token.observe(now - sequence.submitted)
            else:
                for _ in range(count):
                    metrics.between.observe((now - self._last) / count)
        self._last = now
