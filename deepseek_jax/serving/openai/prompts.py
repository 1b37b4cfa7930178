"""Texts in, texts out: prompts and chats from files, their token ids, and the continuations as text."""

from __future__ import annotations

import json
from typing import Any

from deepseek_jax.chat.messages import (
    HALF_CHARACTER,
    BadMessages,
    Conventions,
    Tokenizer,
    chat_ids,
    check_messages,
    is_unicode,
)
from deepseek_jax.config import ConfigError
from deepseek_jax.serving.openai.detokenize import TextStream
from deepseek_jax.serving.sequence import Sequence, Token

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a chat


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: rows with "prompt" or "messages" where it ends in .jsonl, else one a line.

    Raises:
      ConfigError: no such file, no UTF-8, a row that is neither (named by its line), or no prompt at all.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [line.rstrip("\r\n") for line in f]
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}; give a text or .jsonl file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {path} is not UTF-8 (byte {error.start}); convert it.") from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompts {path} holds no prompt.")
    return [_row(f"{path}:{i}", line) if path.endswith(".jsonl") else line for i, line in numbered]


def _row(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}).") from None
    found = {key: row[key] for key in ("prompt", "messages") if key in row} if isinstance(row, dict) else {}
    if len(found) != 1 or not isinstance(found.get("prompt", ""), str):
        raise ConfigError(f'{where} needs "prompt", a text, or "messages", a list; one of them, not both.')
    if "messages" in found:
        try:
            return check_messages(found["messages"])
        except BadMessages as error:
            raise ConfigError(f"{where}: {error}") from None
    if not is_unicode(found["prompt"]):
        raise ConfigError(f"{where}: {HALF_CHARACTER}")
    return found["prompt"]


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, text: Conventions) -> list[int]:
    """Token ids of a text, after BOS if texts begin with it, or of a chat up to where the answer begins.

    Raises:
      ConfigError: messages that the template refuses.
    """
    if isinstance(prompt, str):
        return [*([tokenizer.bos] if text.begins else []), *tokenizer.encode(prompt)]
    try:
        return chat_ids(prompt, tokenizer, text.template)
    except BadMessages as error:
        raise ConfigError(str(error)) from None


def check_room(prompts: list[list[int]], new: int, positions: int | None) -> None:
    """Raises ConfigError where the longest prompt (token ids) and `new` tokens exceed `positions`; None: unlimited."""
    longest = max(map(len, prompts))
    if positions is not None and longest + new > positions:
        mend = f"lower it to {positions - longest}" if longest < positions else "shorten the prompt"
        raise ConfigError(f"a prompt of {longest:,} tokens and --max-new-tokens={new} exceed the {positions:,} "
                          f"positions that this model was made for; {mend}.")


class Continuation:
    """The text of a sequence, up to the first of `stops`: a listener of `run_requests`."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self.text, self.finish = "", ""
        self._stream = TextStream(tokenizer.bytes_of, stops)

    def __call__(self, sequence: Sequence, new: list[Token]) -> int | None:
        for i, token in enumerate(new, 1):
            self.text += self._stream.feed(token.id)
            if self._stream.stopped:
                return i
        if not new:
            self.text += "" if self._stream.stopped else self._stream.flush()
            self.finish = "stop" if self._stream.stopped else sequence.finish or ""
        return None
