"""The server in a process of its own: what it answers, what it refuses, and that nothing of a client stays behind."""

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from deepseek_jax import serve  # noqa: E402
from deepseek_jax.config import ConfigError  # noqa: E402
from deepseek_jax.serving.openai import server  # noqa: E402
from deepseek_jax.serving.openai.stream import Delta  # noqa: E402

KEY = {"Authorization": "Bearer secret"}

# Serves a random model behind a tokenizer of bytes, so that no run is needed.
PROGRAM = """
import sys
from tests.model import naive
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.openai.server import serve
from deepseek_jax.serving.openai.stream import Service

tokenizer = train_tokenizer(["some text"] * 3, 262)
cfg = naive.tiny(num_layers=2, vocab_size=262)
engine = Engine(cfg, naive.variables_of(cfg), EngineConfig(
    max_sequences=2, max_length=512, depth=1, page_size=8, chunk=16))
engine.warm_up()
serve(Service(engine, tokenizer, "random", max_waiting=70), "127.0.0.1", int(sys.argv[1]), "secret")
"""


@contextlib.contextmanager
def running():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], cwd=pathlib.Path(__file__).parents[3])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").json() == {"status": "ok"}:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url():
    with running() as (_, url):
        yield url


def ask(url, endpoint="completions", **fields):
    """(status, JSON) of one whole answer."""
    fields = {"model": "random"} | ({"prompt": "hello"} if endpoint == "completions" else {}) | fields
    answer = httpx.post(f"{url}/v1/{endpoint}", json=fields, headers=KEY, timeout=120)
    return answer.status_code, answer.json()


@contextlib.contextmanager
def streaming(url, **fields):
    """(status, events as they come) of a stream; leaving it hangs up."""
    fields = {"model": "random", "prompt": "hello", "stream": True} | fields
    with httpx.stream("POST", url + "/v1/completions", json=fields, headers=KEY, timeout=120) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        yield answer.status_code, (json.loads(line) for line in lines if line != "[DONE]")


def owned(url):
    text = httpx.get(url + "/metrics", headers=KEY).text
    return int(next(line for line in text.splitlines() if 'cache_pages{state="owned"}' in line).split()[-1])


def assert_freed(url, seconds=10.0):
    end = time.monotonic() + seconds
    while owned(url) and time.monotonic() < end:
        time.sleep(0.02)
    assert owned(url) == 0


def test_a_stream_says_what_a_whole_answer_says_and_counts_what_it_used(url):
    how = dict(max_tokens=24, seed=3, temperature=0.7)
    _, whole = ask(url, **how)
    with streaming(url, **how, stream_options={"include_usage": True}) as (_, events):
        *events, last = events

    assert "".join(e["choices"][0]["text"] for e in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    assert whole["usage"]["prompt_tokens"] == 6
    assert ask(url, **how | {"seed": 4})[1]["choices"][0]["text"] != whole["choices"][0]["text"]


def test_a_stop_string_ends_the_text_before_it(url):
    text = ask(url, max_tokens=40, temperature=0)[1]["choices"][0]["text"]
    stop = text[7:9]
    stopped = ask(url, max_tokens=40, temperature=0, stop=[stop])[1]["choices"][0]

    assert stopped["text"] == text[:text.index(stop)] and stopped["finish_reason"] == "stop"


def test_logprobs_say_where_each_token_begins_streamed_or_not(url):
    whole = ask(url, max_tokens=24, temperature=0, logprobs=2)[1]["choices"][0]
    with streaming(url, max_tokens=24, temperature=0, logprobs=2) as (_, events):
        deltas = [e["choices"][0]["logprobs"] for e in events]

    offsets = whole["logprobs"]["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert 0 < offsets[-1] <= len(whole["text"]) and len(whole["logprobs"]["top_logprobs"][0]) == 2
    assert [n for delta in deltas if delta for n in delta["text_offset"]] == offsets


def test_chat_gives_logprobs_of_every_token(url):
    answer = ask(url, "chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=5,
                 logprobs=True, top_logprobs=3, temperature=0)[1]["choices"][0]
    tokens = answer["logprobs"]["content"]
    assert answer["message"]["role"] == "assistant" and len(tokens) == 5
    assert all(len(t["top_logprobs"]) == 3 and t["top_logprobs"][0]["logprob"] == t["logprob"] < 0 for t in tokens)


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        (dict(model="gpt"), 404, "model"),
        (dict(prompt=[]), 400, "prompt"),
        (dict(prompt=[10**9]), 400, "prompt"),
        (dict(prompt="x" * 4000), 400, "prompt"),
        (dict(max_tokens=-1), 400, "max_tokens"),
        (dict(max_tokens=0), 400, "max_tokens"),
        (dict(max_tokens=10**12), 400, "max_tokens"),
        (dict(max_tokens="many"), 400, "max_tokens"),
        (dict(temperature=-0.1), 400, "temperature"),
        (dict(temperature=True), 400, "temperature"),
        (dict(top_p=0), 400, "top_p"),
        (dict(n=1000), 400, "n"),
        (dict(stop=["", "a"]), 400, "stop"),
        (dict(logprobs=99), 400, "logprobs"),
        (dict(frequency_penalty=1), 400, "frequency_penalty"),
        (dict(temprature=1), 400, "temprature"),
    ], ids=str)
def test_a_bad_field_is_named(url, fields, status, field):
    found, answer = ask(url, **fields)
    assert (found, answer["error"]["param"]) == (status, field)


def test_what_is_no_json_and_a_wrong_key_are_refused(url):
    post = lambda body, key="secret": httpx.post(url + "/v1/completions", content=body,
                                                 headers={"Authorization": f"Bearer {key}"})
    assert [post(body).status_code for body in (b"{", b"[1]", b"\xff", b"")] == [400] * 4
    assert post(b"{}", "wrong").status_code == 401
    assert httpx.get(url + "/v1/models").status_code == 401
    assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200


def test_a_client_that_vanishes_frees_its_pages_within_a_second(url):
    start = time.monotonic()
    ask(url, max_tokens=64)
    # A bound far from both: whole answers would take 60 times what one of 64 tokens does.
    second = max(1.0, 8 * (time.monotonic() - start))
    with streaming(url, max_tokens=480, n=16) as (_, events):
        next(events)
        assert owned(url) > 0
    assert_freed(url, second)
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(url + "/v1/completions", json=dict(prompt="hello", max_tokens=480, n=16), timeout=0.1, headers=KEY)
    assert_freed(url, second)


def test_a_client_that_hangs_up_is_noticed_while_choices_never_pause(monkeypatch):
    class NeverPausing:
        open, sequences, taken = 1, [None], 0

        async def next_within(self, seconds):
            self.taken += 1
            assert self.taken < 100, "the client left long ago"
            return Delta(0, "a", [])

    class Gone:
        async def is_disconnected(self):
            return True

    monkeypatch.setattr(server, "DISCONNECT_CHECK_SECONDS", 0.0)
    answer = server.Answer("tiny", types.SimpleNamespace(chat=False, stream=False), NeverPausing())
    assert asyncio.run(answer.complete(Gone())).status_code == 499


def together(jobs):
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_64_streams_at_once_and_one_too_many(url):
    statuses, ends = [], []

    def one(n, choices=1):
        with streaming(url, prompt=f"{n}", max_tokens=12, n=choices) as (status, events):
            statuses.append(status)
            if status == 200:
                ends.append([e["choices"][0]["finish_reason"] for e in events][-1])

    together(functools.partial(one, n) for n in range(64))
    assert statuses == [200] * 64 and len(ends) == 64 and set(ends) <= {"length", "stop"}

    statuses.clear(), ends.clear()
    together(functools.partial(one, n, 16) for n in range(8))  # 128 sequences for 72 places
    assert set(statuses) == {200, 429} and len(ends) == statuses.count(200)
    assert_freed(url)


def soak(url, seconds):
    """Requests of every kind at random, from four clients, some of which hang up."""
    end = time.monotonic() + seconds
    statuses = []

    def client(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            fields = dict(prompt="x" * rng.randint(1, 300), max_tokens=rng.choice([-1, 1, 5, 40, 150]),
                          n=rng.choice([1, 1, 3]), temperature=rng.choice([0, 1.0]), seed=rng.randint(0, 9))
            with streaming(url, **fields, stop=rng.choice([None, "a"])) as (status, events):
                statuses.append(status)
                for _ in zip(range(rng.choice([0, 2, 10**6])), events if status == 200 else ()):
                    pass

    together(functools.partial(client, seed) for seed in range(4))
    assert {200, 400} <= set(statuses) <= {200, 400, 429}
    assert_freed(url)


def test_random_requests_leave_no_page_behind(url):
    soak(url, 4)


@pytest.mark.slow
def test_random_requests_for_minutes_leave_no_page_behind(url):
    soak(url, 180)


def test_the_page_and_the_metrics_are_there(url):
    page = httpx.get(url + "/").text
    assert '"random"' in page and "__MODEL__" not in page and "src=" not in page
    text = httpx.get(url + "/metrics", headers=KEY).text
    assert "# TYPE deepseek_jax_tokens_total counter" in text and 'expert_load_total{layer="0",expert="7"}' in text


def test_a_models_name_is_a_string_in_the_page_and_cannot_end_its_script():
    before, after = (pathlib.Path(server.__file__).parent / "chat.html").read_text().split('"__MODEL__"')

    page = server.chat_page('a</script><b>"\\ é')

    assert page == before + r'"a\u003c/script>\u003cb>\"\\ \u00e9"' + after
    assert page.count("</script>") == 1 and server.chat_page("x") == before + '"x"' + after


@pytest.mark.slow
def test_a_term_signal_lets_streams_finish_and_ends_with_zero():
    with running() as (process, url), streaming(url, max_tokens=480) as (_, events):
        next(events)
        os.kill(process.pid, signal.SIGTERM)
        assert list(events)[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(10) == 0


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen at 127.0.0.1:{port} \(Address already in use\)"):
            serve.check_port("127.0.0.1", port)
    serve.check_port("127.0.0.1", 0)
