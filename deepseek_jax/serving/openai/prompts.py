"""Texts in, texts out: prompts and chats from files, their token ids, and the continuations as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from deepseek_jax.chat.messages import (
    HALF_CHARACTER,
    BadMessages,
    Conventions,
    Tokenizer,
    chat_ids,
    check_messages,
    check_options,
    is_unicode,
    thinking_marks,
)
from deepseek_jax.config import ConfigError
from deepseek_jax.serving.openai.detokenize import AnswerStream
from deepseek_jax.serving.sequence import Sequence, Token

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a chat


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: rows with "prompt" or "messages" if it is a .jsonl file, otherwise one per line.

    Raises:
      ConfigError: there is no such file, it is not UTF-8, a row is neither (named by its line), or there is no prompt.
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
        if row.get("tools"):
            raise ConfigError(f"{where}: tools are not supported; leave them out.")
        try:
            return check_messages(found["messages"])
        except BadMessages as error:
            raise ConfigError(f"{where}: {error}") from None
    if not is_unicode(found["prompt"]):
        raise ConfigError(f"{where}: {HALF_CHARACTER}")
    return found["prompt"]


def read_options(text: str | None, prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Options of the chat template: a JSON object with the template's names, such as enable_thinking; {} for None.

    Raises:
      ConfigError: it is not a JSON object, or there is no chat among the prompts.
    """
    if text is None:
        return {}
    if all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError("--chat-template-kwargs is for chats; add --chat, or give rows with \"messages\".")
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f"--chat-template-kwargs {text[:80]} is no JSON object; write it as "
                          "'{\"enable_thinking\": true}'.")
    return options


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, text: Conventions, options: dict[str, Any]) -> list[int]:
    """Token ids of a text, after BOS if texts begin with it, or of a chat up to the beginning of the answer.

    Args:
      options: of the chat template.
    Raises:
      ConfigError: messages or options that the template refuses.
    """
    if isinstance(prompt, str):
        return [*([tokenizer.bos] if text.begins else []), *tokenizer.encode(prompt)]
    try:
        check_options(options, text.template)
        return chat_ids(prompt, tokenizer, text.template, options)
    except BadMessages as error:
        raise ConfigError(str(error)) from None


def check_room(prompts: list[list[int]], new: int, positions: int | None) -> None:
    """Raises ConfigError if the longest prompt (token ids) and `new` tokens exceed `positions`; None: unlimited."""
    longest = max(map(len, prompts))
    if positions is not None and longest + new > positions:
        mend = f"lower it to {positions - longest}" if longest < positions else "shorten the prompt"
        raise ConfigError(f"a prompt of {longest:,} tokens and --max-new-tokens={new} exceed the {positions:,} "
                          f"positions that this model was made for; {mend}.")


class Continuation:
    """The text of a sequence, up to the first of `stops`: a listener of `run_requests`.

    Args:
      answers: token ids of a chat; the model's reasoning before its answer is then in `reasoning`, not in `text`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), answers: list[int] | None = None):
        self.text, self.reasoning, self.finish = "", "", ""
        marks = None if answers is None else thinking_marks(tokenizer)
        self._stream = AnswerStream(tokenizer.bytes_of, stops, marks, answers or ())

    def __call__(self, sequence: Sequence, new: list[Token]) -> int | None:
        for i, token in enumerate(new, 1):
            text, _, reasoning = self._stream.feed(token.id)
            self._add(text, reasoning)
            if self._stream.stopped:
                return i
        if not new:
            self._add(self._stream.flush(), self._stream.reasons)
            self.finish = "stop" if self._stream.stopped else sequence.finish or ""
        return None

    def _add(self, text, reasoning):
        if reasoning:
            self.reasoning += text
        else:
            self.text += text

    def row(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt and its result, as JSON data."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"prompt" if isinstance(prompt, str) else "messages": prompt, "text": self.text, **reasoning,
                "finish_reason": self.finish}
