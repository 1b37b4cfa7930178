"""Requests to the completion and chat endpoints of the OpenAI API, checked field by field."""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Any, NamedTuple

from deepseek_jax.chat.messages import (
    HALF_CHARACTER,
    PLAIN,
    BadMessages,
    Conventions,
    Tokenizer,
    chat_ids,
    check_messages,
    check_options,
    is_unicode,
)
from deepseek_jax.config import did_you_mean
from deepseek_jax.serving.decode import ALTERNATIVES
from deepseek_jax.serving.sequence import Request

LONGEST_STOP, MOST_STOPS = 1024, 16  # characters; strings
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
# Unsupported fields, and the values with which they have no effect (null never has one).
UNSUPPORTED = {"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"],
               "response_format": [{"type": "text"}], "modalities": [["text"]], "logit_bias": [{}], "suffix": [""],
               "presence_penalty": [0], "frequency_penalty": [0], "audio": [], "prediction": [], "reasoning_effort": [],
               "verbosity": [], "web_search_options": []}
SHARED = ("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "stop", "seed",
          "logprobs", "return_drafts")
FIELDS = {False: (*SHARED, "prompt", "echo", "best_of"),
          True: (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")}


class BadRequest(Exception):
    """A 4xx response that names the field."""

    def __init__(self, field: str | None, message: str, status: int = 400, code: str = "invalid_value"):
        super().__init__(message)
        self.field, self.message, self.status, self.code = field, message, status, code

    def body(self) -> dict[str, Any]:
        """The error in the format of the OpenAI API, as JSON data."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        field = self.field and self.field.encode(errors="backslashreplace").decode()  # half a character cannot be sent
        return {"error": {"message": self.message, "type": kind, "param": field, "code": self.code}}


class ServedModel(NamedTuple):
    """The limits that requests are checked against.

    name: that clients ask for. max_length: tokens of prompt and answer. most_choices: of one request.
    text: its checkpoint's tokenizer and template.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    text: Conventions = PLAIN
    most_choices: int = 16

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.text.ends or frozenset([self.tokenizer.eos])

    @property
    def longest_text(self) -> int:
        """The maximum number of characters of a prompt: the longest token as often as it fits."""
        return self.max_length * self.tokenizer.longest()


class CompletionRequest(NamedTuple):
    """A checked request: engine requests, one for each choice, and the form of the answer.

    prompts: their number; each has the same number of choices. alternatives: likeliest tokens to report next to each
    one; None: no logprobs. echo: whether an answer begins with its prompt.
    """

    chat: bool
    prompts: int
    requests: list[Request]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    alternatives: int | None
    return_drafts: bool
    echo: bool = False


def read(body: Any, chat: bool, served: ServedModel) -> CompletionRequest:
    """Checks the body of a request, parsed from JSON.

    Raises:
      BadRequest: for the first field that cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest(None, "the body must be a JSON object.", code="invalid_json")
    _check_supported(body, chat, served.name)
    n = _integer(body, "n", 1, 1, served.most_choices)
    if _integer(body, "best_of", n, 1, served.most_choices) != n:
        raise BadRequest("best_of", "best_of is not supported; it can only equal n.")
    prompts = _chat(body, served) if chat else _prompts(body, served)
    if len(prompts) * n > served.most_choices:
        raise BadRequest("n", f"{len(prompts)} prompts and n={n} make more than the {served.most_choices} choices that "
                         "this server has room for.")
    echo = _get(body, "echo", bool, False)
    max_new_tokens = _max_new_tokens(body, chat, prompts, served.max_length, 0 if echo else 1)
    alternatives = _alternatives(body, chat)
    common = Request(
        prompt=(), max_new_tokens=max_new_tokens, temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1, open_below=True), top_k=_integer(body, "top_k", 0, 0, 2**31 - 1),
        seed=_integer(body, "seed", secrets.randbits(32), -2**63, 2**64 - 1) % 2**32,
        stop_tokens=served.ends, logprobs=alternatives is not None,
        prompt_logprobs=echo and alternatives is not None)
    stream = _get(body, "stream", bool, False)
    return CompletionRequest(
        chat=chat, prompts=len(prompts), stops=_stops(body), stream=stream,
        requests=[dataclasses.replace(common, prompt=tuple(prompt), stream=i) for prompt in prompts for i in range(n)],
        include_usage=_include_usage(body, stream), alternatives=alternatives,
        return_drafts=_get(body, "return_drafts", bool, False), echo=echo)


def _check_supported(body, chat, name):
    for field, value in body.items():
        short = field[:80]
        if field in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[field]:
                raise BadRequest(field, f"{field} is not supported; leave it out.", code="unsupported_parameter")
        elif field not in FIELDS[chat] and field not in IGNORED:
            raise BadRequest(short, f"unknown field {short!r}; {did_you_mean(short, FIELDS[chat])}",
                             code="unknown_field")
    wanted = _get(body, "model", str, name)
    if wanted != name:
        raise BadRequest("model", f"model {wanted[:80]!r} is not here; this server has {name!r}.", 404,
                         "model_not_found")


def _include_usage(body, stream):
    options = _get(body, "stream_options", dict, None)
    if options is None:
        return False
    if not stream:
        raise BadRequest("stream_options", "stream_options needs stream=true.")
    if unknown := [str(key)[:80] for key in options if key not in ("include_usage", "include_obfuscation")]:
        raise BadRequest(f"stream_options.{unknown[0]}", f"unknown option {unknown[0]!r}; there is include_usage.",
                         code="unknown_field")
    return _get(options, "include_usage", bool, False)


def _max_new_tokens(body, chat, prompts, max_length, least):
    """The maximum tokens per choice, at least `least`, given that prompt and answer share max_length."""
    source = "messages" if chat else "prompt"
    longest = max(map(len, prompts))
    if longest >= max_length:
        raise BadRequest(source, f"{source} has {longest} tokens; this server holds {max_length} with the answer.",
                         code="context_length_exceeded")
    both = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    if len(both) == 2 and body[both[0]] != body[both[1]]:
        raise BadRequest("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
    limit = (*both, "max_tokens")[0]
    new = _integer(body, limit, max_length - longest if chat else 16, least, 10**9)
    if longest + new > max_length:
        raise BadRequest(limit, f"{limit}={new} after {longest} tokens of {source} is more than the {max_length} that "
                         f"this server holds; ask for at most {max_length - longest}.",
                         code="context_length_exceeded")
    return new


def _get(body, field, kind, default):
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        name = {str: "a string", bool: "true or false", dict: "an object", int: "a whole number"}.get(kind, "a number")
        raise BadRequest(field, f"{field} must be {name}.", code="invalid_type")
    return value


def _integer(body, field, default, low, high):
    value = _get(body, field, int, default)
    if not low <= value <= high:
        raise BadRequest(field, f"{field}={str(value)[:40]} must lie in [{low}, {high}].")
    return value


def _number(body, field, default, low, high, open_below=False):
    value = _get(body, field, (int, float), default)
    if not low <= value <= high or (open_below and value == low) or not math.isfinite(value):
        raise BadRequest(field, f"{field}={str(value)[:40]} must lie in {'(' if open_below else '['}{low}, {high}].")
    return float(value)


def _stops(body):
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest("stop", f"stop must be a string, or a list of up to {MOST_STOPS} of them, none empty.")
    if max(map(len, stops), default=0) > LONGEST_STOP:
        raise BadRequest("stop", f"stop has more than {LONGEST_STOP} characters; a shorter part of it ends a text too.")
    return tuple(_utf8("stop", stop) for stop in stops)


def _alternatives(body, chat):
    if not chat:
        value = body.get("logprobs")
        return None if value is None else _integer(body, "logprobs", 0, 0, ALTERNATIVES)
    wanted = _get(body, "logprobs", bool, False)
    if body.get("top_logprobs") is not None and not wanted:
        raise BadRequest("top_logprobs", "top_logprobs needs logprobs=true.")
    return _integer(body, "top_logprobs", 0, 0, ALTERNATIVES) if wanted else None


def _prompts(body, served):
    tokenizer, vocab_size = served.tokenizer, served.vocab_size
    prompt = body.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(texts, list) and texts and all(type(t) is int for t in texts):
        texts = [texts]
    if not isinstance(texts, list) or not texts:
        raise BadRequest("prompt", "prompt must be a string, a list of strings, or one or more lists of token ids.")
    out = []
    for text in texts:
        if isinstance(text, str):
            _check_length("prompt", len(text), served)
            out.append([*([tokenizer.bos] if served.text.begins else []), *tokenizer.encode(_utf8("prompt", text))])
        elif isinstance(text, list) and text and all(type(t) is int and 0 <= t < vocab_size for t in text):
            out.append(text)
        else:
            raise BadRequest("prompt", f"prompt: {str(text)[:40]!r} is neither a string nor a list of token ids in "
                             f"[0, {vocab_size}).")
    return out


def _check_length(field, characters, served):
    """Before the text is tokenized."""
    if characters > served.longest_text:
        raise BadRequest(field, f"{field} has {characters} characters, more than {served.max_length} tokens can hold; "
                         "this server holds so many with the answer.", code="context_length_exceeded")


def _chat(body, served):
    options = _get(body, "chat_template_kwargs", dict, {})
    try:
        check_options(options, served.text.template)
        checked = check_messages(body.get("messages"))
        _check_length("messages", sum(len(message["content"]) for message in checked), served)
        return [chat_ids(checked, served.tokenizer, served.text.template, options)]
    except BadMessages as error:
        raise BadRequest(error.field, str(error)) from None


def _utf8(field, text):
    if not is_unicode(text):
        raise BadRequest(field, f"{field} {HALF_CHARACTER}")
    return text
