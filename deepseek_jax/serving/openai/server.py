"""HTTP: the completion endpoints that clients of the OpenAI API know, health, Prometheus metrics, a page to talk to.

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

import uvicorn
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from deepseek_jax.serving.openai import requests
from deepseek_jax.serving.openai.requests import Asked, BadRequest
from deepseek_jax.serving.openai.stream import Piece, Service, Stream

MOST_BYTES = 4 * 2**20  # of a request's body
LOOK = 0.25  # seconds between looks whether a silent client is still there


def chat_page(model: str) -> str:
    """The page at `/`: chat.html with the model's name in place of "__MODEL__".

    The page shows which tokens MTP had drafted, tokens per second, and the live load of the experts.
    """
    page = importlib.resources.files("deepseek_jax.serving.openai").joinpath("chat.html").read_text(encoding="utf-8")
    # No "<" inside a script element: a name that contains "</script>" would end it.
    return page.replace('"__MODEL__"', json.dumps(model).replace("<", "\\u003c"))


class Endpoints:
    def __init__(self, service: Service, api_key: str | None = None):
        self.service, self.api_key = service, api_key
        self.answered = collections.Counter()  # by path and status
        self.chat_page = chat_page(service.model)

    def app(self) -> Starlette:
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

    async def page(self, request):
        return HTMLResponse(self.chat_page)

    async def health(self, request):
        broken = self.service.failure is not None
        return JSONResponse({"status": "failed" if broken else "ok"}, 503 if broken else 200)

    async def models(self, request):
        model = {"id": self.service.model, "object": "model", "created": int(self.service.started),
                 "owned_by": "deepseek-jax"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self.service.model:
            raise BadRequest("model", f"model {name!r} is not here; this server has {self.service.model!r}.", 404,
                             "model_not_found")
        return JSONResponse(model)

    async def loads(self, request):
        """Tokens that chose each expert so far, per MoE layer: the difference of two answers is the live load."""
        return JSONResponse({"loads": self.service.engine.loads_LE.tolist()})

    async def metrics(self, request):
        return PlainTextResponse(metrics(self.service, self.answered), media_type="text/plain; version=0.0.4")

    async def completions(self, request):
        engine = self.service.engine
        body = await _body(request)
        asked = requests.read(body, request.url.path.startswith("/v1/chat"), self.service.tokenizer,
                             engine.cfg.vocab_size,
                         self.service.model, engine.max_length, self.service.template)
        stream = self.service.submit(asked)
        answer = Answer(self.service.model, asked, stream)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})
        try:
            return await answer.whole(request)
        finally:
            stream.cancel()


async def _body(request):
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise BadRequest(None, f"the body is longer than {MOST_BYTES} bytes.", 413, "too_large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"the body is not JSON: {error}.", code="invalid_json") from None


class Answer:
    """Puts pieces into the words of the API."""

    def __init__(self, model: str, asked: Asked, stream: Stream):
        self.asked, self.stream = asked, stream
        kind = "chat.completion" if asked.chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
                     "object": kind + (".chunk" if asked.chat and asked.stream else ""),
                     "created": int(time.time()), "model": model}

    async def events(self):
        """Server-sent events. A client that goes away closes this generator, and its pages are freed."""
        event = lambda data: f"data: {json.dumps(data)}\n\n"
        usage = {"usage": None} if self.asked.include_usage else {}
        try:
            if self.asked.chat:
                for i in range(len(self.stream.sequences)):
                    delta = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield event({**self.head, "choices": [delta], **usage})
            while self.stream.open:
                piece = await self.stream.next()
                if piece.end == "error":
                    yield event({"error": {"message": "the engine has failed.", "type": "server_error"}})
                    return
                yield event({**self.head, "choices": [self.choice(piece, "delta")], **usage})
            if self.asked.include_usage:
                yield event({**self.head, "choices": [], "usage": self.stream.usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.stream.cancel()

    async def whole(self, request):
        """One JSON answer; gives up when the client has."""
        texts = [Piece(i, "", [], None) for i in range(len(self.stream.sequences))]
        while self.stream.open:
            piece = await self.stream.next(LOOK)
            if piece is None:
                if await request.is_disconnected():
                    return JSONResponse({}, 499)
                continue
            if piece.end == "error":
                raise BadRequest(None, "the engine has failed; see the server's log.", 500, "engine_failed")
            old = texts[piece.choice]
            texts[piece.choice] = Piece(piece.choice, old.text + piece.text, old.tokens + piece.tokens, piece.end)
        return JSONResponse({**self.head, "choices": [self.choice(piece, "message") for piece in texts],
                             "usage": self.stream.usage()})

    def choice(self, piece: Piece, part: str):
        out = {"index": piece.choice, "finish_reason": piece.end, "logprobs": self.logprobs(piece)}
        if not self.asked.chat:
            out["text"] = piece.text
        elif part == "message":
            out["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            out["delta"] = {"content": piece.text} if piece.text or not piece.end else {}
        if self.asked.return_drafts:
            out["drafts"] = [[said.text, said.token.draft] for said in piece.tokens]
        return out

    def logprobs(self, piece: Piece):
        most = self.asked.alternatives
        if most is None or not piece.tokens:
            return None
        spell = lambda i: self.stream.service.tokenizer.decode([i], specials=True)
        tokens = [said.token for said in piece.tokens]
        if self.asked.chat:
            entry = lambda i, logprob: {"token": spell(i), "logprob": logprob, "bytes": list(spell(i).encode())}
            return {"content": [{**entry(t.id, t.logprob), "top_logprobs": [entry(*b) for b in t.best[:most]]}
                                for t in tokens], "refusal": None}
        return {"tokens": [spell(t.id) for t in tokens], "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [{spell(i): logprob for i, logprob in t.best[:most]} for t in tokens],
                "text_offset": [said.offset for said in piece.tokens]}


def metrics(service: Service, answered) -> str:
    """Prometheus text."""
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
    """SIGTERM and SIGINT let what runs finish, and end the process with 0; a second one does not wait."""

    @contextlib.contextmanager
    def capture_signals(self):
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(service: Service, host: str, port: int, api_key: str | None = None):
    """Runs until a signal; then refuses new connections, finishes those there are, and returns."""
    app = Endpoints(service, api_key).app()
    _Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=None)).run()
