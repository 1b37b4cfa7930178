"""`/openapi.json` describes the requests that are accepted, and answers match their description."""

import functools

import pytest

pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")
jsonschema = pytest.importorskip("jsonschema")

from deepseek_jax.data.tokenizer import train_tokenizer  # noqa: E402
from deepseek_jax.serving.openai import requests  # noqa: E402
from deepseek_jax.serving.openai.schema import SCHEMAS, openapi  # noqa: E402
from deepseek_jax.serving.openai.server import _parsed  # noqa: E402

KEY = {"Authorization": "Bearer secret"}
BODIES = {False: ("CompletionRequest", {"prompt": "hello"}),
          True: ("ChatRequest", {"messages": [{"role": "user", "content": "hello"}]})}


@functools.cache
def served():
    return requests.ServedModel("random", train_tokenizer(["some text"] * 3, 262), vocab_size=262, max_length=64)


def conforms(value, name):
    """Whether a value matches the schema of this name."""
    schema = openapi("m", True) | {"$ref": f"#/components/schemas/{name}"}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def is_read(body, chat):
    try:
        requests.read(body, chat, served())
    except requests.BadRequest:
        return False
    return True


@pytest.mark.parametrize("chat", BODIES, ids=["completions", "chats"])
def test_the_description_has_every_field_that_is_read_and_no_other(chat):
    name, least = BODIES[chat]
    schema = SCHEMAS[name]

    assert set(schema["properties"]) == {*requests.FIELDS[chat], *requests.IGNORED, *requests.UNSUPPORTED}
    assert not schema["additionalProperties"] and schema["required"] == list(least)
    assert is_read(least, chat) and conforms(least, name)


@pytest.mark.parametrize("chat", BODIES, ids=["completions", "chats"])
@pytest.mark.parametrize("value", [
    [], {}, "x", "", True, -1, 0, 1, 0.5, 2, 2.5, 3.5, 21, 2**31, -2**63 - 1, 2**64, "y" * 1025, ["a"] * 17, ["a", ""],
    ["a", 1], [0, 1], [[0], []], [-1], None, {"type": "text"}, "none", {"include_usage": True}, {"usage": 1},
    [{"role": "user", "content": "a", "name": "b"}], [{"role": "tool", "content": "a"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": "a", "tool_calls": [1]}]],
    ids=lambda value: str(value)[:40])
def test_what_is_read_conforms_and_what_is_refused_does_not(chat, value):
    # Bounds that depend on the model, or on each other, are not described.
    relative = ("max_tokens", "max_completion_tokens", "n", "best_of", "chat_template_kwargs", "prompt")
    name, least = BODIES[chat]
    for field in SCHEMAS[name]["properties"]:
        if field == "model" and isinstance(value, str):  # the name of a model that is not served is checked elsewhere
            continue
        body = ({"logprobs": True} if field == "top_logprobs" else {"stream": True} if field == "stream_options" else
                {"n": value} if field == "best_of" else {}) | least | {field: value}
        if field not in relative or is_read(body, chat):
            assert conforms(body, name) == is_read(body, chat), field


def test_a_whole_number_may_be_written_with_a_point():
    body = _parsed(b'{"prompt": [1.0, 5], "max_tokens": 3.0, "top_p": 0.5, "temperature": 2.0}')

    assert conforms(body, "CompletionRequest")
    assert requests.read(body, False, served()).requests[0].prompt == (1, 5)
    assert not is_read(_parsed(b'{"prompt": "a", "max_tokens": 3.5}'), False)
    assert not is_read(_parsed(b'{"prompt": "a", "max_tokens": 1e400}'), False)


def test_answers_are_as_described(url):
    described = httpx.get(url + "/openapi.json").json()
    assert described == openapi("org/random", True)
    jsonschema.Draft202012Validator.check_schema(described["components"])
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if method == "post":
                continue
            answer = httpx.get(url + path.replace("{name}", "org/random"), headers=KEY)
            (kind, content), = operation["responses"][str(answer.status_code)]["content"].items()
            assert answer.headers["content-type"].startswith(kind)
            if kind == "application/json":
                assert conforms(answer.json(), content["schema"]["$ref"].rpartition("/")[2]), path
    for chat, path in ((False, "completions"), (True, "chat/completions")):
        name, least = BODIES[chat]
        wanted = {"logprobs": chat or 2, "return_drafts": True, "max_tokens": 4, "n": 2}
        answer = httpx.post(f"{url}/v1/{path}", json=least | wanted, headers=KEY, timeout=120)
        assert answer.status_code == 200 and conforms(answer.json(), "ChatCompletion" if chat else "Completion")
        for body, headers in ((least | {"n": 0}, KEY), (least, {}), ([], KEY), (least | {"model": "x"}, KEY)):
            answer = httpx.post(f"{url}/v1/{path}", json=body, headers=headers)
            assert str(answer.status_code) in described["paths"][f"/v1/{path}"]["post"]["responses"]
            assert answer.status_code >= 400 and conforms(answer.json(), "Error")
