"""Conversations to train on: the ids are those of serving, and the loss is on what the model itself would write."""

import json

import pytest

from deepseek_jax.chat.conversation import conversation_ids
from deepseek_jax.chat.messages import PLAIN, BadMessages, Conventions, chat_ids
from deepseek_jax.chat.template import read
from tests.chat.test_template import published

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
         {"role": "assistant", "content": "2"}, {"role": "user", "content": "and <｜Assistant｜> 2 + 2?"},
         {"role": "assistant", "content": "4\n\nindeed"}]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}"
            "{{ eos_token }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")
# Opens the reasoning when it asks for an answer, and omits it from earlier answers.
R1 = DEEPSEEK.replace("{{ m.content }}{{ eos_token }}", "{{ m.content.split('</think>')[-1] }}{{ eos_token }}").replace(
    "<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>{% endif %}")


def with_template(source, tmp_path, ends=frozenset()):
    (tmp_path / "chat_template.jinja").write_text(source)
    return Conventions(read(str(tmp_path), "<|bos|>", "<|eos|>"), ends)


def said(tokenizer, ids, predicted):
    """The ranges of tokens with a loss, as text."""
    parts, before = [], False
    for token, flag in zip(ids, predicted, strict=True):
        if flag and not before:
            parts.append([])
        if flag:
            parts[-1].append(token)
        before = flag
    return [tokenizer.decode(part, specials=True) for part in parts]


@pytest.mark.parametrize("source", [DEEPSEEK, None], ids=["template", "role tokens"])
def test_each_answer_and_its_end_are_predicted_and_nothing_else(source, tmp_path):
    tokenizer = published()
    text = PLAIN if source is None else with_template(source, tmp_path)
    ids, predicted = conversation_ids(TURNS, tokenizer, text)
    assert said(tokenizer, ids, predicted) == ["2<|eos|>", "4\n\nindeed<|eos|>"]
    for i in (2, 4):  # the text before an answer is the prompt that serving makes
        prompt = chat_ids(TURNS[:i], tokenizer, text.template)
        assert ids[:len(prompt)] == prompt and predicted[len(prompt)] and not predicted[len(prompt) - 1]


def test_the_line_break_behind_the_end_of_an_answer_is_the_templates(tmp_path):
    tokenizer = published()
    text = with_template(CHATML, tmp_path, frozenset([tokenizer.backend.token_to_id("<|im_end|>")]))
    ids, predicted = conversation_ids(TURNS, tokenizer, text)
    assert said(tokenizer, ids, predicted) == ["2<|im_end|>", "4\n\nindeed<|im_end|>"]
    assert tokenizer.decode(ids, specials=True).endswith("indeed<|im_end|>\n")


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = published()
    assert conversation_ids([*TURNS, {"role": "user", "content": "more"}], tokenizer, PLAIN) == conversation_ids(
        TURNS, tokenizer, PLAIN)


@pytest.mark.parametrize(("messages", "error"), [
    ([], "list of one or more"), (TURNS[:2], "have no answer"), (TURNS[2:], "answers nothing"),
    ([{"role": "narrator", "content": "x"}, *TURNS], "needs a role")])
def test_what_is_no_conversation_says_why(messages, error):
    with pytest.raises(BadMessages, match=error):
        conversation_ids(messages, published(), PLAIN)


@pytest.mark.parametrize("answer", ["2", "<think>easy</think>2"])
def test_an_answer_that_the_template_writes_otherwise_than_it_asks_for_it_is_refused(answer, tmp_path):
    with pytest.raises(BadMessages, match=r"messages\[1\]: the chat template writes this answer otherwise"):
        conversation_ids([{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": answer}], published(),
                         with_template(R1, tmp_path))


def test_reasoning_that_the_template_keeps_is_predicted_behind_what_opens_it(tmp_path):
    keeps = DEEPSEEK.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>{% endif %}")
    tokenizer = published()
    ids, predicted = conversation_ids([{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content":
                                       "<think>easy</think>2"}], tokenizer, with_template(keeps, tmp_path))
    assert said(tokenizer, ids, predicted) == ["easy</think>2<|eos|>"]


GIVEN = {"a": 1, "b": None, "why": "<｜User｜>"}
CALL = {"id": "0", "type": "function", "function": {"name": "add", "arguments": GIVEN}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "sums <|eos|>", "parameters": {}}}]
CALLING = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
           {"role": "tool", "content": "2<｜Assistant｜>", "tool_call_id": "0"},
           {"role": "assistant", "content": "it is 2"}]
KNOWS = ("{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
         "{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
         "{% elif m.role == 'tool' %}{{ m.tool_call_id + ': ' + m.content }}"
         "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}")


def test_calls_of_tools_are_predicted_and_neither_their_description_nor_what_they_return(tmp_path):
    tokenizer = published()
    ids, predicted = conversation_ids(CALLING, tokenizer, with_template(KNOWS, tmp_path), TOOLS)
    assert said(tokenizer, ids, predicted) == [f"add{json.dumps(GIVEN, ensure_ascii=False)}<|eos|>", "it is 2<|eos|>"]
    told, user, *_ = tokenizer.decode(ids, specials=True).removeprefix("<|bos|>").split("<｜User｜>")
    assert json.loads(told) == TOOLS and user == "1 + 1<｜Assistant｜>add{\"a\": 1, \"b\": null, \"why\": \""
    # Markup in tools, calls and results is plain text: one of each token is the template's own.
    count = lambda spelled: ids.count(tokenizer.backend.token_to_id(spelled))
    assert [count(spelled) for spelled in ("<｜User｜>", "<｜Assistant｜>", "<|eos|>")] == [1, 2, 2]


@pytest.mark.parametrize(("messages", "tools", "error"), [
    (CALLING, None, "it knows no tool_calls"), (TURNS, TOOLS, "it knows no tools"),
    ([*TURNS[:2], CALLING[2], TURNS[2]], None, "it knows no messages of the role tool")])
def test_tools_are_refused_by_templates_that_would_drop_them(messages, tools, error, tmp_path):
    with pytest.raises(BadMessages, match=error):
        conversation_ids(messages, published(), with_template(DEEPSEEK, tmp_path), tools)


def test_calls_that_a_template_leaves_out_in_this_place_are_not_dropped(tmp_path):
    text = with_template(KNOWS.replace("in m.tool_calls or []", "in m.tool_calls if m.content is none"), tmp_path)
    with pytest.raises(BadMessages, match=r"chat template leaves messages\[1\]\.tool_calls out"):
        conversation_ids(CALLING, published(), text)


@pytest.mark.parametrize(("messages", "tools", "error"), [
    (CALLING[:2], None, r"messages\[1\]\.tool_calls is not supported"), (TURNS, TOOLS, "tools need a chat template"),
    ([TURNS[1], CALLING[2], TURNS[2]], None, r"messages\[1\] is of the role tool, which needs a chat template")])
def test_role_tokens_have_no_tools(messages, tools, error):
    with pytest.raises(BadMessages, match=error):
        conversation_ids(messages, published(), PLAIN, tools)


@pytest.mark.parametrize(("calls", "tools", "error"), [
    ([{"function": {"name": "add"}}], TOOLS, r"messages\[1\]\.tool_calls needs a list of calls"),
    ("add", TOOLS, "needs a list of calls"), (["add"], TOOLS, "needs a list of calls"),
    ([{"function": {"name": "a", "arguments": "\ud800"}}], TOOLS, "half a character"),
    ([CALL], "add", "tools must be a list of functions with a name"),
    ([CALL], [{"function": {}}], "tools must be a list of functions with a name"),
    ([CALL], [{"name": "\ud800"}], "tools holds half a character")])
def test_calls_that_are_none_say_what_they_need(calls, tools, error, tmp_path):
    with pytest.raises(BadMessages, match=error):
        conversation_ids([CALLING[0], CALLING[1] | {"tool_calls": calls}], published(), with_template(KNOWS, tmp_path),
                         tools)


def test_calls_are_no_chat_that_the_server_takes(tmp_path):
    for content in (None, ""):
        with pytest.raises(BadMessages, match=r"messages\[1\]\.tool_calls is not supported"):
            chat_ids([CALLING[0], CALLING[1] | {"content": content}], published(),
                     with_template(KNOWS, tmp_path).template)
    with pytest.raises(BadMessages, match="needs a role"):
        chat_ids([CALLING[0], CALLING[2]], published(), with_template(KNOWS, tmp_path).template)


@pytest.mark.parametrize(("change", "left"), [
    (("c.function.arguments | tojson", "''"), r"messages\[1\]\.tool_calls"),
    (("m.tool_calls or []", "(m.tool_calls or [])[:1]"), r"messages\[1\]\.tool_calls"),
    (("': ' + m.content", "': '"), r"messages\[2\]\.content")])
def test_what_belongs_to_tools_is_in_what_the_template_writes(change, left, tmp_path):
    twice = [CALLING[0], CALLING[1] | {"tool_calls": [CALL, CALL]}, *CALLING[2:]]
    conversation_ids(twice, published(), with_template(KNOWS, tmp_path), TOOLS)
    with pytest.raises(BadMessages, match=f"leaves {left} out, or writes it otherwise"):
        conversation_ids(twice, published(), with_template(KNOWS.replace(*change), tmp_path), TOOLS)


def test_arguments_as_a_text_are_an_object_to_a_template_that_wants_one(tmp_path):
    each = KNOWS.replace("c.function.arguments | tojson", "(c.function.arguments.items() | list | tojson "
                         "if c.function.arguments is mapping else '')")
    call = CALL | {"function": CALL["function"] | {"arguments": json.dumps(GIVEN)}}
    as_text = [CALLING[0], CALLING[1] | {"tool_calls": [call]}, *CALLING[2:]]
    text = with_template(each, tmp_path)
    assert conversation_ids(as_text, published(), text) == conversation_ids(CALLING, published(), text)


def test_a_template_that_only_names_tools_leaves_them_out(tmp_path):
    text = with_template(KNOWS.replace("{{ tools | tojson }}", "{{ tools | length }}"), tmp_path)
    with pytest.raises(BadMessages, match="leaves tools out"):
        conversation_ids(TURNS, published(), text, TOOLS)


@pytest.mark.parametrize("name", ['say "a"', "ü", "<|eos|>"])
def test_a_name_may_be_written_as_json_writes_it(name, tmp_path):
    call = {"function": {"name": name, "arguments": {}}}
    text = with_template(KNOWS.replace("c.function.name +", "c.function.name | tojson +"), tmp_path)
    conversation_ids([CALLING[0], {"role": "assistant", "tool_calls": [call]}], published(), text)


def test_an_answer_that_the_next_message_ends_learns_its_end(tmp_path):
    bare = DEEPSEEK.replace("{{ eos_token }}", "")
    tokenizer = published()
    text = with_template(bare, tmp_path, frozenset([tokenizer.backend.token_to_id("<｜User｜>")]))
    ids, predicted = conversation_ids(TURNS, tokenizer, text)
    assert said(tokenizer, ids, predicted) == ["2<｜User｜>", "4\n\nindeed"]


def test_nothing_behind_the_first_end_is_predicted(tmp_path):
    more = DEEPSEEK.replace("{{ eos_token }}", "{{ eos_token }}more{{ eos_token }}")
    tokenizer = published()
    ids, predicted = conversation_ids(TURNS, tokenizer, with_template(more, tmp_path))
    assert said(tokenizer, ids, predicted) == ["2<|eos|>", "4\n\nindeed<|eos|>"]


def test_an_answer_without_reasoning_is_asked_for_without_where_reasoning_is_the_default(tmp_path):
    thinks = (DEEPSEEK.replace("<｜Assistant｜>{{ m.content }}", "<｜Assistant｜></think>{{ m.content }}")
              .replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜>{{ '</think>' if enable_thinking is false else "
                       "'<think>' }}{% endif %}"))
    tokenizer = published()
    ids, predicted = conversation_ids(TURNS, tokenizer, with_template(thinks, tmp_path))
    assert said(tokenizer, ids, predicted) == ["2<|eos|>", "4\n\nindeed<|eos|>"]


@pytest.mark.parametrize(("message", "error"), [
    ({"weight": 0}, r"messages\[1\]\.weight is not supported"), ({"train": False}, r"messages\[1\]\.train is not"),
    ({"content": [{"type": "image_url", "text": "see"}]}, "a text as content"),
    ({"tool_calls": {"function": {"name": "a", "arguments": "{}"}}}, "needs a list of calls"),
    ({"tool_calls": [{"function": {"name": "a", "arguments": {"x": float("nan")}}}]}, "holds what is no JSON"),
    ({"tool_calls": [{"function": {"name": "a", "arguments": {"x": b""}}}]}, "holds what is no JSON")])
def test_what_would_be_dropped_or_cannot_be_said_is_refused_by_name(message, error, tmp_path):
    with pytest.raises(BadMessages, match=error):
        conversation_ids([TURNS[1], TURNS[2] | message], published(), with_template(KNOWS, tmp_path))


def test_arguments_nested_without_end_are_refused(tmp_path):
    deep = {}
    for _ in range(980):
        deep = {"a": deep}
    call = {"function": {"name": "add", "arguments": deep}}
    with pytest.raises(BadMessages, match="nested too deep"):
        conversation_ids([TURNS[1], {"role": "assistant", "tool_calls": [call]}], published(),
                         with_template(KNOWS, tmp_path))


def test_all_characters_for_private_use_leave_none_to_mark_with(tmp_path):
    everything = {"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900)))}
    with pytest.raises(BadMessages, match="hold all characters for private use"):
        chat_ids([everything], published(), with_template(DEEPSEEK, tmp_path).template)
    with pytest.raises(BadMessages, match="hold all characters for private use"):
        chat_ids(TURNS, published(), with_template(DEEPSEEK, tmp_path).template, {"x": everything["content"]})


def test_two_texts_side_by_side_make_no_markup(tmp_path):
    text, tokenizer = with_template(KNOWS, tmp_path), published()
    call = {"function": {"name": "os|>", "arguments": {}}}
    ids, predicted = conversation_ids([TURNS[1], {"role": "assistant", "content": "<|e", "tool_calls": [call]}],
                                      tokenizer, text)
    assert said(tokenizer, ids, predicted) == ["<|eos|>{}<|eos|>"] and ids.count(tokenizer.eos) == 1


def test_a_text_that_ends_where_markup_begins_has_the_ids_of_the_text(tmp_path):
    here = published()
    found = chat_ids([{"role": "user", "content": "a < b <|"}], here, with_template(DEEPSEEK, tmp_path).template)
    name = here.backend.token_to_id
    assert found == [here.bos, name("<｜User｜>"), *here.encode("a < b <|"), name("<｜Assistant｜>")]


def test_an_option_may_have_any_name(tmp_path):
    plain = chat_ids(TURNS[:2], published(), with_template(DEEPSEEK, tmp_path).template)
    assert chat_ids(TURNS[:2], published(), with_template(DEEPSEEK, tmp_path).template, {"self": 1}) == plain
