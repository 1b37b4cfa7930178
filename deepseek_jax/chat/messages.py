"""Messages to token ids: by the checkpoint's template, or by DeepSeek's role tokens.

A template's markup becomes the ids of its tokens, as in transformers. The text of a message never does: if a user
spells a role token, it is encoded as plain text.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

ROLES = {"system": None, "developer": None, "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
KEPT = {"assistant": ("<think>", "</think>")}  # templates search for these to remove earlier reasoning
TOOL = "tool"  # the role of a tool's result, in conversations with tools
EXTRA = {"assistant": ("reasoning_content",), TOOL: ("tool_call_id",)}  # fields with a text

# Names that this program sets for a template.
RESERVED = ("messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt")

HALF_CHARACTER = "holds half a character (a lone surrogate); send valid Unicode."
Template = Callable[..., str]  # (messages, **options) -> prompt


class Tokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` needed here. backend: the underlying `tokenizers.Tokenizer`."""

    bos: int
    eos: int
    backend: Any

    def encode(self, text: str) -> list[int]: ...

    def encode_template(self, text: str) -> list[int]: ...

    def decode(self, ids: Any, specials: bool = False) -> str: ...

    def bytes_of(self, token: int) -> bytes: ...

    def spelling(self, token: int) -> bytes: ...

    def markup(self) -> dict[str, int]: ...

    def longest(self) -> int: ...


class Conventions(NamedTuple):
    """A checkpoint's conventions for text.

    template: None: chats use DeepSeek's role tokens. ends: tokens that end an answer; empty: the tokenizer's EOS.
    begins: whether a text begins with BOS.
    """

    template: Template | None = None
    ends: frozenset[int] = frozenset()
    begins: bool = True


PLAIN = Conventions()


class BadMessages(ValueError):
    """Invalid messages. field: the wrong one, such as "messages[2]"."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def check_messages(messages: Any, calls: bool = False) -> list[dict[str, Any]]:
    """Checks messages, which have a role and a text each, and optionally a name; a content of text parts becomes one
    text.

    Answers may have a reasoning_content, for templates that know it.

    Args:
      calls: whether answers may call tools (`tool_calls` as in OpenAI's API, possibly without content), and messages of
        the role tool have the results.
    Raises:
      BadMessages: the first that is invalid, or that has unknown fields.
    """
    if not isinstance(messages, list) or not messages:
        raise BadMessages("messages", "messages must be a list of one or more messages.")
    return [_checked(f"messages[{i}]", message, calls) for i, message in enumerate(messages)]


def _checked(field: str, message: Any, calls: bool) -> dict[str, Any]:
    content, role = (message.get(k) for k in ("content", "role")) if isinstance(message, dict) else (None, None)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type", "text") == "text"
                                         and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    roles = (*ROLES, TOOL) if calls else tuple(ROLES)
    called = _calls(field, message) if calls and role == "assistant" else []
    if content is None and not calls and isinstance(message, dict) and message.get("tool_calls"):
        raise _unsupported(f"{field}.tool_calls")
    if content is None and called:  # some templates would render it as None, and others cannot concatenate it
        content = ""
    if not isinstance(role, str) or role not in roles or not isinstance(content, str):
        raise BadMessages(field, f"{field} needs a role ({', '.join(roles)}) and a text as content.")
    others = {key: value for key, value in message.items()
              if key not in ("role", "content") and value not in (None, "", [], {})}
    if others.get("type") == "text":  # it adds nothing to the content
        del others["type"]
    if called:
        del others["tool_calls"]
    texts = {key: others.pop(key) for key in ("name", *EXTRA.get(role, ())) if key in others}
    odd = [key for key, text in texts.items() if not isinstance(text, str) or not is_unicode(text)]
    if others or odd:
        raise _unsupported(f"{field}.{[*others, *odd][0]}")
    _check_values(field, [content, called])
    return {"role": role, "content": content} | texts | ({"tool_calls": called} if called else {})


def _calls(field: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of an answer, each with the name of a function and its arguments."""
    given = message.get("tool_calls") or []
    functions = [call.get("function") if isinstance(call, dict) else None
                 for call in (given if isinstance(given, list) else [None])]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
               and isinstance(function.get("arguments"), str | dict) for function in functions):
        raise BadMessages(f"{field}.tool_calls", f"{field}.tool_calls needs a list of calls, each with a function "
                          "that has a name and arguments.")
    return given


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Checks tools in the format of OpenAI's API. Raises BadMessages if they are not a list of functions."""
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None
                 for tool in (tools if isinstance(tools, list) else [None])]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) and f["name"] for f in functions):
        raise BadMessages("tools", "tools must be a list of functions with a name each.")
    _check_values("tools", tools)
    return tools


def _check_values(field: str, value: Any) -> None:
    """Raises BadMessages for values that JSON cannot represent, such as a date from parquet, NaN, or half a
    character."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadMessages(field, f"{field} holds what is no JSON ({error}).") from None
    except RecursionError:
        raise BadMessages(field, f"{field} is nested too deep.") from None
    if not is_unicode(written):
        raise BadMessages(field, f"{field} {HALF_CHARACTER}")


def _unsupported(field):
    return BadMessages(field, f"{field[:80]} is not supported; leave it out.")


def chat_ids(messages: Any, tokenizer: Tokenizer, template: Template | None,
             options: dict[str, Any] | None = None) -> list[int]:
    """The prompt of a chat, up to the beginning of the answer.

    Without a template, roles are DeepSeek's tokens; a tokenizer that lacks them makes it plain text to continue.

    Args:
      options: of the template.
    Raises:
      BadMessages: invalid messages, or messages that the template refuses.
    """
    return prompt_ids(check_messages(messages), tokenizer, template, options or {})


def prompt_ids(messages: list[dict[str, Any]], tokenizer: Tokenizer, template: Template | None,
               options: dict[str, Any]) -> list[int]:
    """The same for checked messages."""
    if template is not None:
        return rendered_ids(messages, tokenizer, template, options)
    check_plain(messages)
    answer = tokenizer.backend.token_to_id(ROLES["assistant"])
    if answer is None:
        return [tokenizer.bos, *tokenizer.encode("\n".join(m["content"] for m in messages))]
    ids = [tokenizer.bos]
    for message in messages:
        role = tokenizer.backend.token_to_id(ROLES[message["role"]] or "")
        ids += [role] if role is not None else []
        ids += tokenizer.encode(message["content"])
        ids += [tokenizer.eos] if message["role"] == "assistant" else []
    return [*ids, answer]


def check_plain(messages: list[dict[str, Any]]) -> None:
    """Raises BadMessages for features without DeepSeek role tokens: tools, or separate reasoning."""
    for i, message in enumerate(messages):
        if message["role"] == TOOL:
            raise BadMessages(f"messages[{i}]", f"messages[{i}] is of the role {TOOL}, which needs a chat template.")
        for field in (*EXTRA.get(message["role"], ()), "tool_calls"):
            if field in message:
                raise _unsupported(f"messages[{i}].{field}")


def check_options(options: dict[str, Any], template: Template | None) -> None:
    """Raises BadMessages for a user's options if there is no template, or if a user may not set them."""
    if options and (template is None or any(name in RESERVED for name in options)):
        raise BadMessages("chat_template_kwargs", "chat_template_kwargs are names of the model's own chat template, "
                          "such as enable_thinking: " + (f"none of {', '.join(RESERVED)}." if template else
                                                         "this model has none."))


def rendered_ids(messages: list[dict[str, Any]], tokenizer: Tokenizer, template: Template,
                 options: dict[str, Any]) -> list[int]:
    """Ids of checked messages as rendered by the template. Raises BadMessages if it refuses them, or omits tools, tool
    calls or tool results."""
    try:
        try:
            return _rendered_ids(messages, tokenizer, template, options)
        except BadMessages as error:
            if not error.field.endswith("tool_calls"):
                raise
            parsed = [_with_objects(message) for message in messages]
            if parsed == messages:
                raise
            return _rendered_ids(parsed, tokenizer, template, options)
    except RecursionError:
        raise BadMessages("messages", "messages, or the options of their template, are nested too deep.") from None


def _with_objects(message):
    """The message with the arguments of its calls as objects, as GLM's template expects; OpenAI's API has strings."""
    calls = []
    for call in message.get("tool_calls", ()):
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (TypeError, ValueError):
            return message
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | ({"tool_calls": calls} if calls else {})


def _rendered_ids(messages, tokenizer, template, options):
    # Markup spelled in a message gets a mark inside, so that it is not recognized; and a text that ends in the
    # beginning of markup gets one at its end, since the template may append another text.
    mark = _unused(json.dumps([messages, options], ensure_ascii=False))
    spellings = sorted(tokenizer.markup(), key=len, reverse=True)
    find = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
    begun = tuple({spelling[:end] for spelling in spellings for end in range(1, len(spelling))})

    def marked(value, kept=()):
        if isinstance(value, str):
            value = find.sub(lambda m: m[0] if m[0] in kept else m[0][0] + mark + m[0][1:], value)
            return value + mark if value.endswith(begun) else value
        if isinstance(value, dict):
            return {marked(key): marked(inner) for key, inner in value.items()}
        return [marked(inner) for inner in value] if isinstance(value, list) else value

    told = [{key: value if key == "role" else marked(value, KEPT.get(m["role"], ()) if key == "content" else ())
             for key, value in m.items()} for m in messages]
    told_options: Any = marked(options)
    try:
        rendered = template(told, **told_options)
    except ValueError as error:
        raise BadMessages("messages", f"messages: the model's chat template refuses them: {error}") from None
    rendered = rendered.replace(json.dumps(mark)[1:-1], mark)  # as written by tojson
    if left_out := _left_out(rendered, told, told_options.get("tools") or []):
        raise BadMessages(left_out, f"the model's chat template leaves {left_out} out, or writes it otherwise.")
    ids = []
    for part in _parts(rendered, find, mark):
        ids += tokenizer.encode(part.replace(mark, "")) if mark in part else tokenizer.encode_template(part)
    return ids


def _left_out(rendered: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
    """The first item belonging to tools that is missing from a rendered chat; None if all are there.

    A template with tool support may still need the arguments of a call as an object, or a call without content.
    """
    names = collections.Counter(tool.get("function", tool)["name"] for tool in tools)
    if any(_count(rendered, name) < count for name, count in names.items()):
        return "tools"
    for i, message in enumerate(messages):
        calls = [call["function"] for call in message.get("tool_calls", ())]
        names.update(call["name"] for call in calls)
        texts = [text for call in calls for text in _texts(call["arguments"])]
        if (calls and any(_count(rendered, text) < 1 for text in texts)) or any(
                _count(rendered, call["name"]) < names[call["name"]] for call in calls):
            return f"messages[{i}].tool_calls"
        if (calls or message["role"] == TOOL) and _count(rendered, message["content"].strip()) < 1:
            return f"messages[{i}].content"
    return None


def _count(rendered, text) -> int:
    """How often a text occurs, verbatim or escaped as JSON."""
    return max(rendered.count(form) for form in (text, json.dumps(text, ensure_ascii=False)[1:-1],
                                                 json.dumps(text)[1:-1]))


def _texts(value) -> Iterator[str]:
    """All keys and strings in the arguments of a call."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _parts(text: str, markup: re.Pattern[str], mark: str) -> Iterator[str]:
    """The text split at real markup, so that a part with a mark has no markup; the other parts stay together."""
    together, position = "", 0
    for found in [*markup.finditer(text), None]:
        plain = text[position:len(text) if found is None else found.start()]
        if mark in plain:
            yield from filter(None, (together, plain))
            together, plain = "", ""
        together += plain
        if found is not None:
            together, position = together + found[0], found.end()
    if together:
        yield together


def _unused(text: str) -> str:
    """A private-use character that does not occur in a text, neither verbatim nor escaped as JSON."""
    used = {*text, *(chr(int(code, 16)) for code in re.findall(r"\\u([0-9a-fA-F]{4})", text))}
    for c in map(chr, range(0xE000, 0xF900)):
        if c not in used:
            return c
    raise BadMessages("messages", "messages hold all characters for private use (U+E000 to U+F8FF); leave one out.")


def thinking_marks(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of <think> and </think>, between which a model reasons; None if they are not tokens."""
    opens, closes = (tokenizer.backend.token_to_id(mark) for mark in KEPT["assistant"])
    return None if opens is None or closes is None else (opens, closes)


def is_unicode(text: str) -> bool:
    """False for half a character (a lone surrogate), which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
