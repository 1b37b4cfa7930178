"""A checkpoint folder's conventions for text: the chat template, rendered as in transformers (Jinja, in a sandbox), the
tokens that end an answer, and whether a text begins with BOS."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import re
import sys
from itertools import chain
from typing import Any

from deepseek_jax import io, storage
from deepseek_jax.chat.messages import KEPT, ROLES, TOOL, Conventions, Template, Tokenizer
from deepseek_jax.chat.render import Renderer
from deepseek_jax.config import ConfigError, shown

FILE = "chat_template.jinja"
_V32_MARKS = {ROLES["user"], ROLES["assistant"], *KEPT["assistant"]}

def of_folder(folder: str, tokenizer: Tokenizer, chats: bool = True) -> Conventions:
    """Reads chat_template.jinja, tokenizer_config.json, generation_config.json and config.json, as far as they exist.

    Args:
      chats: whether chats are expected: a note on stderr says if there is no template for them.
    Raises:
      ConfigError: a file that cannot be read, or a special token that the tokenizer does not have.
    """
    about = _json(folder, "tokenizer_config.json")
    names = (tokenizer.backend.id_to_token(_named(folder, tokenizer, about, role)) or "" for role in ("bos", "eos"))
    template = read(folder, *names, default=built_in(folder))
    if chats and template is None and tokenizer.backend.token_to_id(ROLES["assistant"] or "") is None:
        print(f"note: {folder} has no chat template; messages are joined, and the model continues them as plain text.",
              file=sys.stderr)
    return without_template(folder, tokenizer)._replace(template=template)


def built_in(folder: str) -> str | None:
    """Our template for DeepSeek-V3.2, for its Hugging Face checkpoint, which is published without one.

    None for other models, and if the tokenizer lacks the tokens of roles and reasoning.

    Raises ConfigError for a file that cannot be read.
    """
    if _json(folder, "config.json").get("model_type") != "deepseek_v32" or _source(folder) is not None:
        return None
    added = _json(folder, "tokenizer.json").get("added_tokens")
    spelled = {token.get("content") for token in added if isinstance(token, dict)} if isinstance(added, list) else set()
    if not spelled >= _V32_MARKS:
        return None
    return importlib.resources.files("deepseek_jax.chat").joinpath("deepseek_v32.jinja").read_text(encoding="utf-8")


def keep_built_in(src: str, dst: str) -> None:
    """Adds this project's template, if any, to a run made from the checkpoint `src`."""
    source = built_in(src)
    if source is not None:
        io.write_text(os.path.join(dst, FILE), source)


def without_template(folder: str, tokenizer: Tokenizer) -> Conventions:
    """The folder's conventions for plain texts: their end tokens, and whether they begin with BOS.

    Raises ConfigError as `of_folder`.
    """
    about = _json(folder, "tokenizer_config.json")
    ends = frozenset(_ends(folder, _named(folder, tokenizer, about, "eos")))
    return Conventions(None, ends, about.get("add_bos_token") is not False)


def _named(folder, tokenizer, about, role) -> int:
    """The id of the token in tokenizer_config.json; the tokenizer's own if there is none."""
    spelled = about.get(f"{role}_token")
    spelled = spelled.get("content") if isinstance(spelled, dict) else spelled
    if not isinstance(spelled, str):
        return getattr(tokenizer, role)
    token = tokenizer.backend.get_vocab(with_added_tokens=True).get(spelled)
    if token is None:
        raise ConfigError(f"{folder}/tokenizer_config.json names {role}_token {shown(spelled)}, which tokenizer.json "
                          "does not have; fetch both again.")
    return token


def _ends(folder, eos) -> list[int]:
    """As in transformers: from generation_config.json, otherwise from config.json, otherwise the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        found = _json(folder, name).get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        if ends := [token for token in found if type(token) is int]:
            return ends
    return [eos]


def read(folder: str, bos: str, eos: str, default: str | None = None) -> Template | None:
    """(messages, **options) -> prompt, ready for the answer; None if there is no template.

    Options are the template's own names, such as `thinking` or `enable_thinking`.

    A message with the role developer is passed as system to a template that does not know that role.

    Args:
      folder: with chat_template.jinja, or tokenizer_config.json with "chat_template" in it.
      bos, eos: the tokens that templates name. default: the template of a folder that has none.
    Raises:
      ConfigError: the template cannot be read, or jinja2 is not installed.
      ValueError: (of the function) the template refuses these messages.
    """
    source = _source(folder) or default
    if source is None:
        return None
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError(f"{folder} has a chat template, which needs jinja2: pip install -e '.[serve]'.")
    try:
        rendered = Renderer(source, {"tools": None, "documents": None, "bos_token": bos, "eos_token": eos,
                                     "add_generation_prompt": True})
    except ValueError as error:
        raise ConfigError(f"the chat template of {folder} is damaged ({error}); fetch it again.") from None

    def template(messages, /, **options):
        if "developer" not in source:
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        used = {*chain.from_iterable(messages)} | {"tools" for _ in options.get("tools") or ()}
        for field in ("reasoning_content", "tool_calls", "tools"):
            if field in used and field not in source:
                raise ValueError(f"it knows no {field}; leave it out.")
        if any(m["role"] == TOOL for m in messages) and not re.search(rf"[\"']{TOOL}[\"']", source):
            raise ValueError(f"it knows no messages of the role {TOOL}; leave them out.")
        return rendered(messages, **options)

    return template


def _json(folder, name) -> dict[str, Any]:
    """A JSON file of the folder; {} where there is none."""
    path = os.path.join(folder, name)
    if not storage.lexists(path):
        return {}
    try:
        found = io.read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again.")
    return found


def _source(folder):
    path = os.path.join(folder, FILE)
    if storage.is_file(path):
        try:
            with io.open_regular(path) as f:
                return f.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); fetch it again.") from None
    found = _json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else None
