"""HTTP: the completion endpoints that clients of the OpenAI API know, health, Prometheus metrics, a chat page.

Needs the extra `serve` (Starlette and uvicorn).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import importlib.resources
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek_jax.serving.engine import Token
from deepseek_jax.serving.openai.requests import BadRequest, CompletionRequest, read
from deepseek_jax.serving.openai.stream import Delta, Service, Stream

MAX_BODY_BYTES = 4 * 2**20
DISCONNECT_CHECK_SECONDS = 0.25  # how often a complete response checks, before it is sent, that its client is there


def chat_page(model: str) -> str:
    """The page at `/`: chat.html with the model's name in place of "__MODEL__".

    It is one file without outside resources, asks only paths next to its own (so it works below a proxy's prefix),
    and needs nothing more of a Content-Security-Policy than inline script and style, `connect-src 'self'` and
    `img-src data:`.
    """
    page = importlib.resources.files("deepseek_jax.serving.openai").joinpath("chat.html").read_text(encoding="utf-8")
    # No "<" inside a script element: a name that contains "</script>" would end it.
    return page.replace('"__MODEL__"', json.dumps(model).replace("<", "\\u003c"))


class Endpoints:
    """Handlers of all paths. With an API key, all but the page and /health ask for it."""

    def __init__(self, service: Service, api_key: str | None = None):
        self.service, self.api_key = service, api_key
        self.answered = collections.Counter()  # by path and status
        self.chat_page = chat_page(service.served.name)

    def app(self) -> Starlette:
        """The application: starts the service's engine with the server and stops it after."""
        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.service.start()
            yield
            await asyncio.to_thread(self.service.stop)

        def route(path, handler, method, key=True):
            return Route(path, self._guarded(path, handler, key), methods=[method])

        return Starlette(lifespan=lifespan, routes=[
            route("/", self.page, "GET", key=False), route("/health", self.health, "GET", key=False),
            route("/metrics", self.metrics, "GET"), route("/loads", self.loads, "GET"),
            route("/v1/models", self.models, "GET"), route("/v1/models/{name}", self.models, "GET"),
            route("/v1/completions", self.completions, "POST"),
            route("/v1/chat/completions", self.completions, "POST")])

    def _guarded(self, path, handler, key):
        async def guarded(request):
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if key and self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
                    raise BadRequest("Authorization", "the API key is missing or wrong; send Authorization: Bearer "
                                     "KEY.", 401, "invalid_api_key")
                response = await handler(request)
            except BadRequest as bad:
                retry = {"Retry-After": "1"} if bad.status == 429 else None
                response = JSONResponse(bad.body(), bad.status, headers=retry)
            self.answered[path, response.status_code] += 1
            return response

        return guarded

    async def page(self, request: Request) -> Response:
        """The chat page."""
        return HTMLResponse(self.chat_page)

    async def health(self, request: Request) -> Response:
        """200 while the engine runs; 503 after it has failed."""
        broken = self.service.failure is not None
        return JSONResponse({"status": "failed" if broken else "ok"}, 503 if broken else 200)

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name."""
        served = self.service.served.name
        model = {"id": served, "object": "model", "created": int(self.service.started), "owned_by": "deepseek-jax"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != served:
            raise BadRequest("model", f"model {name!r} is not here; this server has {served!r}.", 404,
                             "model_not_found")
        return JSONResponse(model)

    async def loads(self, request: Request) -> Response:
        """Tokens that chose each expert so far, per MoE layer: the difference of two responses is the live load."""
        return JSONResponse({"loads": self.service.engine.loads_LE.tolist()})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return PlainTextResponse(metrics(self.service, self.answered), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        """Completions and chat completions, streamed or complete."""
        completion = read(await _body(request), request.url.path.startswith("/v1/chat"), self.service.served)
        stream = self.service.submit(completion)
        answer = Answer(self.service.served.name, completion, stream)
        if completion.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})
        try:
            return await answer.complete(request)
        finally:
            stream.cancel()


async def _body(request: Request):
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise BadRequest(None, f"the body is longer than {MAX_BODY_BYTES} bytes.", 413, "too_large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"the body is not JSON: {error}.", code="invalid_json") from None


class Answer:
    """Puts the deltas of a stream into the JSON of the API."""

    def __init__(self, model: str, completion: CompletionRequest, stream: Stream):
        self.completion, self.stream = completion, stream
        kind = "chat.completion" if completion.chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if completion.chat else 'cmpl'}-{secrets.token_hex(12)}",
                     "object": kind + (".chunk" if completion.chat and completion.stream else ""),
                     "created": int(time.time()), "model": model}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. A client that disconnects closes this generator, and its pages are freed."""
        event = lambda data: f"data: {json.dumps(data)}\n\n"
        usage = {"usage": None} if self.completion.include_usage else {}
        try:
            if self.completion.chat:
                for i in range(len(self.stream.sequences)):
                    opening = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield event({**self.head, "choices": [opening], **usage})
            while self.stream.open:
                delta = await self.stream.next()
                if delta.finish_reason == "error":
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
            # By the clock: while many choices run there is always a delta to take.
            if time.monotonic() - checked >= DISCONNECT_CHECK_SECONDS:
                if await request.is_disconnected():
                    return JSONResponse({}, 499)
                checked = time.monotonic()
            if new is None:
                continue
            if new.finish_reason == "error":
                raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
            old = choices[new.choice]
            choices[new.choice] = new._replace(text=old.text + new.text, tokens=old.tokens + new.tokens)
        return JSONResponse({**self.head, "choices": [self.choice(delta, "message") for delta in choices],
                             "usage": self.stream.usage()})

    def choice(self, delta: Delta, part: str) -> dict[str, Any]:
        """A choice of a response. `part`: "message" or, in a stream, "delta"; text completions have neither."""
        out: dict[str, Any] = {"index": delta.choice, "finish_reason": delta.finish_reason,
                               "logprobs": self.logprobs(delta)}
        if not self.completion.chat:
            out["text"] = delta.text
        elif part == "message":
            out["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        else:
            out["delta"] = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        if self.completion.return_drafts:
            out["drafts"] = [[text, token.draft] for token, text, _ in delta.tokens]
        return out

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Logprobs of the delta's tokens and the likeliest alternatives; None where none were requested."""
        most = self.completion.alternatives
        if most is None or not delta.tokens:
            return None
        spell = self.stream.service.served.tokenizer.spelling
        tokens = [token for token, _, _ in delta.tokens]
        if self.completion.chat:
            entry = lambda i, logprob: {"token": named(spell(i)), "logprob": logprob, "bytes": list(spell(i))}
            return {"content": [{**entry(t.id, t.logprob), "top_logprobs": [entry(*b) for b in t.best[:most]]}
                                for t in tokens], "refusal": None}
        return {"tokens": [named(spell(t.id)) for t in tokens], "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [alternatives(spell, t, most) for t in tokens],
                "text_offset": [offset for _, _, offset in delta.tokens]}


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
        found[f"token_id:{i}" if name in found else name] = logprob
    return found


def metrics(service: Service, answered: Mapping[tuple[str, int], int]) -> str:
    """Prometheus text. `answered`: responses by path and status."""
    engine, pool = service.engine, service.engine.pool
    rows = [("requests_total", "counter", [(f'{{path="{path}",status="{status}"}}', n)
                                           for (path, status), n in sorted(answered.items())])]
    for name in ("tokens", "prompt_tokens", "reused_tokens", "drafted", "accepted", "steps"):
        rows.append((f"{name}_total", "counter", [("", engine.totals[name])]))
    rows += [("sequences", "gauge", [(f'{{state="{state}"}}', len(getattr(engine, state)))
                                     for state in ("running", "reading", "waiting")]),
             ("cache_pages", "gauge", [('{state="owned"}', pool.owned), ('{state="all"}', pool.total)]),
             ("cache_live_bytes", "gauge", [("", engine.live_bytes())]),
             ("expert_load_total", "counter", [(f'{{layer="{i}",expert="{e}"}}', int(n))
                                               for i, row in enumerate(engine.loads_LE) for e, n in enumerate(row)])]
    lines = []
    for name, kind, values in rows:
        lines.append(f"# TYPE deepseek_jax_{name} {kind}")
        lines += [f"deepseek_jax_{name}{labels} {value}" for labels, value in values]
    return "\n".join(lines) + "\n"


class _Server(uvicorn.Server):
    """SIGTERM and SIGINT let running requests finish, and end the process with 0; a second one does not wait."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(service: Service, host: str, port: int, api_key: str | None = None) -> None:
    """Runs until a signal; then refuses new connections, finishes the open ones, and returns."""
    app = Endpoints(service, api_key).app()
    _Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=None)).run()
