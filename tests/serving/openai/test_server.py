"""The server in a separate process: its answers and refusals, and that no state of a client remains."""

import asyncio
import contextlib
import functools
import gc
import json
import os
import pathlib
import random
import signal
import socket
import threading
import time
import types

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from deepseek_jax import serve  # noqa: E402
from deepseek_jax.chat.messages import Conventions  # noqa: E402
from deepseek_jax.config import ConfigError  # noqa: E402
from deepseek_jax.data.tokenizer import train_tokenizer  # noqa: E402
from deepseek_jax.serving.openai import answers, server  # noqa: E402
from deepseek_jax.serving.openai.stream import Delta, Service  # noqa: E402
from deepseek_jax.serving.openai.turns import Turns  # noqa: E402
from tests.serving.openai.conftest import IDLE, LOADING, running  # noqa: E402

KEY = {"Authorization": "Bearer secret"}

def ask(url, endpoint="completions", **fields):
    """(status, JSON) of one complete answer."""
    fields = {"model": "org/random"} | ({"prompt": "hello"} if endpoint == "completions" else {}) | fields
    answer = httpx.post(f"{url}/v1/{endpoint}", json=fields, headers=KEY, timeout=120)
    return answer.status_code, answer.json()


@contextlib.contextmanager
def streaming(url, **fields):
    """(status, iterator of events) of a stream; leaving the `with` block disconnects."""
    fields = {"model": "org/random", "prompt": "hello", "stream": True} | fields
    with httpx.stream("POST", url + "/v1/completions", json=fields, headers=KEY, timeout=120) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        yield answer.status_code, (json.loads(line) for line in lines if line != "[DONE]")


def owned(url):
    text = httpx.get(url + "/metrics", headers=KEY).text
    return float(next(line for line in text.splitlines() if 'cache_pages{state="owned"}' in line).split()[-1])


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
        (dict(max_tokens=1, max_completion_tokens=2), 400, "max_completion_tokens"),
        (dict(stream_options={}), 400, "stream_options"),
        (dict(stream=True, stream_options={"usage": True}), 400, "stream_options.usage"),
        (dict(tools=[{}]), 400, "tools"),
        (dict(response_format={"type": "json_object"}), 400, "response_format"),
        (dict(n=73), 400, "n"),
        (dict(max_tokens=10**12), 400, "max_tokens"),
        (dict(max_tokens="many"), 400, "max_tokens"),
        (dict(temperature=-0.1), 400, "temperature"),
        (dict(temperature=True), 400, "temperature"),
        (dict(top_p=0), 400, "top_p"),
        (dict(n=1000), 400, "n"),
        (dict(stop=["", "a"]), 400, "stop"),
        (dict(stop=["a"] * 17), 400, "stop"),
        (dict(logprobs=99), 400, "logprobs"),
        (dict(frequency_penalty=1), 400, "frequency_penalty"),
        (dict(temprature=1), 400, "temprature"),
    ], ids=str)
def test_a_bad_field_is_named(url, fields, status, field):
    found, answer = ask(url, **fields)
    assert (found, answer["error"]["param"]) == (status, field)


def test_what_is_no_json_and_a_wrong_key_are_refused(url):
    post = lambda body, key="secret": httpx.post(url + "/v1/completions", content=body,
                                                 headers={"Authorization": f"bearer {key}",
                                                          "Content-Type": "application/json"})
    assert [post(body).status_code for body in (b"{", b"[1]", b"\xff", b"", b'{"user": NaN}')] == [400] * 5
    assert post(b"{}", "wrong").status_code == 401
    assert httpx.get(url + "/v1/models").status_code == 401
    assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200


def test_a_client_that_vanishes_frees_its_pages_within_a_second(url):
    start = time.monotonic()
    ask(url, max_tokens=64)
    # A bound far from both: complete answers would take 60 times as long as one of 64 tokens.
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

    monkeypatch.setattr(answers, "DISCONNECT_CHECK_SECONDS", 0.0)
    answer = answers.Answer("tiny", types.SimpleNamespace(chat=False, stream=False), NeverPausing())
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
    together(functools.partial(one, n, 16) for n in range(8))  # 128 sequences for 72 slots
    assert set(statuses) == {200, 429} and len(ends) == statuses.count(200)
    assert_freed(url)


def soak(url, seconds):
    """Random requests of every kind, from four clients, some of which disconnect."""
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
    assert '"org/random"' in page and "__MODEL__" not in page and "src=" not in page
    text = httpx.get(url + "/metrics", headers=KEY).text
    assert "# TYPE deepseek_jax_tokens_total counter" in text and 'expert_load_total{expert="7",layer="0"}' in text
    assert "# HELP deepseek_jax_queue_seconds " in text and 'time_to_first_token_seconds_bucket{le="0.1"}' in text


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
            serve.listen("127.0.0.1", port)
    serve.listen("127.0.0.1", 0).close()


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(url):
    began = time.monotonic()
    status, answer = ask(url, prompt="x" * 4_000_000)
    assert status == 400 and "more than 512 tokens can hold" in answer["error"]["message"]
    assert time.monotonic() - began < 5


def test_an_answer_can_begin_with_its_prompt_and_say_its_logprobs(url):
    how = dict(prompt="hello", max_tokens=4, temperature=0, logprobs=2, echo=True)
    _, whole = ask(url, **how)
    with streaming(url, **how) as (_, events):
        choices = [e["choices"][0] for e in events]
    echoed, plain = whole["choices"][0], ask(url, **how | {"echo": False})[1]["choices"][0]

    assert echoed["text"] == "hello" + plain["text"] == "".join(c["text"] for c in choices)
    scores, new = echoed["logprobs"], plain["logprobs"]
    assert scores["tokens"][:6] == ["<|bos|>", *"hello"]
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in scores["token_logprobs"][1:]) and len(scores["tokens"]) == 10
    assert scores["tokens"][6:] == new["tokens"] and scores["text_offset"] == [0, 0, 1, 2, 3, 4, *(
        5 + offset for offset in new["text_offset"])]
    assert [n for c in choices if c["logprobs"] for n in c["logprobs"]["token_logprobs"]] == scores["token_logprobs"]


def test_a_prompt_of_ids_is_scored_without_a_new_token(url):
    text = ask(url, max_tokens=3, temperature=0, logprobs=0)[1]["choices"][0]
    ids = [1, 2, 3, 4]
    scored = ask(url, prompt=[ids, ids], max_tokens=0, logprobs=1, echo=True)[1]
    first, second = (choice["logprobs"] for choice in scored["choices"])
    assert first == second and len(first["token_logprobs"]) == 4 and scored["usage"]["completion_tokens"] == 0
    assert len(first["top_logprobs"][1]) in (1, 2) and text["finish_reason"] == "length"


def test_usage_counts_a_prompt_once_and_what_was_handed_over(url):
    text = ask(url, max_tokens=40, temperature=0)[1]["choices"][0]["text"]
    usage = ask(url, max_tokens=40, temperature=0, n=3, stop=[text[1]])[1]["usage"]
    alone = ask(url, max_tokens=40, temperature=0, stop=[text[1]])[1]["usage"]
    assert usage["prompt_tokens"] == 6 and usage["completion_tokens"] == 3 * alone["completion_tokens"] <= 3 * 8
    details = usage["completion_tokens_details"]
    assert sum(details.values()) <= 2 * usage["completion_tokens"]


def test_errors_of_paths_are_the_apis_too(url):
    for answer, status in ((httpx.get(url + "/v1/nothing", headers=KEY), 404),
                           (httpx.get(url + "/v1/completions", headers=KEY), 405),
                           (httpx.post(url + "/v1/completions", content="{}", headers=KEY), 415)):
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(url + "/v1/models/org/random", headers=KEY).json()["max_model_len"] == 512


def test_a_stream_that_waits_says_its_place(url):
    busy = [functools.partial(ask, url, max_tokens=480, n=4) for _ in range(2)]
    threads = [threading.Thread(target=job) for job in busy]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    fields = {"model": "org/random", "prompt": "hello", "stream": True, "max_tokens": 2}
    with httpx.stream("POST", url + "/v1/completions", json=fields, headers=KEY, timeout=120) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        lines = [line for line in answer.iter_lines() if line]
    for thread in threads:
        thread.join()
    places = [int(line.split()[-1]) for line in lines if line.startswith(": waiting")]
    assert places == sorted(places, reverse=True) and lines[-1] == "data: [DONE]"
    assert places or "data" in lines[0]  # if the others were quick


def test_before_the_model_is_there_health_says_how_far_it_is_and_a_signal_ends_it():
    with running(LOADING, "starting") as (process, url):
        health = httpx.get(url + "/health")
        assert health.status_code == 503 and health.json()["progress"] == "compiled 1 of 7 programs"
        refused = httpx.get(url + "/v1/models")
        assert refused.status_code == 503 and "not there yet" in refused.json()["error"]["message"]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0


HALF = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{")


class Sent:
    """A request whose body is sent in parts; the client disconnects at the end unless it `stays`."""

    def __init__(self, parts, headers=(), stays=True):
        self.headers, self.parts, self.stays = {"content-type": "application/json", **dict(headers)}, parts, stays

    async def stream(self):
        for part in self.parts:
            yield part
        if not self.stays:
            raise server.ClientDisconnect


class Counted(Turns):
    """Counts the turns taken."""

    taken = 0

    async def take(self):
        self.taken += 1


@pytest.mark.parametrize(("size", "turns"), [(2, 1), (server.TURN_BYTES, 1), (4 * server.TURN_BYTES - 1, 4)])
def test_a_long_body_takes_several_turns(size, turns):
    counted, step = Counted(1), 50_000
    body = asyncio.run(server._body(Sent([b"x" * min(step, size - i) for i in range(0, size, step)]), counted))
    assert body == b"x" * size and counted.taken == turns


def test_a_body_that_says_it_is_too_long_is_not_read():
    counted = Counted(1)
    with pytest.raises(server.BadRequest, match="longer than"):
        asyncio.run(server._body(Sent([b"x"], {"content-length": str(server.MAX_BODY_BYTES + 1)}), counted))
    assert counted.taken == 0


def test_a_client_that_left_before_its_turn_gives_it_back():
    async def leave_twice():
        turns = Turns(1)
        for _ in range(2):
            with pytest.raises(server.ClientDisconnect):
                await asyncio.wait_for(server._body(Sent([b"x"], stays=False), turns), 10)

    asyncio.run(leave_twice())


def test_chats_that_wait_for_their_template_hold_up_no_completion():
    waiting, released = threading.Semaphore(0), threading.Event()

    def endless(messages, **options):
        waiting.release()
        released.wait(60)
        raise ValueError("too late")

    class Engine:
        cfg, max_length, max_sequences = types.SimpleNamespace(vocab_size=262), 64, 8

    service = Service(Engine, train_tokenizer(["some text"] * 3, 262), "m", 8, Conventions(endless))
    service.submit = lambda completion: (_ for _ in ()).throw(server.BadRequest(None, "read", 418))
    endpoints = server.Endpoints(lambda report: None, "m")
    endpoints.service = service

    async def asked():
        transport = httpx.ASGITransport(endpoints.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            chat = {"messages": [{"role": "user", "content": "hi"}]}
            chats = [asyncio.create_task(client.post("/v1/chat/completions", json=chat))
                     for _ in range(server.READERS + 2)]
            while not waiting.acquire(blocking=False):
                await asyncio.sleep(0.01)
            answer = await asyncio.wait_for(client.post("/v1/completions", json={"prompt": "hi"}), 20)
            released.set()
            await asyncio.gather(*chats)
            return answer.status_code

    try:
        assert asyncio.run(asked()) == 418
    finally:
        released.set()


def test_what_is_there_at_the_start_is_not_collected_again_and_again():
    service = types.SimpleNamespace(engine=None, start=lambda: None)
    endpoints = server.Endpoints(lambda report: service, "m")
    endpoints.metrics = types.SimpleNamespace(watch=lambda engine: None)
    try:
        endpoints._start()
        assert not any(kept is service for kept in gc.get_objects())  # it has all except frozen objects
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(("grace", "signals", "code"), [(1, 1, 0), (1000, 2, 128 + signal.SIGTERM)],
                         ids=["ends within its grace", "a second signal does not wait"])
def test_a_client_with_half_a_body_holds_no_server_up(grace, signals, code):
    with (running(IDLE.replace("GRACE", str(grace))) as (process, url),
          socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client):
        client.sendall(HALF)
        time.sleep(0.5)
        for _ in range(signals):
            assert process.poll() is None
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.5)
        assert process.wait(10) == code


@pytest.mark.parametrize(("state", "status", "said"), [
    (dict(failure=RuntimeError(), step_seconds=0.0), 503, "failed"),
    (dict(failure=None, step_seconds=server.STALLED_SECONDS + 1), 503, "stalled"),
    (dict(failure=None, step_seconds=1.0), 200, "ok")], ids=["failed", "stalled", "ok"])
def test_health_is_that_of_the_engine(state, status, said):
    endpoints = server.Endpoints(lambda report: None, "tiny")
    endpoints.service = types.SimpleNamespace(**state)
    answer = asyncio.run(endpoints.health(None))
    assert (answer.status_code, json.loads(answer.body)["status"]) == (status, said)


def test_a_fault_of_the_server_is_answered_logged_and_counted(caplog):
    endpoints = server.Endpoints(lambda report: None, "tiny")
    endpoints.health = lambda request: 1 / 0

    async def asked():
        transport = httpx.ASGITransport(endpoints.app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health"), (await client.get("/metrics")).text

    answer, metrics = asyncio.run(asked())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
    assert "/health has failed" in caplog.text and "ZeroDivisionError" in caplog.text
    assert 'path="/health",status="500"' in metrics
