"""Messages to token ids: by the checkpoint's template, or by DeepSeek's role tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

ROLES = {"system": None, "developer": None, "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}

HALF_CHARACTER = "holds half a character (a lone surrogate); send valid Unicode."
Template = Callable[[list[dict]], str]


class Tokenizer(Protocol):
    """What text needs of `data.tokenizer.Tokenizer`. backend: the `tokenizers.Tokenizer` below it."""

    bos: int
    eos: int
    backend: Any

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Any, specials: bool = False) -> str: ...

    def bytes_of(self, token: int) -> bytes: ...

    def spelling(self, token: int) -> bytes: ...


class BadMessages(ValueError):
    """Messages that no template can take. field: which, such as "messages[2]"."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Messages with a role and a text each; a content of text parts becomes one text.

    Raises:
      BadMessages: the first that is none.
    """
    if not isinstance(messages, list) or not messages:
        raise BadMessages("messages", "messages must be a list of one or more messages.")
    checked = []
    for i, message in enumerate(messages):
        content, role = (message.get(k) for k in ("content", "role")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise BadMessages(f"messages[{i}]",
                              f"messages[{i}] needs a role ({', '.join(ROLES)}) and a text as content.")
        if not is_unicode(content):
            raise BadMessages(f"messages[{i}]", f"messages[{i}] {HALF_CHARACTER}")
        checked.append({"role": role, "content": content})
    return checked


def chat_ids(messages: Any, tokenizer: Tokenizer, template: Template | None) -> list[int]:
    """The prompt of a chat, up to where the answer begins.

    Without a template, roles are DeepSeek's tokens; a tokenizer that lacks them makes it plain text to continue.

    Raises:
      BadMessages: messages that are none, or that the template refuses.
    """
    checked, backend = check_messages(messages), tokenizer.backend
    if template is not None:
        try:
            return backend.encode(template(checked), add_special_tokens=False).ids
        except ValueError as error:
            raise BadMessages("messages", f"messages: the model's chat template refuses them: {error}") from None
    answer = backend.token_to_id(ROLES["assistant"])
    if answer is None:
        return [tokenizer.bos, *tokenizer.encode("\n".join(m["content"] for m in checked))]
    ids = [tokenizer.bos]
    for message in checked:
        role = backend.token_to_id(ROLES[message["role"]] or "")
        ids += [role] if role is not None else []
        ids += tokenizer.encode(message["content"])
        ids += [tokenizer.eos] if message["role"] == "assistant" else []
    return [*ids, answer]


def is_unicode(text: str) -> bool:
    """False for half a character (a lone surrogate), which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
