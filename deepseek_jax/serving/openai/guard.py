"""Access from browsers: a local server must not answer every page that its user opens.

A foreign page can post to a server on loopback, and read the answers if it makes its own name resolve to 127.0.0.1. So
a server bound to loopback answers only for loopback names, and a request with an Origin must come from the server's own
page or from an allowed origin.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.serving.openai.requests import BadRequest

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src "
                               "'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def is_loopback(host: str) -> bool:
    """Whether a name or address, as given to `--host`, is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Guard:
    """Middleware that refuses foreign hosts and origins with 403, allows the given ones, and adds security headers.

    Args:
      local: whether only loopback names are accepted. origins: allowed ones, such as "https://chat.example"; "*" for
        all.
    """

    def __init__(self, app: ASGIApp, local: bool, origins: tuple[str, ...]):
        self.app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"],
                                  allow_headers=["Authorization", "Content-Type"]) if origins else app
        self.local, self.origins = local, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(Headers(scope=scope))
        except BadRequest as bad:
            return await JSONResponse(bad.body(), bad.status)(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)

    def _check(self, headers: Headers) -> None:
        if "*" in self.origins:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        names = {urlsplit(allowed).netloc for allowed in self.origins}
        name = urlsplit(f"//{host}").hostname or "" if "[" not in host or "]" in host else ""
        if self.local and host not in names and not is_loopback(name):
            raise BadRequest("Host", f"this server is for its own machine, not for {host[:80]!r}; start it with "
                             "--host, or allow the page's origin with --allow-origin.", 403, "forbidden_host")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise BadRequest("Origin", f"pages of {origin[:80]!r} may not ask this server; --allow-origin lets them.",
                             403, "forbidden_origin")
