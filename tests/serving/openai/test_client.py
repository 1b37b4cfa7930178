"""The same server with OpenAI's official client."""

import functools

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_completions_stream_and_count(client):
    ask = functools.partial(client.completions.create, model="org/random", prompt="hello", max_tokens=24, seed=3,
                            temperature=0.7, logprobs=1)
    whole = ask()
    events = list(ask(stream=True, stream_options={"include_usage": True}))

    assert "".join(e.choices[0].text for e in events[:-1]) == whole.choices[0].text
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert whole.choices[0].logprobs.text_offset[0] == 0 < whole.choices[0].logprobs.text_offset[-1]


def test_chat_streams_and_gives_logprobs(client):
    ask = functools.partial(client.chat.completions.create, model="org/random", max_tokens=5, temperature=0,
                            messages=[{"role": "user", "content": "hello"}])
    whole = ask(logprobs=True, top_logprobs=3).choices[0]
    deltas = [e.choices[0].delta.content or "" for e in ask(stream=True)]

    assert "".join(deltas) == whole.message.content and len(whole.logprobs.content) == 5


def test_models_and_errors_have_the_types_that_the_client_knows(client):
    assert [model.id for model in client.models.list()] == ["org/random"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="a")
    assert caught.value.body["param"] == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").completions.create(model="org/random", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="org/random", prompt="a", max_tokens=-1)
    assert caught.value.body["param"] == "max_tokens"
