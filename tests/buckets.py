"""Buckets on this machine, for tests: emulators of GCS and S3, each behind a proxy that can refuse, or die.

All tests of a process share one of each; every test uses its own prefix in the bucket.
"""

import contextlib
import functools
import http.client
import http.server
import itertools
import logging
import os
import socket
import threading
import urllib.parse

import pytest

BUCKET = "bucket"
SCHEMES = ("gs", "s3")
_names = itertools.count()


class Store:
    """An emulator behind its proxy.

    every: one of `every` requests is answered with 503; 0: none. dies_after: the number of answered writes after which
    no request gets an answer; None: no limit. dies_at: the name of an object; from its writing on no request gets an
    answer. keeps_all: deleting is forbidden. garbled: (bytes, their replacement in transfers); None: no replacement.
    faults: how many requests were refused. requests: (method, path) of all requests.
    """

    def __init__(self, scheme: str, port: int):
        self.scheme, self.port = scheme, port
        self.every, self.dies_after, self.dies_at, self.faults, self.requests = 0, None, "", 0, []
        self.keeps_all, self.garbled = False, None
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Proxy)
        self.server.store = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def address(self) -> str:
        """The address of a new, empty prefix."""
        return f"{self.scheme}://{BUCKET}/test-{next(_names)}"

    def verdict(self, method: str, path: str, body: bytes = b"") -> str:
        """How a request is handled: "answer", "503", "403" or "nothing"."""
        with self.lock:
            self.requests.append((method, path))
            named = urllib.parse.unquote(path).encode() + body[:2000]  # GCS sends names of new objects in the body
            if self.dies_at and method in ("PUT", "POST") and self.dies_at.encode() in named:
                self.dies_after = 0
            if self.dies_after is not None and method in ("PUT", "POST"):
                self.dies_after -= 1
            if self.dies_after is not None and self.dies_after < 0:
                return "nothing"
            if self.keeps_all and (method == "DELETE" or path.endswith("?delete")):
                return "403"
            if self.every and len(self.requests) % self.every == 0:
                self.faults += 1
                return "503"
            return "answer"

    @contextlib.contextmanager
    def refusing(self, every: int):
        """Within the `with` block, one of `every` requests is answered with 503."""
        self.every, self.faults = every, 0
        try:
            yield self
        finally:
            self.every = 0

    @contextlib.contextmanager
    def dying_after(self, writes: int | None, at: str = ""):
        """Within the `with` block, it stops answering after so many writes, or at the first write of an object of this
        name.
        """
        self.dies_after, self.dies_at = writes, at
        try:
            yield self
        finally:
            self.dies_after, self.dies_at = None, ""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Ignores broken connections: some clients are killed."""


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        store, body = self.server.store, self._body()
        verdict = store.verdict(self.command, self.path, body)
        if verdict == "nothing":
            self.close_connection = True
            return
        if verdict == "503":
            self._reply(503, {}, b"<Error><Code>ServiceUnavailable</Code></Error>" if store.scheme == "s3" else b"{}")
            return
        if verdict == "403":
            self._reply(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                        if store.scheme == "s3" else b"{}")
            return
        body = body.replace(*store.garbled) if store.garbled else body
        ahead = http.client.HTTPConnection("127.0.0.1", store.port, timeout=60)
        headers = {name: value for name, value in self.headers.items()
                   if name.lower() not in ("transfer-encoding", "content-length", "connection")}
        with contextlib.closing(ahead):
            ahead.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            found = ahead.getresponse()
            self._reply(found.status, dict(found.getheaders()), found.read())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status, headers, body):
        self.send_response(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *words):
        pass


@functools.cache
def stores() -> dict[str, Store]:
    """{scheme: Store}, started once; afterwards the environment directs this process and its children to them."""
    gcs = pytest.importorskip("gcp_storage_emulator.server", reason="pip install -e '.[dev]'")
    moto = pytest.importorskip("moto.server", reason="pip install -e '.[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    ports = [_free_port() for _ in SCHEMES]
    google = gcs.create_server("127.0.0.1", ports[0], in_memory=True, default_bucket=BUCKET)
    google._api.daemon = True  # otherwise this process would never end
    google.start()
    moto.ThreadedMotoServer("127.0.0.1", ports[1], verbose=False).start()
    found = {scheme: Store(scheme, port) for scheme, port in zip(SCHEMES, ports)}
    os.environ.update(STORAGE_EMULATOR_HOST=found["gs"].url, AWS_ENDPOINT_URL=found["s3"].url, AWS_ACCESS_KEY_ID="key",
                      AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1", NO_GCE_CHECK="true")
    made = http.client.HTTPConnection(urllib.parse.urlsplit(found["s3"].url).netloc)
    made.request("PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/"
                                                                "aws4_request, SignedHeaders=host, Signature=0"})
    assert made.getresponse().status == 200
    made.close()
    return found


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
