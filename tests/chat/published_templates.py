"""Compares the ids of chats with those of transformers, for chat templates that checkpoints are published with.

    python -m tests.chat.published_templates DIR

DIR has templates, NAME.jinja, and optionally encoding_dsv32.py, DeepSeek-V3.2's program in place of a template, with
which our own template is compared. None of them is part of this project. Needs transformers.
"""

import functools
import importlib.util
import itertools
import json
import pathlib
import re
import sys
import tempfile

from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from deepseek_jax.chat import template as chat_template
from deepseek_jax.chat.messages import chat_ids, check_messages, prompt_ids
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer

MARKUP = re.compile(r"<[｜|][^<>'\"]+[｜|]>|<think>|</think>|\[gMASK\]|<sop>|\[BOS\]")
SAY = lambda *texts: [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts)]
CHATS = {
    "one question": SAY("Why is the sky blue?"),
    "several turns": SAY("hi", "hello", "and\n\nnow?", "  spaces  ", "x = 12345;"),
    "a system prompt": [{"role": "system", "content": "Be brief.\n"}, *SAY("안녕 {{ x }}", "{% y %}", "ü")],
    "two system prompts": [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, *SAY("go")],
    "reasoning in a former answer": SAY("1 + 1", "<think>\nsimple\n</think>\n\n2", "and 2 + 2?"),
    "an answer last": SAY("say", "<think>why</think>said"),
}
TEXT = '{"a": 1}'
OPTIONS = ({}, {"thinking": True}, {"thinking": False}, {"enable_thinking": True}, {"enable_thinking": False})
TOOL = {"type": "function", "function": {"name": "add", "description": "ü < 1", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}}}


def calling(content: str, arguments: str | dict) -> list[dict]:
    """A chat in which a tool was called and returned a result."""
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [*SAY("1 + 1"), {"role": "assistant", "content": content, "tool_calls": [call, call]},
            *({"role": "tool", "tool_call_id": call["id"], "content": text} for text in ("2", "ü {{ x }}"))]


def reasoned(why: str) -> dict[str, list[dict[str, str]]]:
    """Chats for templates with a separate field for reasoning; `why`: the reasoning of answers before the last
    question.
    """
    return {
        "reasoning in earlier answers": [m | {"reasoning_content": why} if m["role"] == "assistant" else m
                                         for m in SAY("1 + 1", "2", "and 2 + 2?", "4", "so?")],
        "an answer last, with reasoning": [*SAY("1 + 1"),
                                           {"role": "assistant", "content": "2", "reasoning_content": "x"}],
        "questions in a row": [{"role": "user", "content": text} for text in ("a", "", "b")],
        "a system prompt late": [*SAY("a", "b"), {"role": "system", "content": "Now brief."}, *SAY("c")],
        "an empty system prompt": [{"role": "system", "content": ""}, *SAY("a")],
    }


def tokenizer_of(source: str) -> Tokenizer:
    """A small tokenizer with the markup that occurs in a template or in the program."""
    backend = Backend.from_str(train_tokenizer(["some text"] * 3, 262).backend.to_str())
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(set(MARKUP.findall(source)))])
    return Tokenizer(backend)


def of_templates(path: pathlib.Path):
    """Chats of a template: (name, ours, theirs), each as ids or the exception; and the tokenizer."""
    source = path.read_text(encoding="utf-8")
    ours = tokenizer_of(source)
    bos, eos = (ours.backend.id_to_token(token) for token in (ours.bos, ours.eos))
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.backend, bos_token=bos, eos_token=eos, chat_template=source)
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "chat_template.jinja").write_text(source, encoding="utf-8")
        template = chat_template.read(folder, bos, eos)
    knows = lambda name: re.search(rf"\b{name}\b", source) is not None
    for name, chat in (CHATS | (reasoned("hm,\n\nwell ") if knows("reasoning_content") else {})).items():
        for options in (*OPTIONS, *([{"clear_thinking": False}] if knows("clear_thinking") else ()),
                        *([{"tools": [TOOL]}] if knows("tools") else ())):
            wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **options)
            yield f"{name}, {options}", ours, chat_ids(chat, ours, template, options), wanted
    for given in itertools.product(("", "so"), (TEXT, {"a": 1, "b": "<x>"})) if knows("tool_calls") else ():
        for options in ({}, *([{"tools": [TOOL]}] if knows("tools") else ())):
            chat = calling(*given)
            render = functools.partial(outcome, theirs.apply_chat_template, add_generation_prompt=True,
                                       return_dict=False, **options)
            wanted = render(chat)
            if given[1] == TEXT and wanted != "refused" and TEXT not in theirs.decode(wanted):
                wanted = render(calling(given[0], json.loads(TEXT)))  # the template needs it as an object
            found = outcome(prompt_ids, check_messages(chat, calls=True), ours, template, options)
            yield f"tools called with {given}, {options}", ours, found, wanted


def of_program(path: pathlib.Path):
    """The same for DeepSeek-V3.2's program; chats that it refuses must be refused here too."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    ours = tokenizer_of(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
        ours.save(f"{folder}/tokenizer.json")
        names = {"bos_token": program.bos_token, "eos_token": program.eos_token}
        pathlib.Path(folder, "tokenizer_config.json").write_text(json.dumps(names))
        template = chat_template.of_folder(folder, ours).template
    # The program encodes markup in messages as special tokens, so chats here have it only in reasoning, which is
    # dropped.
    parse = lambda encode, chat, mode: ours.encode_template(encode(chat, thinking_mode=mode))
    for name, chat in (CHATS | reasoned("hm </think> <｜User｜>")).items():
        for options in OPTIONS:
            mode = "thinking" if any(options.values()) else "chat"
            yield (f"{name}, {options}", ours, outcome(chat_ids, chat, ours, template, options),
                   outcome(parse, program.encode_messages, chat, mode))


def outcome(work, *args, **options):
    """Ids, or "refused"."""
    try:
        return work(*args, **options)
    except (AssertionError, TypeError, ValueError, TemplateError):
        return "refused"


def main() -> None:
    compared = different = 0
    folder = pathlib.Path(sys.argv[1])
    for path in [*sorted(folder.glob("*.jinja")), *folder.glob("encoding_dsv32.py")]:
        before = compared, different
        for name, ours, found, wanted in (of_templates if path.suffix == ".jinja" else of_program)(path):
            compared += 1
            if found != wanted:
                different += 1
                shown = (ids if ids == "refused" else repr(ours.decode(ids, specials=True)) for ids in (found, wanted))
                print(f"{path.name}, {name}:", *shown, sep="\n  ")
        print(f"{path.name}: {different - before[1]} of {compared - before[0]} chats differ.")
    print(f"{different} of {compared} chats differ.")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
