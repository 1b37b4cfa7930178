"""Answers of the completion endpoints: deltas of a stream as JSON of the OpenAI API, streamed or complete."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deepseek_jax.serving.openai.requests import BadRequest, CompletionRequest
from deepseek_jax.serving.openai.stream import Delta, Stream
from deepseek_jax.serving.sequence import Token

DISCONNECT_CHECK_SECONDS = 0.25  # how often a non-streamed response checks that its client is still connected
COMMENT_SECONDS = 10.0  # how often an idle stream sends a comment, since proxies close silent connections
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Answer:
    """Converts the deltas of a stream to the API's JSON."""

    def __init__(self, model: str, completion: CompletionRequest, stream: Stream):
        self.completion, self.stream = completion, stream
        kind = "chat.completion" if completion.chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if completion.chat else 'cmpl'}-{secrets.token_hex(12)}",
                     "object": kind + (".chunk" if completion.chat and completion.stream else ""),
                     "created": int(time.time()), "model": model}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. A client that disconnects closes this generator, and its pages are freed."""
        event = lambda data: f"data: {json.dumps(data, allow_nan=False)}\n\n"
        usage = {"usage": None} if self.completion.include_usage else {}
        try:
            if self.completion.chat:
                for i in range(len(self.stream.sequences)):
                    opening = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield event({**self.head, "choices": [opening], **usage})
            told, silent_since = 0, time.monotonic()
            while self.stream.open:
                delta = await self.stream.next_within(1.0)
                if delta is None:
                    place = self.stream.place()
                    if place != told or time.monotonic() - silent_since > COMMENT_SECONDS:
                        told, silent_since = place, time.monotonic()
                        yield f": waiting {place}\n\n" if place else ": working\n\n"
                    continue
                silent_since = time.monotonic()
                if delta.finish_reason == "failed":
                    yield event({"error": {"message": "the engine has failed.", "type": "server_error"}})
                    return
                yield event({**self.head, "choices": [self.choice(delta, "delta")], **usage})
            if self.completion.include_usage:
                yield event({**self.head, "choices": [], "usage": self.stream.usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.stream.cancel()

    async def complete(self, request: Request) -> Response:
        """One JSON response; gives up when the client has disconnected."""
        choices = [Delta(i, "", [], None) for i in range(len(self.stream.sequences))]
        checked = time.monotonic()
        while self.stream.open:
            new = await self.stream.next_within(DISCONNECT_CHECK_SECONDS)
            # By time: while many choices run there is always a delta to take.
            if time.monotonic() - checked >= DISCONNECT_CHECK_SECONDS:
                if await request.is_disconnected():
                    return JSONResponse({}, 499)
                checked = time.monotonic()
            if new is None:
                continue
            if new.finish_reason == "failed":
                raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
            old = choices[new.choice]
            choices[new.choice] = new._replace(text=old.text + new.text, tokens=old.tokens + new.tokens,
                                               reasoning=old.reasoning + new.reasoning)
        return JSONResponse({**self.head, "choices": [self.choice(delta, "message") for delta in choices],
                             "usage": self.stream.usage()})

    def choice(self, delta: Delta, part: str) -> dict[str, Any]:
        """A choice of a response. `part`: "message" or, in a stream, "delta"; text completions have neither."""
        out: dict[str, Any] = {"index": delta.choice, "finish_reason": delta.finish_reason,
                               "logprobs": self.logprobs(delta)}
        if not self.completion.chat:
            out["text"] = delta.text
        elif part == "message":
            reasoning = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
            out["message"] = {"role": "assistant", "content": delta.text, **reasoning, "refusal": None}
        else:
            silent = not (delta.text or delta.reasoning or delta.finish_reason)  # such as half a character
            parts = {"content": delta.text, "reasoning_content": delta.reasoning}
            out["delta"] = {"content": ""} if silent else {name: part for name, part in parts.items() if part}
        if self.completion.return_drafts:
            out["drafts"] = [[text, token.draft, *([True] if reasoning else [])]
                             for token, text, _, reasoning in delta.tokens]
        return out

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Logprobs of the delta's tokens and the likeliest alternatives; None if none were requested."""
        most = self.completion.alternatives
        if most is None or not delta.tokens:
            return None
        spell = self.stream.service.served.tokenizer.spelling
        tokens = [token.token for token in delta.tokens]
        if self.completion.chat:
            entry = lambda i, logprob: {"token": named(spell(i)), "logprob": max(logprob, LEAST_LOGPROB),
                                        "bytes": list(spell(i))}
            return {"content": [{**entry(t.id, t.logprob), "top_logprobs": [entry(*b) for b in t.best[:most]]}
                                for t in tokens], "refusal": None}
        first = lambda token: math.isnan(token.logprob)  # the first token of a prompt has no context
        return {"tokens": [named(spell(t.id)) for t in tokens],
                "token_logprobs": [None if first(t) else max(t.logprob, LEAST_LOGPROB) for t in tokens],
                "top_logprobs": [None if first(t) else alternatives(spell, t, most) for t in tokens],
                "text_offset": [token.offset for token in delta.tokens]}


def named(spelling: bytes) -> str:
    """A token as the API writes it: its text, or its bytes where they are only part of a character."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def alternatives(spell: Callable[[int], bytes], token: Token, most: int) -> dict[str, float]:
    """Logprobs of the likeliest tokens and the drawn one, by name; of two with equal names one is named by its id."""
    found: dict[str, float] = {}
    for i, logprob in dict([*token.best[:most], (token.id, token.logprob)]).items():
        name = named(spell(i))
        found[f"token_id:{i}" if name in found else name] = max(logprob, LEAST_LOGPROB)
    return found
