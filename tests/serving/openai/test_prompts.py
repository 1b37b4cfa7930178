"""Files of prompts: what is read, and the line that is named where it cannot be."""

import json

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.serving.openai.prompts import check_room, read_prompts


def written(folder, text, name="p.jsonl"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def test_a_text_file_holds_a_prompt_a_line_and_keeps_the_spaces_in_it(tmp_path):
    assert read_prompts(written(tmp_path, "\ufeff  a b \n\n\tc\r\n", "p.txt")) == ["  a b ", "\tc"]


def test_rows_of_json_are_texts_or_chats(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = json.dumps({"prompt": "a\nb", "id": 3}) + "\n" + json.dumps({"messages": messages})
    assert read_prompts(written(tmp_path, rows)) == ["a\nb", messages]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no prompt"), ("\n \n", "holds no prompt"), (b"\xff\n", "is not UTF-8"),
    ('{"prompt": "a"}\n\n{"prompt"', r"p.jsonl:3 is not JSON"), ("[]", r"p.jsonl:1 needs \"prompt\""),
    ('{"text": "a"}', r"needs \"prompt\""), ('{"prompt": 3}', r"needs \"prompt\""),
    ('{"prompt": []}', r"p.jsonl:1 needs"), ('{"messages": "a"}', r"p.jsonl:1: messages must be a list"),
    ('{"messages": [{"role": "user"}]}', r"p.jsonl:1: messages\[0\] needs a role"),
    ('{"prompt": "\\ud800"}', r"p.jsonl:1: holds half a character"),
    ('{"prompt": "a", "messages": []}', "not both")])
def test_what_is_no_prompt_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(written(tmp_path, text))


def test_prompt_and_answer_together_have_as_many_tokens_as_the_model_has_positions():
    check_room([[1], [1, 2, 3]], 5, 8)
    check_room([[1] * 100], 100, None)
    with pytest.raises(ConfigError, match="--max-new-tokens=6 exceed the 8 positions .* lower it to 5"):
        check_room([[1], [1, 2, 3]], 6, 8)
    with pytest.raises(ConfigError, match="a prompt of 8 tokens .* shorten the prompt"):
        check_room([[1] * 8], 1, 8)
