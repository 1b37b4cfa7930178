"""Chat templates: read from where checkpoints keep them, rendered as transformers does, refused in one line."""

import functools
import json

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.openai import chat_template, requests

# The shape of DeepSeek-V3's own template.
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
                               requests.ServedModel("m", here, 512, 500, template))

    assert list(completion.requests[0].prompt) == here.backend.encode(RENDERED, add_special_tokens=False).ids


def test_what_a_template_refuses_is_a_bad_request_that_names_the_field():
    def refuse(messages):
        raise ValueError("roles must alternate")

    with pytest.raises(requests.BadRequest, match="roles must alternate") as caught:
        requests.read({"model": "m", "messages": CHAT}, True, requests.ServedModel("m", tokenizer(), 512, 500, refuse))
    assert caught.value.field == "messages"
