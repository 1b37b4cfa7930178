"""The encoder for one thread gives the ids of the library."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from deepseek_jax.data.ascii_encoder import STRETCH_PATTERN, _Known, is_ours
from deepseek_jax.data.tokenizer import PATTERN, Tokenizer
from tests.data.conftest import make_text


def on_one_thread(tokenizer, texts):
    return [list(ids) for ids in tokenizer.encode_on_one_thread(texts)]


def test_ids_are_the_librarys_for_any_ascii_text(trained):
    """Random texts of all 128 characters, of those that the pattern distinguishes, and code."""
    rng = np.random.default_rng(0)
    alphabets = [[chr(i) for i in range(128)], list("aB1 2\t\n\r\x0b\x0c\x1c\x1f.,_ (\'"), list(" \n\r\t"),
                 list("a1 .\n"), list("ab  .\n"), list("ab    1,.\n\x1c")]
    texts = [make_text(i) for i in range(20)]
    for alphabet in alphabets:
        texts += ["".join(rng.choice(alphabet, n)) for n in rng.integers(0, 60, 3000)]
    texts += ["naïve ☃", "<|bos|> <|eos|>", ""]
    assert trained._ascii is not None
    assert on_one_thread(trained, texts) == trained.encode_batch(texts)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("deepseek_jax.data.ascii_encoder._MOST", 3)
    known = _Known(lambda word: [len(word)])
    assert [np.frombuffer(known["a" * i], np.int32).tolist() for i in range(1, 9)] == [[i] for i in range(1, 9)]
    assert len(known) <= 3


def test_a_stretch_of_several_pre_tokens_is_looked_up_once(trained):
    asked = []
    known = _Known(lambda word: asked.append(word) or trained.encode(word))
    ids = known[" self.value(1234),"]
    assert asked == [" self", ".value", "(", "123", "4", "),"]
    assert known[" self.value(1234),"] is ids and len(asked) == 6
    assert STRETCH_PATTERN.findall("a self.value(1234), b  c") == ["a", " self.value(1234),", " b", " ", " c"]


@pytest.mark.parametrize("change", ["pattern", "normalizer", "token"])
def test_other_tokenizers_are_left_to_the_library(trained, change):
    backend = Backend.from_str(trained.backend.to_str())
    if change == "normalizer":
        from tokenizers.normalizers import NFC
        backend.normalizer = NFC()
    if change == "token":
        backend.add_tokens(["return"])
    assert not is_ours(backend, "other" if change == "pattern" else PATTERN)
    texts = [make_text(1)]
    assert on_one_thread(Tokenizer(backend), texts) == Tokenizer(backend).encode_batch(texts)
