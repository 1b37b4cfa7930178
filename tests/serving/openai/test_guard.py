"""Which pages of a browser may send requests: the server's own, allowed ones, and no others."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from deepseek_jax.serving.openai.guard import Guard, is_loopback


def ask(local, origins=(), method="GET", **headers):
    app = Guard(Starlette(routes=[Route("/", lambda request: PlainTextResponse("here"))]), local, origins)
    return TestClient(app, raise_server_exceptions=False).request(
        method, "/", headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000",
                                  "chat.localhost"])
def test_names_of_this_machine_are_answered(host):
    assert ask(True, host=host).text == "here"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example",
                                  "127.0.0.1.evil.example", "10.0.0.1", "", "[::1", "user@evil.example"])
def test_other_names_are_refused_on_loopback_alone(host):
    answer = ask(True, host=host)
    assert answer.status_code == 403 and answer.json()["error"]["param"] == "Host"
    assert ask(False, host=host).text == "here"


@pytest.mark.parametrize("local", [True, False])
def test_pages_from_elsewhere_are_refused_unless_allowed(local):
    for origin in ("https://evil.example", "null", "http://localhost:9"):
        answer = ask(local, host="localhost:8000", origin=origin)
        assert answer.status_code == 403 and answer.json()["error"]["param"] == "Origin"
        assert "access-control-allow-origin" not in answer.headers
    assert ask(local, host="localhost:8000", origin="http://localhost:8000").text == "here"
    for origins in (("https://chat.example",), ("*",)):
        answer = ask(local, origins, host="localhost:8000", origin="https://chat.example")
        assert answer.text == "here" and answer.headers["access-control-allow-origin"] in ("https://chat.example", "*")
    assert ask(local, ("https://chat.example",), host="chat.example").text == "here"  # as a proxy may pass it on


def test_the_browsers_question_before_a_request_is_answered_for_allowed_pages():
    asked = dict(method="OPTIONS", host="localhost", access_control_request_method="POST",
                 access_control_request_headers="authorization,content-type")
    assert ask(True, ("https://chat.example",), origin="https://chat.example", **asked).status_code == 200
    assert ask(True, ("https://chat.example",), origin="https://evil.example", **asked).status_code == 403


def test_every_answer_has_security_headers():
    for answer in (ask(True, host="localhost"), ask(True, host="evil.example")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(("host", "found"), [("127.0.0.1", True), ("::1", True), ("localhost", True),
                                             ("0.0.0.0", False), ("::", False), ("example.org", False)])
def test_what_is_loopback(host, found):
    assert is_loopback(host) is found
