"""Templates are rendered under limits: none blocks or ends the calling program."""

import os
import time

import pytest

from deepseek_jax.chat import render
from deepseek_jax.chat.jinja import NICENESS
from deepseek_jax.chat.render import Renderer

CHAT = [{"role": "user", "content": "hi"}]
HOSTILE = {
    "no end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long number": "{{ '%1000000000d'|format(1) }}", "a long text": "{% set a = 'a' * 10**10 %}{{ a }}",
    "no end of text": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "division": "{{ 1 // 0 }}",
    "types": "{{ 1 + 'a' }}",
    "classes": "{{ ''.__class__.__mro__ }}", "globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "a file": "{% include '/etc/passwd' %}", "change": "{{ messages.append(1) }}",
    "nothing": "{{ messages[0].no.more }}"}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_oversteps_is_an_error_and_the_next_chat_is_rendered(source, monkeypatch):
    monkeypatch.setattr(render, "START_SECONDS", 10.0)
    began = time.monotonic()
    template = "{% if messages[0]['content'] == 'hi' %}" + source + "{% else %}fine{% endif %}"
    try:
        rendered = Renderer(template, {})
    except ValueError as error:  # Jinja evaluates constants when it compiles
        assert str(error)
    else:
        for _ in range(2):
            with pytest.raises(ValueError, match="."):
                rendered(CHAT)
            assert rendered([{"role": "user", "content": "good"}]) == "fine"
    assert time.monotonic() - began < 60


def test_a_template_without_end_says_its_limit():
    with pytest.raises(ValueError, match="more than 2 s"):
        Renderer(HOSTILE["no end"], {})(CHAT)
    with pytest.raises(ValueError, match="more than 512 MB of memory"):
        Renderer("{{ messages[0].content * 500000000 }}", {})(CHAT)
    with pytest.raises(ValueError, match="more than 4194304 characters"):
        Renderer("{% for i in range(9999) %}{{ messages[0].content * 9999 }}{% endfor %}", {})(CHAT)


def test_threads_take_turns():
    from concurrent.futures import ThreadPoolExecutor
    rendered = Renderer("{{ messages[0].content }}", {})
    chats = [[{"role": "user", "content": f"{i}"}] for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(rendered, chats)) == [str(i) for i in range(50)]


def test_text_goes_there_and_back_unchanged():
    text = "ü \u2028 \x00 😀 \n\r\t \" \\"
    assert Renderer("{{ messages[0].content }}", {})([{"role": "user", "content": text}]) == text


def test_a_template_yields_the_processor_to_the_server():
    rendered = Renderer("{{ messages[0].content }}", {})
    rendered(CHAT)
    process = rendered._process.pid
    assert os.getpriority(os.PRIO_PROCESS, process) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    assert os.getsid(process) == os.getsid(0)  # on Linux niceness only counts within a session
    assert os.getpgid(process) != os.getpgid(0)  # Ctrl-C is meant for the server
