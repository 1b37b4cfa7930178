"""Requests: whatever the value of a field, the refusal names the field, and can be sent as JSON."""

import functools
import json

import pytest

from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.openai import requests

WRONG = [[], {}, "x", True, -1, 2**70, 1e300, float("nan"), float("inf"), [None], {"a": 1}]


@functools.cache
def served():
    return requests.ServedModel("random", train_tokenizer(["some text"] * 3, 262), vocab_size=262, max_length=64)


def refusal(body, chat):
    with pytest.raises(requests.BadRequest) as caught:
        requests.read(body, chat, served())
    json.dumps(caught.value.body(), ensure_ascii=False).encode()
    return caught.value


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_value_of_another_type_is_refused_or_read_never_an_error_of_ours(value):
    good = {False: {"prompt": "hello"}, True: {"messages": [{"role": "user", "content": "hello"}]}}
    for chat, fields in requests.FIELDS.items():
        for field in fields:
            try:
                requests.read(good[chat] | {field: value}, chat, served())
            except requests.BadRequest as bad:
                assert bad.field.split("[")[0] == field or (field, bad.field) == ("best_of", "n")


@pytest.mark.parametrize(
    "message", [dict(role=[], content="a"), dict(role={}, content="a"), dict(role="tool", content="a"),
                dict(role="user", content=[1]), dict(role="user", content=None), 3, None], ids=str)
def test_a_message_of_another_shape_is_named(message):
    assert refusal({"messages": [{"role": "user", "content": "a"}, message]}, True).field == "messages[1]"


def test_the_name_of_an_unknown_field_is_sent_back_whatever_it_is():
    assert refusal({"prompt": "a", "\ud800": 1}, False).body()["error"]["param"] == "\\ud800"
