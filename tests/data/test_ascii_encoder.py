"""On one thread come the ids that the library gives."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from deepseek_jax.data.ascii_encoder import _Known, is_ours
from deepseek_jax.data.tokenizer import PATTERN, Tokenizer
from tests.data.conftest import make_text


def test_ids_are_the_librarys_for_any_ascii_text(trained):
    """Random texts over all 128 characters, over those that the pattern tells apart, and code."""
    rng = np.random.default_rng(0)
    alphabets = [[chr(i) for i in range(128)], list("aB1 2\t\n\r\x0b\x0c\x1c\x1f.,_ (\'"), list(" \n\r\t"),
                 list("a1 .\n")]
    texts = [make_text(i) for i in range(20)]
    for alphabet in alphabets:
        texts += ["".join(rng.choice(alphabet, n)) for n in rng.integers(0, 60, 3000)]
    texts += ["naïve ☃", "<|bos|> <|eos|>", ""]
    assert trained._ascii is not None
    assert trained.encode_on_one_thread(texts) == trained.encode_batch(texts)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("deepseek_jax.data.ascii_encoder._MOST", 3)
    known = _Known(lambda word: [len(word)])
    assert [known["a" * i] for i in range(8)] == [(i,) for i in range(8)] and len(known) <= 3


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
    assert Tokenizer(backend).encode_on_one_thread(texts) == Tokenizer(backend).encode_batch(texts)
