"""Compares the ids of chats with those of transformers, for chat templates that checkpoints are published with.

    python -m tests.chat.published_templates DIR

DIR has templates, NAME.jinja, which are not part of this project. Needs transformers.
"""

import pathlib
import re
import sys
import tempfile

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from deepseek_jax.chat import template as chat_template
from deepseek_jax.chat.messages import chat_ids
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
OPTIONS = ({}, {"thinking": True}, {"thinking": False}, {"enable_thinking": True}, {"enable_thinking": False})


def main() -> None:
    compared = different = 0
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        backend = Backend.from_str(train_tokenizer(["some text"] * 3, 262).backend.to_str())
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(set(MARKUP.findall(source)))])
        ours = Tokenizer(backend)
        bos, eos = (backend.id_to_token(token) for token in (ours.bos, ours.eos))
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=source)
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "chat_template.jinja").write_text(source, encoding="utf-8")
            template = chat_template.read(folder, bos, eos)
        for name, chat in CHATS.items():
            for options in OPTIONS:
                wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **options)
                found = chat_ids(chat, ours, template, options)
                compared += 1
                if found != wanted:
                    different += 1
                    print(f"{path.name}, {name}, {options}:\n  {ours.decode(found, specials=True)!r}\n"
                          f"  {ours.decode(wanted, specials=True)!r}")
    print(f"{different} of {compared} chats differ.")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
