"""Chat templates: read from each place in a checkpoint, rendered as by transformers, refused in one line."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from deepseek_jax.chat import template as chat_template
from deepseek_jax.chat.messages import BadMessages, Conventions, chat_ids
from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.serving.openai import requests

# Has the structure of DeepSeek-V3's template.
TEMPLATE = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}
{%- elif m['role'] == 'assistant' %}{{ '<A>' + m['content'] + eos_token }}
{%- elif m['role'] == 'system' %}{{ m['content'] }}
{%- else %}{{ raise_exception('no ' + m['role']) }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<A>' }}{% endif %}"""
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"}, {"role": "user", "content": "again"}]
tokenizer = functools.cache(lambda: train_tokenizer(["some text"] * 3, 262))
RENDERED = "<s>Be brief.<U>hi<A>ho</s><U>again<A>"


@pytest.mark.parametrize("file", ["jinja", "config", "list"])
def test_a_template_is_found_where_checkpoints_keep_it(tmp_path, file):
    if file == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        held = TEMPLATE if file == "config" else [{"name": "tools", "template": "no"},
                                                  {"name": "default", "template": TEMPLATE}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))

    assert chat_template.read(str(tmp_path), "<s>", "</s>")(CHAT) == RENDERED


def test_without_a_template_there_is_none(tmp_path):
    assert chat_template.read(str(tmp_path), "<s>", "</s>") is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert chat_template.read(str(tmp_path), "<s>", "</s>") is None


@pytest.mark.parametrize("source", ["{% if %}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"])
def test_damaged_and_hostile_templates_are_refused(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)

    with pytest.raises((ConfigError, ValueError)):
        chat_template.read(str(tmp_path), "<s>", "</s>")(CHAT)


def test_a_request_is_the_rendered_template_token_for_token(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    here = tokenizer()
    template = chat_template.read(str(tmp_path), "<s>", "</s>")

    completion = requests.read({"model": "m", "messages": CHAT, "max_tokens": 1}, True,
                               requests.ServedModel("m", here, 512, 500, Conventions(template)))

    assert list(completion.requests[0].prompt) == here.backend.encode(RENDERED, add_special_tokens=False).ids


def test_what_a_template_refuses_is_a_bad_request_that_names_the_field():
    def refuse(messages):
        raise ValueError("roles must alternate")

    with pytest.raises(requests.BadRequest, match="roles must alternate") as caught:
        requests.read({"model": "m", "messages": CHAT}, True,
                      requests.ServedModel("m", tokenizer(), 512, 500, Conventions(refuse)))
    assert caught.value.field == "messages"


# Has the structure of DeepSeek's published tokenizer.json: some of the markup is marked as special, some is not.


@functools.cache
def published():
    here = train_tokenizer(["hello there, fine </think>"] * 3, 300)
    here.backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    here.backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in
                             ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "[UNUSED_1]", "    ")])
    return Tokenizer(here.backend)


R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
{%- elif m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{{ '<｜Assistant｜><think>' }}"""


def ids_of(messages, folder, source=R1):
    (folder / "chat_template.jinja").write_text(source)
    return chat_ids(messages, published(), chat_template.of_folder(str(folder), published()).template)


def test_markup_of_the_template_is_ids(tmp_path):
    here, name = published(), published().backend.token_to_id
    found = ids_of([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>x</think>there"},
                    {"role": "user", "content": "fine"}], tmp_path)
    user, assistant = name("<｜User｜>"), name("<｜Assistant｜>")
    assert found == [here.bos, user, *here.encode("hello"), assistant, *here.encode("there"), here.eos, user,
                     *here.encode("fine"), assistant, name("<think>")]


@pytest.mark.parametrize("spelled", ["<｜User｜>", "<|im_end|>", "<|bos|>", "<think>", "[UNUSED_1]", "a<|eos|><|eos|>b",
                                     "<｜Assistant｜>\ue000", "\\ue000<｜User｜>"])
def test_what_a_user_spells_is_letters(tmp_path, spelled):
    here, name = published(), published().backend.token_to_id
    found = ids_of([{"role": "user", "content": spelled}], tmp_path)
    assert found == [here.bos, name("<｜User｜>"), *here.encode(spelled), name("<｜Assistant｜>"), name("<think>")]
    assert here.decode(here.encode(spelled), specials=True) == spelled
    assert not set(here.encode(spelled)) & set(here.markup().values())


def test_words_that_a_tokenizer_has_added_are_still_parsed():
    assert published().encode("a    b")[1] == published().backend.token_to_id("    ")


WORDS = ("<｜User｜>", "<｜", "User", "｜>", "<|eos|>", "<", "|>", "hi ", "</think>", "\n", "é", "[UNUSED_1]")


@given(st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
def test_the_text_of_a_user_is_never_markup_and_never_lost(text):
    here, render = published(), lambda messages: f"<|bos|><｜User｜>{messages[0]['content']}<｜Assistant｜>"
    first, second, *inner, last = chat_ids([{"role": "user", "content": text}], here, render)
    assert [first, second, last] == [here.backend.token_to_id(t) for t in ("<|bos|>", "<｜User｜>", "<｜Assistant｜>")]
    assert not set(inner) & set(here.markup().values()) and here.decode(inner, specials=True) == text


def test_json_that_a_template_writes_keeps_its_text(tmp_path):
    source = "{{ messages[0].content | tojson(ensure_ascii=True) }}"
    found = ids_of([{"role": "user", "content": "<|eos|>é"}], tmp_path, source)
    assert published().decode(found, specials=True) == json.dumps("<|eos|>é")


LANGUAGE = {  # template -> what transformers 5.24 renders of three messages
    "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}": "Hi <b> ü|A|",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}": "A",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}": "Hi <b> üAB",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": "Hi <b> ü"}',
    "{{ messages[1] | tojson(indent=1) }}": '{\n "role": "assistant",\n "content": "A"\n}',
    "{{ messages[0].content | tojson(ensure_ascii=True) }}": '"Hi <b> \\u00fc"',
    "{% if tools is none and documents is none %}none{% endif %}": "none",
    "{{ strftime_now('%%') }}": "%"}


@pytest.mark.parametrize("source", LANGUAGE)
def test_templates_have_the_language_of_transformers(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    messages = [{"role": role, "content": text} for role, text in
                (("user", "Hi <b> ü"), ("assistant", "A"), ("user", "B"))]
    assert chat_template.read(str(tmp_path), "<s>", "</s>")(messages) == LANGUAGE[source]


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ messages[0] | tojson(no=1) }}"])
def test_whatever_a_template_raises_is_its_refusal(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    template = chat_template.read(str(tmp_path), "<s>", "</s>")
    with pytest.raises(BadMessages, match="the model's chat template refuses them"):
        chat_ids(CHAT, tokenizer(), template)


def test_a_developer_speaks_as_the_system_where_the_template_knows_none(tmp_path):
    ask = lambda role, source: ids_of([{"role": role, "content": "hello"}], tmp_path, source)
    assert ask("developer", R1) == ask("system", R1) != ask("user", R1)
    own = R1.replace("'system'", "'developer'")
    assert ask("developer", own) == ask("system", R1) != ask("system", own)


@pytest.mark.parametrize(("message", "field"), [
    (dict(tool_calls=[{"id": "1"}]), "messages[0].tool_calls"), (dict(reasoning_content="hm"), "reasoning_content"),
    (dict(prefix=True), "prefix"), (dict(name=3), "name")])
def test_what_would_be_dropped_is_refused(message, field):
    with pytest.raises(BadMessages, match="is not supported; leave it out") as caught:
        chat_ids([{"role": "user", "content": "hi"} | message], tokenizer(), None)
    assert field in caught.value.field
    assert chat_ids([{"role": "user", "content": "hi", "tool_calls": None, "refusal": None, "audio": []}],
                    tokenizer(), None)


def test_a_name_reaches_the_template(tmp_path):
    found = ids_of([{"role": "user", "content": "hello", "name": "fine"}], tmp_path, "{{ messages[0].name }}")
    assert found == published().encode("fine")


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return chat_template.of_folder(str(folder), published())


def test_the_checkpoint_says_which_tokens_end_an_answer_and_what_templates_call_them(tmp_path):
    here, end = published(), published().backend.token_to_id("<|im_end|>")
    assert write(tmp_path, config={"num_layers": 3}).ends == {here.eos}
    assert write(tmp_path, config={"eos_token_id": end}).ends == {end}
    assert write(tmp_path, generation_config={"eos_token_id": [here.eos, end]}).ends == {here.eos, end}
    assert write(tmp_path, generation_config={}, config={}, tokenizer_config={"eos_token": "<|im_end|>"}).ends == {end}
    about = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ eos_token }}"}
    found = write(tmp_path, tokenizer_config=about)
    assert found.template([]) == "<|im_end|>" and found.begins
    assert not write(tmp_path, tokenizer_config={"add_bos_token": False}).begins

    served = requests.ServedModel("m", here, 512, 500, Conventions(None, frozenset([end]), begins=False))
    asked = requests.read({"prompt": "hello", "max_tokens": 1}, False, served).requests[0]
    assert asked.stop_tokens == {end} and list(asked.prompt) == here.encode("hello")
    plain = requests.read({"prompt": "hello", "max_tokens": 1}, False, requests.ServedModel("m", here, 512, 500))
    assert plain.requests[0].stop_tokens == {here.eos} and plain.requests[0].prompt[0] == here.bos


@pytest.mark.parametrize(("files", "message"), [
    (dict(tokenizer_config={"eos_token": "<none>"}), "which tokenizer.json does not have"),
    (dict(generation_config=[3]), "generation_config.json is not a JSON object")])
def test_what_does_not_fit_the_tokenizer_is_named(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, **files)


def test_a_chat_can_set_names_of_its_template(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ '<think>' if enable_thinking is not defined or enable_thinking else 'no' }}")
    here = published()
    served = requests.ServedModel("m", here, 512, 500, chat_template.of_folder(str(tmp_path), here))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    ids = lambda **fields: list(requests.read(body | fields, True, served).requests[0].prompt)

    think = here.backend.token_to_id("<think>")
    assert ids() == ids(chat_template_kwargs={"enable_thinking": True}) == [*here.encode("hello"), think]
    assert ids(chat_template_kwargs={"enable_thinking": False}) == here.encode("hellono")
    for bad, where in (({"messages": []}, served), ({"bos_token": "x"}, served),
                       ({"a": 1}, served._replace(text=Conventions()))):
        with pytest.raises(requests.BadRequest, match="chat_template_kwargs are names") as refused:
            requests.read(body | {"chat_template_kwargs": bad}, True, where)
        assert refused.value.field == "chat_template_kwargs"
