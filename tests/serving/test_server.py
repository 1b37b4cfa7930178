"""The server in a process of its own, asked by the client that people use."""

import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

# Serves a random model behind a tokenizer of bytes, so that no run is needed.
PROGRAM = """
import sys
from tests.model import naive
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.server import serve
from deepseek_jax.serving.service import Service

tokenizer = train_tokenizer(["some text"] * 3, 262)
cfg = naive.tiny(num_layers=2, vocab_size=262)
engine = Engine(cfg, naive.variables_of(cfg), max_sequences=2, max_length=512, depth=1, page_size=8, chunk=16)
engine.warm_up()
serve(Service(engine, tokenizer, "random", most_waiting=70), "127.0.0.1", int(sys.argv[1]), "secret")
"""


@contextlib.contextmanager
def running():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], cwd=pathlib.Path(__file__).parents[2])
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


@pytest.fixture(scope="module")
def client(url):
    with client_of(url) as client:
        yield client


def client_of(url, key="secret"):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


def owned(url):
    text = httpx.get(url + "/metrics", headers={"Authorization": "Bearer secret"}).text
    return int(next(line for line in text.splitlines() if 'cache_pages{state="owned"}' in line).split()[-1])


def assert_freed(url, seconds=1.0):
    end = time.monotonic() + seconds
    while owned(url) and time.monotonic() < end:
        time.sleep(0.02)
    assert owned(url) == 0


def test_a_stream_says_what_a_whole_answer_says_and_counts_what_it_used(client):
    ask = functools.partial(client.completions.create, model="random", prompt="hello", max_tokens=24, seed=3,
                            temperature=0.7)
    whole = ask()
    events = list(ask(stream=True, stream_options={"include_usage": True}))

    assert "".join(e.choices[0].text for e in events[:-1]) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events[:-1]][-1] == whole.choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert whole.usage.prompt_tokens == 6
    assert ask(seed=4).choices[0].text != whole.choices[0].text


def test_a_stop_string_ends_the_text_before_it(client):
    ask = functools.partial(client.completions.create, model="random", prompt="hello", max_tokens=40, temperature=0)
    text = ask().choices[0].text
    stop = text[7:9]
    stopped = ask(stop=[stop]).choices[0]

    assert stopped.text == text[:text.index(stop)] and stopped.finish_reason == "stop"


def test_chat_gives_logprobs_of_every_token(client):
    answer = client.chat.completions.create(model="random", messages=[{"role": "user", "content": "hello"}],
                                            max_tokens=5, logprobs=True, top_logprobs=3, temperature=0).choices[0]
    tokens = answer.logprobs.content
    assert answer.message.role == "assistant" and len(tokens) == 5
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob < 0 for t in tokens)


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
        (dict(extra_body={"temprature": 1}), 400, "temprature"),
    ], ids=str)
def test_a_bad_field_is_named(client, fields, status, field):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{**dict(model="random", prompt="a"), **fields})
    assert (caught.value.status_code, caught.value.body["param"]) == (status, field)


def test_what_is_no_json_and_a_wrong_key_are_refused(url):
    post = lambda body, key="secret": httpx.post(url + "/v1/completions", content=body,
                                                 headers={"Authorization": f"Bearer {key}"})
    assert [post(body).status_code for body in (b"{", b"[1]", b"\xff", b"")] == [400] * 4
    assert post(b"{}", "wrong").status_code == 401
    assert httpx.get(url + "/v1/models").status_code == 401
    assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200


def test_a_client_that_vanishes_frees_its_pages_within_a_second(client, url):
    with client.completions.create(model="random", prompt="hello", max_tokens=480, n=16,
                                   stream=True) as stream:
        next(iter(stream))
        assert owned(url) > 0
    assert_freed(url)
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(url + "/v1/completions", json=dict(prompt="hello", max_tokens=480, n=16), timeout=0.1,
                   headers={"Authorization": "Bearer secret"})
    assert_freed(url)


def test_64_streams_at_once_and_one_too_many(client, url):
    ends, refused = [], []

    def ask(n, choices=1):
        try:
            events = list(client.completions.create(model="random", prompt=f"{n}", max_tokens=12, stream=True,
                                                    n=choices))
            ends.append(events[-1].choices[0].finish_reason)
        except openai.RateLimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 64 and set(ends) <= {"length", "stop"} and not refused

    threads = [threading.Thread(target=ask, args=(n, 16)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and len(ends) + len(refused) == 72
    assert_freed(url)


def test_the_page_and_the_metrics_are_there(url):
    page = httpx.get(url + "/").text
    assert '"random"' in page and "__MODEL__" not in page and "src=" not in page
    text = httpx.get(url + "/metrics", headers={"Authorization": "Bearer secret"}).text
    assert "# TYPE deepseek_jax_tokens_total counter" in text and 'expert_load_total{layer="0",expert="7"}' in text


@pytest.mark.slow
def test_a_term_signal_lets_streams_finish_and_ends_with_zero():
    with running() as (process, url), client_of(url) as client:
        stream = client.completions.create(model="random", prompt="hello", max_tokens=480, stream=True)
        next(iter(stream))
        os.kill(process.pid, signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(10) == 0
