"""The chat template of a checkpoint, rendered as transformers does: Jinja, in a sandbox."""

from __future__ import annotations

import json
import os
import sys

from deepseek_jax.config import ConfigError
from deepseek_jax.serving.openai.chat import ROLES, Template, Tokenizer


def read(folder: str, bos: str, eos: str) -> Template | None:
    """messages -> prompt, ready for the answer; None where `folder` has no template.

    Args:
      folder: with chat_template.jinja, or tokenizer_config.json with "chat_template" in it.
      bos, eos: the tokens that templates name.
    Raises:
      ConfigError: the template cannot be read, or jinja2 is not installed.
      ValueError: (of the function) the template refuses these messages.
    """
    source = _source(folder)
    if source is None:
        return None
    try:
        import jinja2.sandbox
    except ImportError:
        raise ConfigError(f"{folder} has a chat template, which needs jinja2: pip install -e '.[serve]'.") from None

    def refuse(why):
        raise ValueError(str(why))

    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = refuse
    try:
        template = jinja.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template of {folder} is damaged ({error}); fetch it again.") from None

    def render(messages):
        try:
            return template.render(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from None

    return render


def of_folder(folder: str, tokenizer: Tokenizer) -> Template | None:
    """`read` with the special tokens of the folder's tokenizer. Notes on stderr that there is nothing to chat with."""
    spell = lambda token: tokenizer.backend.id_to_token(token) or ""
    template = read(folder, spell(tokenizer.bos), spell(tokenizer.eos))
    if template is None and tokenizer.backend.token_to_id(ROLES["assistant"] or "") is None:
        print(f"note: {folder} has no chat template; messages are joined, and the model continues them as plain text.",
              file=sys.stderr)
    return template


def _source(folder):
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            return f.read()
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f).get("chat_template")
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is not a JSON object; fetch it again.") from None
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else None
