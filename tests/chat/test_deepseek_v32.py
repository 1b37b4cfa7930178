"""Chats of DeepSeek-V3.2, whose checkpoints have no template, have the ids of its published encoding program."""

import json
import os

import pytest

from deepseek_jax.chat import template as chat_template
from deepseek_jax.chat.conversation import conversation_ids
from deepseek_jax.chat.messages import BadMessages, chat_ids, check_messages
from deepseek_jax.config import default_config, freeze
from deepseek_jax.data.prepare import find_tokenizer
from deepseek_jax.interop.convert import from_hf, to_hf
from deepseek_jax.serving.openai import requests
from tests.chat.test_conversation import said
from tests.chat.test_template import published, tokenizer
from tests.interop import checkpoints

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
         {"role": "assistant", "content": "2", "reasoning_content": "easy"}, {"role": "user", "content": "and 2 + 2?"}]
BEGINS = "<|bos|>Be brief.<｜User｜>1 + 1?<｜Assistant｜></think>2<|eos|><｜User｜>and 2 + 2?<｜Assistant｜>"


def checkpoint(folder, model_type="deepseek_v32", tokens=published):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokens().save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(params=["checkpoint", "run"])
def text(request, tmp_path):
    folder = checkpoint(tmp_path)
    if request.param == "run":
        folder = str(tmp_path / "run")
        os.mkdir(folder)
        chat_template.keep_built_in(str(tmp_path), folder)
    return chat_template.of_folder(folder, published())


@pytest.mark.parametrize(("options", "ends"), [
    ({}, "</think>"), ({"thinking": True}, "<think>"), ({"enable_thinking": True}, "<think>"),
    ({"thinking": False}, "</think>")])
def test_the_last_question_opens_the_reasoning_and_that_of_earlier_answers_is_left_out(text, options, ends):
    ids = chat_ids(TURNS, published(), text.template, options)
    assert published().decode(ids, specials=True) == BEGINS + ends
    assert ids[-2:] == [published().backend.token_to_id(mark) for mark in ("<｜Assistant｜>", ends)]


def test_every_question_is_asked_and_an_answer_at_the_end_is_ended(text):
    render = lambda *turns, **options: text.template([{"role": role, "content": x} for role, x in turns], **options)
    assert render(("user", "a"), ("user", "b"), thinking=True) == (
        "<|bos|><｜User｜>a<｜Assistant｜></think><｜User｜>b<｜Assistant｜><think>")
    assert render(("user", "a"), ("assistant", "b"), ("system", "c")) == (
        "<|bos|><｜User｜>a<｜Assistant｜></think>b<|eos|>c")
    assert render(("user", "a"), add_generation_prompt=False) == "<|bos|><｜User｜>a"
    answered = [*TURNS, {"role": "assistant", "content": "4", "reasoning_content": "hm"}]
    assert text.template(answered, thinking=True) == BEGINS + "<think>hm</think>4<|eos|>"


@pytest.mark.parametrize(("messages", "error"), [
    ([{"role": "developer", "content": "a"}], "say it as the system"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "needs its reasoning_content")])
def test_what_the_encoding_has_no_form_for_is_refused(text, messages, error):
    with pytest.raises(BadMessages, match=error):
        chat_ids(messages, published(), text.template, {"thinking": True})


def test_a_template_of_the_checkpoints_own_is_preferred_and_other_models_get_none(tmp_path):
    assert chat_template.built_in(checkpoint(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("own")
    assert chat_template.of_folder(str(tmp_path), published()).template(TURNS[:2]) == "own"
    (tmp_path / "chat_template.jinja").unlink()
    assert chat_template.built_in(checkpoint(tmp_path, tokens=tokenizer)) is None  # its tokenizer has no role tokens
    assert chat_template.built_in(checkpoint(tmp_path, "deepseek_v3")) is None


def test_a_converted_run_has_it_and_hands_it_back(tmp_path):
    src = checkpoints.changed(tmp_path / "src", "v3_2")
    published().save(f"{src}/tokenizer.json")

    from_hf(src, str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    written = chat_template.built_in(src)
    assert written and (tmp_path / "run/chat_template.jinja").read_text() == written
    assert (tmp_path / "back/chat_template.jinja").read_text() == written


def test_fine_tuning_that_begins_with_a_checkpoint_takes_it(tmp_path):
    config = default_config("tiny")
    config.init["from"] = checkpoint(tmp_path)
    config.model.vocab_size = published().vocab_size
    find_tokenizer(freeze(config), str(tmp_path / "work"), [])

    text = chat_template.of_folder(str(tmp_path / "work"), published())
    assert chat_ids(TURNS[:2], published(), text.template)[-1] == published().backend.token_to_id("</think>")


def test_answers_are_trained_on_with_or_without_reasoning(text):
    here = published()
    plain = [{key: part for key, part in turn.items() if key != "reasoning_content"} for turn in TURNS]
    rows = {"4<|eos|>": plain[3:], "2<|eos|>": plain}
    for answer, row in rows.items():
        ids, predicted = conversation_ids([*row, {"role": "assistant", "content": "4"}], here, text)
        assert said(here, ids, predicted)[0] == answer
    row = [TURNS[3], {"role": "assistant", "content": "4", "reasoning_content": "hm <think>"}]
    ids, predicted = conversation_ids(row, here, text)
    assert said(here, ids, predicted) == ["hm <think></think>4<|eos|>"]
    assert ids.count(here.backend.token_to_id("<think>")) == 1  # markup in the reasoning is plain text


@pytest.mark.parametrize("last", ["hm", None])
@pytest.mark.parametrize("first", ["easy", None])
def test_of_several_answers_the_reasoning_before_the_last_question_is_left_out_and_what_remains_is_context(
        text, first, last):
    here, turn = published(), lambda content, why: {"role": "assistant", "content": content} | (
        {"reasoning_content": why} if why else {})
    ids, predicted = conversation_ids([*TURNS[:2], turn("2", first), TURNS[3], turn("4", last)], here, text)
    assert here.decode(ids, specials=True) == BEGINS + (f"<think>{last}</think>" if last else "</think>") + "4<|eos|>"
    answer = f"{last}</think>4<|eos|>" if last else "4<|eos|>"
    assert said(here, ids, predicted) == ([answer] if first else ["2<|eos|>", answer])


def test_a_request_may_hold_the_reasoning_of_earlier_answers(text):
    served = requests.ServedModel("m", published(), 512, 500, text)
    body = {"messages": TURNS, "max_tokens": 1, "chat_template_kwargs": {"thinking": True}}
    ids = requests.read(body, True, served).requests[0].prompt
    assert published().decode(list(ids), specials=True) == BEGINS + "<think>"


def test_reasoning_is_refused_where_the_template_knows_none(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(BadMessages, match="knows no reasoning_content; leave it out"):
        chat_ids(TURNS, published(), chat_template.of_folder(str(tmp_path), published()).template)
    with pytest.raises(BadMessages, match=r"messages\[2\].reasoning_content is not supported"):
        chat_ids(TURNS, published(), None)
    with pytest.raises(BadMessages, match=r"messages\[0\].reasoning_content is not supported"):
        check_messages([{"role": "user", "content": "a", "reasoning_content": "b"}])
