"""The language of chat templates, as in transformers: Jinja in a sandbox, and the few names that templates use.

As a program (`python -m deepseek_jax.chat.jinja`) it renders for `render.Renderer`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_MB = 512  # of the process that renders
NICENESS = 10  # niceness of that process: an endless template takes only a tenth of a core from the running streams
LONGEST = 4 * 2**20  # characters of a rendered chat
CPU_SECONDS = 60  # in case nothing else ends the process


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks text for training: here it is only rendered."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body of the block, in its own scope like any call block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """An environment whose templates cannot access Python or change their inputs."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def _refuse(why: Any) -> NoReturn:
    raise ValueError(str(why))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Replaces Jinja's tojson, which escapes for HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def main() -> None:
    """Reads lines of JSON, the template first, then chats; answers each with its text or an error."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
    os.nice(NICENESS)
    about, template = json.loads(sys.stdin.readline()), None

    def compiled():
        nonlocal template
        template = environment().from_string(about["source"])
        return ""

    def rendered(line):
        assert template is not None
        chat, text = json.loads(line), ""
        for part in template.generate(about["names"] | chat["names"] | {"messages": chat["messages"]}):
            text += part
            if len(text) > LONGEST:
                raise ValueError(f"it makes more than {LONGEST} characters.")
        return text

    _reply(compiled)
    for line in sys.stdin:
        _reply(functools.partial(rendered, line))


def _reply(work: Callable[[], str]):
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, resource.RLIM_INFINITY))
    try:
        answer = {"text": work()}
    except MemoryError:
        answer = {"error": f"it takes more than {MEMORY_MB} MB of memory."}
    except Exception as error:  # a template's arithmetic may raise anything
        answer = {"error": str(error)[:1000] or type(error).__name__}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
