"""The HTTP server: the completion endpoints of the OpenAI API, health, Prometheus metrics, a chat page.

Needs the extra `serve` (Starlette and uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hmac
import importlib.resources
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek_jax.serving.openai.answers import Answer
from deepseek_jax.serving.openai.connections import Connection
from deepseek_jax.serving.openai.guard import Guard, is_loopback
from deepseek_jax.serving.openai.metrics import Metrics
from deepseek_jax.serving.openai.requests import BadRequest, read
from deepseek_jax.serving.openai.schema import openapi
from deepseek_jax.serving.openai.stream import Service
from deepseek_jax.serving.openai.turns import Turns

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
TURN_BYTES = 2**18  # bytes of a body read per turn: as much as the event loop receives at once
READERS = 2  # threads that parse completions and tokenize prompts; as many for chats
STALLED_SECONDS = 60.0  # seconds; a step that takes longer is unlikely to end
FAILED = BadRequest(None, "the server has failed; see its log.", 500, "failed")
STOP_SECONDS = 2.0  # seconds for the engine to end its step, after the grace period for running requests

Report = Callable[[str], None]  # called with the progress of a start


@dataclasses.dataclass(frozen=True)
class Options:
    """How to serve.

    api_key: required from clients, except for the page and /health. origins: other pages that are allowed
    (`guard.Guard`). grace: seconds that running requests have to end after SIGTERM. per_expert: whether /metrics has
    the load of each expert of each layer.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    grace: int = 30
    per_expert: bool = False


def chat_page(model: str) -> str:
    """The page at `/`: chat.html with the model's name in place of "__MODEL__".

    It is one file without outside resources, requests only paths next to its own (so it works below a proxy's prefix),
    and needs from a Content-Security-Policy only inline script and style, `connect-src 'self'` and `img-src data:`.
    """
    page = importlib.resources.files("deepseek_jax.serving.openai").joinpath("chat.html").read_text(encoding="utf-8")
    # No "<" inside a script element: a name that contains "</script>" would end it.
    return page.replace('"__MODEL__"', json.dumps(model).replace("<", "\\u003c"))


class EventStream(StreamingResponse):
    """Server-sent events that proxies forward at once; closes their source even if none was ever sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.end = end

    async def __call__(self, scope, receive, send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


class Endpoints:
    """Handlers of all paths, which already work before the model is loaded.

    Args:
      load: returns the service; may take minutes, on a thread of its own.
      name: of the model. local: whether the server is bound to loopback. ended: called if `load` fails.
    """

    def __init__(self, load: Callable[[Report], Service], name: str, options: Options = Options(), local: bool = True,
                 ended: Callable[[], None] = lambda: None):
        self.options, self.local, self.name = options, local, name
        self.service: Service | None = None
        self.failure: BaseException | None = None  # of `load`
        self.progress = "loading"
        self.started = time.time()
        self.metrics = Metrics(options.per_expert)
        self.chat_page = chat_page(name)
        self._load, self._ended = load, ended
        # One for completions and one for chats: chats wait for their template, which may be slow.
        self._readers = {chat: ThreadPoolExecutor(READERS, "reader") for chat in (False, True)}

    def app(self) -> Starlette:
        """The application: starts loading with the server, and stops the engine at its end."""
        @contextlib.asynccontextmanager
        async def lifespan(app):
            threading.Thread(target=self._start, name="load", daemon=True).start()
            yield
            if self.service is not None and not await asyncio.to_thread(self.service.stop, STOP_SECONDS):
                log.error("the engine's step does not end; leaving it.")

        def route(path, handler, method="GET", key=True):
            return Route(path, self._guarded(path, handler, key), methods=[method])

        async def failed(request, error):
            return JSONResponse(BadRequest(None, f"{error.detail}: {request.method} {request.url.path[:80]}.",
                                           error.status_code, "no_such_path").body(), error.status_code, error.headers)

        async def broken(request, error):
            log.error("%s has failed:", request.url.path, exc_info=error)
            return JSONResponse(FAILED.body(), FAILED.status)

        return Starlette(lifespan=lifespan, exception_handlers={HTTPException: failed, Exception: broken}, middleware=[
            Middleware(Guard, local=self.local, origins=self.options.origins)], routes=[
            route("/", self.page, key=False), route("/health", self.health, key=False),
            route("/openapi.json", self.openapi, key=False), route("/metrics", self.metrics_text),
            route("/loads", self.loads),
            route("/v1/models", self.models), route("/v1/models/{name:path}", self.models),
            route("/v1/completions", self.completions, "POST"),
            route("/v1/chat/completions", self.completions, "POST")])

    def _start(self):
        def report(progress):
            self.progress = progress

        try:
            service = self._load(report)
            service.metrics = self.metrics
            self.metrics.watch(service.engine)
            # Objects that exist now will stay. A garbage collection over all of them stops every thread for half a
            # second.
            gc.collect()
            gc.freeze()
            service.start()
            self.service = service
        except BaseException as error:
            self.failure = error
            self._ended()

    def _guarded(self, path, handler, key):
        async def guarded(request):
            try:
                if key and self.options.api_key:
                    self._check_key(request)
                response = await handler(request)
            except BadRequest as bad:
                retry = {"Retry-After": "1"} if bad.status in (429, 503) else None
                response = JSONResponse(bad.body(), bad.status, headers=retry)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody receives it
            except Exception:  # an error in this program
                log.exception("%s has failed:", path)
                response = JSONResponse(FAILED.body(), FAILED.status)
            self.metrics.answered.labels(path, str(response.status_code)).inc()
            return response

        return guarded

    def _check_key(self, request):
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), (self.options.api_key or "").encode())
        if scheme.lower() != "bearer" or not right:
            raise BadRequest("Authorization", "the API key is missing or wrong; send Authorization: Bearer KEY.", 401,
                             "invalid_api_key")

    def _ready(self) -> Service:
        if self.service is None:
            raise BadRequest(None, f"the model is not there yet ({self.progress}); try again soon.", 503, "starting")
        return self.service

    async def page(self, request: Request) -> Response:
        """The chat page."""
        return HTMLResponse(self.chat_page)

    async def health(self, request: Request) -> Response:
        """200 while the engine runs; 503 before that, after it has failed, and while one of its steps does not end."""
        if self.service is None:
            return JSONResponse({"status": "starting", "progress": self.progress}, 503)
        if self.service.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        if self.service.step_seconds > STALLED_SECONDS:
            return JSONResponse({"status": "stalled", "seconds": round(self.service.step_seconds)}, 503)
        return JSONResponse({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI description of the server."""
        return JSONResponse(openapi(self.name, self.options.api_key is not None))

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name."""
        served = self._ready().served
        model = {"id": served.name, "object": "model", "created": int(self.started), "owned_by": "deepseek-jax",
                 "max_model_len": served.max_length}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != served.name:
            raise BadRequest("model", f"model {name[:80]!r} is not here; this server has {served.name!r}.", 404,
                             "model_not_found")
        return JSONResponse(model)

    async def loads(self, request: Request) -> Response:
        """Tokens that chose each expert so far, per MoE layer: the difference of two responses is the live load."""
        return JSONResponse({"loads": self._ready().engine.loads_LE.tolist()})

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        """Completions and chat completions, streamed or complete."""
        service, began = self._ready(), time.monotonic()
        body, chat = await _body(request, service.turns), request.url.path.endswith("/chat/completions")
        completion = await asyncio.get_running_loop().run_in_executor(
            self._readers[chat], lambda: read(_parsed(body), chat, service.served))
        stream = service.submit(completion)
        answer = Answer(service.served.name, completion, stream)

        def end():
            stream.cancel()
            used = stream.usage()
            log.info("%s prompt_tokens=%d completion_tokens=%d choices=%d seconds=%.2f", request.url.path,
                     used["prompt_tokens"], used["completion_tokens"], len(stream.sequences),
                     time.monotonic() - began)

        if completion.stream:
            return EventStream(answer.events(), end)
        try:
            return await answer.complete(request)
        finally:
            end()


async def _body(request: Request, turns: Turns) -> bytes:
    """The body of a request, read in its turn; a long one takes several turns."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("Content-Type", f"send application/json, not {kind[:80]!r}.", 415, "unsupported_media_type")
    too_large = BadRequest(None, f"the body is longer than {MAX_BODY_BYTES} bytes.", 413, "too_large")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:  # the protocol accepts digits only
        raise too_large
    await turns.take()
    data, paid = bytearray(), TURN_BYTES
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise too_large
            while len(data) > paid:
                await turns.take()
                paid += TURN_BYTES
    except ClientDisconnect:
        turns.give_back()
        raise
    return bytes(data)


def _parsed(data: bytes) -> Any:
    def number(digits):
        value = float(digits)
        return int(value) if value.is_integer() else value  # JSON has one kind of number: 3.0 is an integer

    def no_number(name):
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(data, parse_float=number, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(None, f"the body is not JSON: {error}.", code="invalid_json") from None


class _Server(uvicorn.Server):
    """SIGTERM and SIGINT let running requests finish, and end the process with 0; a second signal ends it at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # whatever the threads are doing; there is nothing to save
        self.should_exit = True


def serve(load: Callable[[Report], Service], name: str, listening: socket.socket,
          options: Options = Options()) -> None:
    """Answers at once, with 503 until `load` has returned; runs until a signal.

    Then it refuses new connections, gives the open ones `options.grace` seconds, and ends the process with 0.

    Args:
      load: makes the service; it gets a function to report its progress.
      name: of the model. listening: a bound socket.
    Raises:
      whatever `load` raises.
    """
    def ended():
        server.should_exit = True

    prometheus_client.disable_created_metrics()  # a second series for each of ours
    endpoints = Endpoints(load, name, options, is_loopback(listening.getsockname()[0]), ended)
    server = _Server(uvicorn.Config(
        endpoints.app(), http=Connection, ws="none", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=options.grace))
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it logs a traceback for every malformed request
    server.run([listening])
    if endpoints.failure is not None:
        raise endpoints.failure
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads may still run a program of XLA, which an orderly shutdown would destroy under them
