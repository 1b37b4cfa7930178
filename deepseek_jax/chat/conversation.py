"""Complete conversations as token ids, and which of these are predicted in training: the answers."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepseek_jax.chat.messages import (
    ROLES,
    BadMessages,
    Conventions,
    Tokenizer,
    check_messages,
    check_plain,
    check_tools,
    prompt_ids,
    rendered_ids,
)
from deepseek_jax.config import ConfigError


def conversation_ids(messages: Any, tokenizer: Tokenizer, text: Conventions,
                     tools: Any = None) -> tuple[list[int], list[bool]]:
    """(ids, predicted): all turns as rendered by the checkpoint's template, and for each id whether it is predicted.

    The tokens that the model itself would write are predicted: each answer from the end of its prompt, including the
    token that ends it. Markup with which the template opens the answer is part of the prompt. Thinking is on for an
    answer that has a reasoning_content. If a template drops the reasoning of an earlier answer (DeepSeek-V3.2's does,
    once another question follows), the rest of that answer is context, not predicted. Tool calls are answers too; tool
    results (role tool) are not predicted.

    Args:
      tools: the tools available to the model, in the format of OpenAI's API; None: none.
    Raises:
      BadMessages: there are no messages or no answer, or the template refuses them, does not support tools, or renders
        an answer differently here than when the model is prompted for it.
      ConfigError: neither a template nor role tokens.
    """
    check_template(tokenizer, text)
    checked = check_messages(messages, calls=True)
    answers = [i for i, message in enumerate(checked) if message["role"] == "assistant"]
    if not answers:
        raise BadMessages("messages", "messages have no answer (of the role assistant); add what the model should say.")
    if answers[0] == 0:
        raise BadMessages("messages[0]", "messages[0] answers nothing; begin with a message of the user.")
    told, ends = told_of(tools), text.ends or {tokenizer.eos}
    ids = _until(checked[:answers[-1] + 1], tokenizer, text, told)
    predicted = [False] * len(ids)
    for i in answers:
        turn = last_turn(checked[:i + 1], tokenizer, text, told)
        if ids[:len(turn.ids)] == turn.ids:
            # If a template ends an answer by the next message's first token, as GLM's does, that token is predicted
            # too.
            ended = ids[turn.stop - 1] in ends or ids[turn.stop:turn.stop + 1] not in [[end] for end in ends]
            stop = turn.stop + (not ended)
            predicted[turn.start:stop] = [True] * (stop - turn.start)
        elif "reasoning_content" not in checked[i]:
            raise _otherwise(i)
    return ids, predicted


def told_of(tools: Any) -> dict[str, Any]:
    """The template's options for a row's tools: empty if there are none. Raises BadMessages."""
    return {"tools": check_tools(tools)} if tools else {}


class Turn(NamedTuple):
    """A conversation up to an answer: the model itself would write ids[start:stop]."""

    ids: list[int]
    start: int
    stop: int


def last_turn(checked: list[dict[str, Any]], tokenizer: Tokenizer, text: Conventions,
              told: dict[str, Any]) -> Turn:
    """Checked messages, of which the last is an answer, as rendered by the template.

    Args:
      told: `told_of` the row's tools.

    Raises BadMessages for an answer that it renders differently here than when the model is prompted for it.
    """
    ids, ends = _until(checked, tokenizer, text, told), text.ends or {tokenizer.eos}
    for options in (_reasoning(checked[-1]), {"thinking": False, "enable_thinking": False}):
        prompt = prompt_ids(checked[:-1], tokenizer, text.template, options | told)
        if ids[:len(prompt)] == prompt:
            break
        if "reasoning_content" in checked[-1] or text.template is None:
            raise _otherwise(len(checked) - 1)
    else:  # it reasons unless told not to, and if told to
        raise _otherwise(len(checked) - 1)
    # Text after the token that ends the answer, such as a line break, belongs to the template.
    last = next((k for k in range(len(prompt), len(ids)) if ids[k] in ends), len(ids) - 1)
    return Turn(ids, len(prompt), last + 1)


def check_template(tokenizer: Tokenizer, text: Conventions) -> None:
    """Raises ConfigError if there is neither a template nor role tokens to render a conversation."""
    if text.template is None and tokenizer.backend.token_to_id(ROLES["assistant"] or "") is None:
        raise ConfigError("conversations need a chat template; put a chat_template.jinja next to the tokenizer.json of "
                          "the run that init.from names.")


def _otherwise(i: int) -> BadMessages:
    return BadMessages(f"messages[{i}]", f"messages[{i}]: the chat template writes this answer otherwise in a "
                       "conversation than where the model is asked for it (it may drop or open reasoning); "
                       "give each answer a row that ends with it, in the form that the template expects.")


def _reasoning(answer: dict[str, Any]) -> dict[str, bool]:
    """Options that turn reasoning on, in both common spellings, for an answer that reasons."""
    return {"thinking": True, "enable_thinking": True} if "reasoning_content" in answer else {}


def _until(messages, tokenizer, text: Conventions, told) -> list[int]:
    """Ids of messages, of which the last is an answer, including its end."""
    if text.template is not None:
        return rendered_ids(messages, tokenizer, text.template,
                            _reasoning(messages[-1]) | told | {"add_generation_prompt": False})
    if told:
        raise BadMessages("tools", "tools need a chat template that knows them; leave them out.")
    check_plain(messages)
    return [*prompt_ids(messages[:-1], tokenizer, None, {}), *tokenizer.encode(messages[-1]["content"]), tokenizer.eos]
