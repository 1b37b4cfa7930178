"""tiktoken.model as a tokenizer.json: its ids equal those of tiktoken, which tests/golden/make_tiktoken.py stored."""

import base64
import json
import pathlib
import shutil

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.interop import ranks
from deepseek_jax.interop.convert import from_hf, to_hf
from tests.interop import checkpoints

GOLDEN = checkpoints.GOLDEN / "tiktoken"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FIRST = EXPECTED["ranks"]


@pytest.fixture
def source(tmp_path):
    """A checkpoint whose tokenizer is a tiktoken.model."""
    folder = pathlib.Path(checkpoints.changed(tmp_path / "src", "plain"))
    raw = checkpoints.config(folder) | {"vocab_size": EXPECTED["vocab_size"]}
    arrays = checkpoints.tensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = arrays[name].repeat(9, axis=0)
    shutil.rmtree(folder)
    checkpoints.write(folder, arrays, raw)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


def test_ids_are_those_of_tiktoken_and_text_comes_back(tmp_path):
    line = ranks.convert(str(GOLDEN), str(tmp_path), EXPECTED["vocab_size"])

    made = Tokenizer.load(str(tmp_path / "tokenizer.json"), EXPECTED["vocab_size"])
    assert [made.encode(text) for text in EXPECTED["texts"]] == EXPECTED["ids"]
    assert [made.decode(ids) for ids in EXPECTED["ids"]] == EXPECTED["texts"]
    assert line == f"{GOLDEN / 'tiktoken.model'} became a tokenizer.json of {EXPECTED['vocab_size']:,} ids."


def test_named_and_reserved_tokens_have_the_ids_after_the_ranks(tmp_path):
    ranks.convert(str(GOLDEN), str(tmp_path), EXPECTED["vocab_size"])

    made = Tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (made.bos, made.eos, made.pad, made.vocab_size) == (FIRST, FIRST + 1, FIRST + 5, EXPECTED["vocab_size"])
    assert made.backend.id_to_token(FIRST + 3) == f"<|reserved_token_{FIRST + 3}|>"
    assert made.encode_template("<|im_end|>") == [FIRST + 2] != made.encode("<|im_end|>")


def test_a_checkpoint_with_tiktoken_comes_in_and_goes_out_with_a_tokenizer_of_the_library(tmp_path, source):
    notes = from_hf(str(source), str(tmp_path / "run"))
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"))

    assert any("tiktoken.model became a tokenizer.json" in note for note in notes)
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config
    assert config["eos_token"] == "[EOS]"
    made = Tokenizer.load(str(tmp_path / "back" / "tokenizer.json"))
    assert made.encode(EXPECTED["texts"][1]) == EXPECTED["ids"][1]


LINES = (GOLDEN / "tiktoken.model").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(("lines", "words"), [
    ([*LINES[:5], b"QQ==\n"], "tiktoken.model, line 6: b'QQ==' is not a new token in base64 and the next rank, 5"),
    ([*LINES[:5], b"?? 5\n"], "line 6"), ([*LINES[:5], LINES[0]], "line 6"), ([*LINES[:5], LINES[6]], "line 6"),
    ([*LINES[:5], base64.b64encode(b"x" * 2000) + b" 5\n"], "line 6"), ([b"= 0\n"], "line 1"),
    ([b" 0\n"], "line 1"), ([b"\xff\x00 0\n"], "line 1"), (LINES[:9], "none of them the byte"), ([], "the byte 0"),
])
def test_a_damaged_vocabulary_is_one_line_and_leaves_nothing(tmp_path, source, lines, words):
    (source / "tiktoken.model").write_bytes(b"".join(lines))

    with pytest.raises(ConfigError) as error:
        from_hf(str(source), str(tmp_path / "run"))

    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(("config", "words"), [
    ("[]", "is not a JSON object"), ("{", "is not JSON"),
    ('{"added_tokens_decoder": [1]}', "added_tokens_decoder names"),
    ('{"added_tokens_decoder": {"5": {"content": "x"}}}', f"with an id from {FIRST:,} on"),
    ('{"added_tokens_decoder": {"99999": {"content": "x"}}}', "below vocab_size=720"),
    ('{"added_tokens_decoder": {"705": {"content": "\\ud800"}}}', "added_tokens_decoder names '705'"),
    ('{"added_tokens_decoder": {"705": {"content": 3}}}', "added_tokens_decoder names '705': {'content': 3}"),
    ('{"added_tokens_decoder": {"705": {"content": "<x>"}, "706": {"content": "<x>"}}}', "names 706 '<x>', which has"),
    ('{"added_tokens_decoder": {"705": {"content": "x"}}}', "names 705 'x', which has another id already"),
    ('{"added_tokens_decoder": {"705": {"content": "<|reserved_token_703|>"}}}', "which has another id already"),
])
def test_added_tokens_that_fit_no_model_are_one_line(tmp_path, source, config, words):
    (source / "tokenizer_config.json").write_text(config)

    with pytest.raises(ConfigError) as error:
        from_hf(str(source), str(tmp_path / "run"))

    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.glob("run*"))


def test_more_ranks_than_the_model_has_ids_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=f"has {FIRST:,} ids, more than vocab_size={FIRST - 1}"):
        ranks.convert(str(GOLDEN), str(tmp_path), FIRST - 1)
