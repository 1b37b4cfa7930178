"""Files of prompts: what is read, and that an error names its line."""

import json

import pytest

from deepseek_jax.chat.messages import PLAIN, Conventions
from deepseek_jax.config import ConfigError
from deepseek_jax.serving.openai.prompts import Continuation, check_room, prompt_ids, read_options, read_prompts
from deepseek_jax.serving.sequence import Request, Sequence, Token
from tests.chat.test_template import published


def written(folder, text, name="p.jsonl"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def test_a_text_file_holds_a_prompt_a_line_and_keeps_the_spaces_in_it(tmp_path):
    assert read_prompts(written(tmp_path, "\ufeff  a b \n\n\tc\r\n", "p.txt")) == ["  a b ", "\tc"]


def test_rows_of_json_are_texts_or_chats(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = json.dumps({"prompt": "a\nb", "id": 3}) + "\n" + json.dumps({"messages": messages})
    assert read_prompts(written(tmp_path, rows)) == ["a\nb", messages]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no prompt"), ("\n \n", "holds no prompt"), (b"\xff\n", "is not UTF-8"),
    ('{"prompt": "a"}\n\n{"prompt"', r"p.jsonl:3 is not JSON"), ("[]", r"p.jsonl:1 needs \"prompt\""),
    ('{"text": "a"}', r"needs \"prompt\""), ('{"prompt": 3}', r"needs \"prompt\""),
    ('{"prompt": []}', r"p.jsonl:1 needs"), ('{"messages": "a"}', r"p.jsonl:1: messages must be a list"),
    ('{"messages": [{"role": "user"}]}', r"p.jsonl:1: messages\[0\] needs a role"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}', "1: tools are not supported"),
    ('{"prompt": "\\ud800"}', r"p.jsonl:1: holds half a character"),
    ('{"prompt": "a", "messages": []}', "not both")])
def test_what_is_no_prompt_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(written(tmp_path, text))


def test_prompt_and_answer_together_have_as_many_tokens_as_the_model_has_positions():
    check_room([[1], [1, 2, 3]], 5, 8)
    check_room([[1] * 100], 100, None)
    with pytest.raises(ConfigError, match="--max-new-tokens=6 exceed the 8 positions .* lower it to 5"):
        check_room([[1], [1, 2, 3]], 6, 8)
    with pytest.raises(ConfigError, match="a prompt of 8 tokens .* shorten the prompt"):
        check_room([[1] * 8], 1, 8)


CHAT = [{"role": "user", "content": "hello"}]


def test_options_of_a_chat_are_names_of_its_template():
    here, text = published(), Conventions(lambda messages, thinking=False: "there" if thinking else "fine")
    assert prompt_ids(CHAT, here, text, {}) == here.encode("fine")
    assert prompt_ids(CHAT, here, text, read_options('{"thinking": true}', [CHAT])) == here.encode("there")
    assert prompt_ids("hello", here, text, {"thinking": True}) == [here.bos, *here.encode("hello")]
    for options, of, message in (({"bos_token": "x"}, text, "names of the model's own .* none of messages, tools"),
                                 ({"thinking": True}, PLAIN, "this model has none")):
        with pytest.raises(ConfigError, match=message):
            prompt_ids(CHAT, here, of, options)


@pytest.mark.parametrize(("written", "prompts", "message"), [
    ("{}", ["hello"], "is for chats; add --chat"), ("thinking", [CHAT], "thinking is no JSON object; write it as"),
    ("[1]", ["hello", CHAT], "no JSON object"), ("[" * 10**5, [CHAT], "no JSON object")])
def test_options_that_are_none_are_refused(written, prompts, message):
    with pytest.raises(ConfigError, match=message):
        read_options(written, prompts)
    assert read_options(None, prompts) == {}


@pytest.mark.parametrize("opened", [True, False])
def test_what_a_chat_reasons_is_apart_from_its_answer(opened):
    here = published()
    opens, closes = map(here.backend.token_to_id, ("<think>", "</think>"))
    (hello,) = here.encode("hello")
    reasoned = [hello, closes, *here.encode("there fine")]
    made = [Token(i, "none") for i in (reasoned if opened else [opens, *reasoned])]
    ended = Sequence(Request((1,), 1), None)
    ended.finish = "stop"

    def row(prompt, *answers, stops=()):
        said = Continuation(here, stops, *answers)
        assert said(ended, made) == (1 + (not opened) if stops else None) and said(ended, []) is None
        return said.row(prompt)

    ids = [*here.encode("fine"), *([opens] if opened else [])]
    assert row(CHAT, ids) == {"messages": CHAT, "text": "there fine", "reasoning_content": "hello",
                              "finish_reason": "stop"}
    assert row(CHAT, ids, stops=("lo",)) == {"messages": CHAT, "text": "", "reasoning_content": "hel",
                                             "finish_reason": "stop"}
    assert row("hello") == {"prompt": "hello", "text": ("" if opened else "<think>") + "hello</think>there fine",
                            "finish_reason": "stop"}
