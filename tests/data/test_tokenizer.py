"""The tokenizer restores every byte, is the same for the same text, and knows both spellings of its special tokens."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import SPECIALS, Tokenizer, split_tokens, train_tokenizer

STRANGE = "naïve ☃ 𝕏\r\n\n\t  x == 12345:\n        return  # ﷽ <|eos|>\x00"


def test_text_comes_back_byte_for_byte(trained):
    assert trained.decode(trained.encode(STRANGE)) == STRANGE


@given(text=st.text())
def test_byte_lengths_add_up_to_any_text(trained, text):
    assert trained.byte_lengths_W[trained.encode(text)].sum() == len(text.encode())


def test_special_tokens_have_the_first_ids_and_no_bytes(trained):
    assert (trained.bos, trained.eos, trained.pad) == (0, 1, 2)
    assert (trained.fim_begin, trained.fim_hole, trained.fim_end) == (3, 4, 5)
    assert not trained.byte_lengths_W[:6].any() and trained.byte_lengths_W[6:].all()
    assert trained.decode([0, *trained.encode("x"), 1]) == "x"
    assert trained.decode([0, *trained.encode("x"), 1], specials=True) == "<|bos|>x<|eos|>"


def test_text_never_becomes_a_special_token(trained):
    assert min(trained.encode("<|bos|><|eos|><|fim_hole|>")) > 5


@pytest.mark.parametrize("text, pieces", [
    ("f(x):\n\ny", ["f", "(x", "):\n\n", "y"]),
    ("12345", ["123", "45"]),
    ("\n        return x", ["\n", "       ", " return", " x"]),
    ("a_b", ["a", "_b"]),
])
def test_text_falls_into_pieces_as_in_the_report(trained, text, pieces):
    pre = trained.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in pre] == pieces


def test_the_same_corpus_trains_the_same_bytes(tmp_path):
    code = """if True:
        import sys
        from deepseek_jax.data.tokenizer import train_tokenizer
        train_tokenizer(("alpha beta_%d gamma(%d):\\n" % (i % 37, i % 11) for i in range(3000)), 500).save(sys.argv[1])
    """
    for i, threads in enumerate("12"):
        subprocess.run([sys.executable, "-c", code, tmp_path / f"{i}.json"], check=True,
                       env={**os.environ, "PYTHONHASHSEED": str(i), "RAYON_NUM_THREADS": threads})
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_a_small_corpus_yields_fewer_tokens_than_asked_for():
    small = train_tokenizer(["aaaa"], 8192)
    assert 262 < small.vocab_size < 270


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path, trained):
    trained.save(str(tmp_path / "deep" / "tokenizer.json"))
    again = Tokenizer.load(str(tmp_path / "deep" / "tokenizer.json"), 400)
    assert again.digest == trained.digest
    assert os.listdir(tmp_path / "deep") == ["tokenizer.json"]


def with_specials(names):
    """Byte-level BPE without merges, with other special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(names))
    return backend


def test_deepseeks_spelling_of_special_tokens_is_known(tmp_path):
    with_specials(spellings[1] for spellings in SPECIALS.values()).save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(str(tmp_path / "t.json"))
    assert [getattr(tokenizer, role) for role in SPECIALS] == [256, 257, 258, 259, 260, 261]
    assert tokenizer.has_fim
    assert min(tokenizer.encode("<｜begin▁of▁sentence｜>")) < 256 and tokenizer.vocab_size == 262


def test_a_tokenizer_may_lack_fim_and_padding():
    tokenizer = Tokenizer(with_specials(["<|bos|>", "<|eos|>", "<|other|>"]))
    assert not tokenizer.has_fim and tokenizer.pad is None
    assert tokenizer.byte_lengths_W[256:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("make, vocab_size, message", [
    (lambda p: None, 400, "there is no"),
    (lambda p: p.write_text("{}"), 400, "is no tokenizer.json"),
    (lambda p: with_specials(["<|bos|>"]).save(str(p)), 400, r"has no <\|eos\|>"),
    (lambda p: with_specials(["<|bos|>", "<|eos|>"]).save(str(p)), 200, "258 ids, more than model.vocab_size=200; "
                                                                        "set model.vocab_size=384"),
])
def test_a_tokenizer_that_does_not_fit_is_a_config_error(tmp_path, make, vocab_size, message):
    make(tmp_path / "t.json")
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(str(tmp_path / "t.json"), vocab_size)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_changes_text_is_a_config_error(tmp_path):
    backend = with_specials(["<|bos|>", "<|eos|>"])
    backend.normalizer = tokenizers.normalizers.NFKD()
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="byte for byte"):
        Tokenizer.load(str(tmp_path / "t.json"))


def test_a_vocabulary_below_the_bytes_is_a_config_error():
    with pytest.raises(ConfigError, match="too small"):
        train_tokenizer(["abc"], 261)


def splittable(tokenizer, ids):
    return (tokenizer.splits[0][np.array(ids)] > 0).sum()


def test_only_punctuation_with_line_breaks_can_be_split(trained):
    count_W, start_W, parts = trained.splits
    found = {trained.decode([i]): [trained.decode([j]) for j in parts[start_W[i]:start_W[i] + count_W[i]]]
             for i in np.flatnonzero(count_W)}
    assert found["):\n"] == ["):", "\n"]
    assert all(text.endswith("\n") and not text.strip().isalnum() and text.strip() for text in found)


def test_splitting_keeps_the_text_and_leaves_the_rest_alone(trained, texts):
    ids = np.array(trained.encode(texts[0]))
    new, origin = split_tokens(ids, trained.splits, 1.0, np.random.default_rng(0))
    assert trained.decode(new) == texts[0]
    assert splittable(trained, ids) == 40 and splittable(trained, new) == 0
    kept = trained.splits[0][ids[origin]] == 0
    assert (new[kept] == ids[origin][kept]).all() and (np.diff(origin) >= 0).all()


def test_splitting_never_tears_a_character():
    text = "☃\n♃\n⚃\n" * 50  # whose last byte and line break are the commonest pair
    tokenizer = train_tokenizer([text], 264)
    ids = np.array(tokenizer.encode(text))
    assert any("\ufffd\n" == tokenizer.decode([i]) for i in ids)
    new, _ = split_tokens(ids, tokenizer.splits, 1.0, np.random.default_rng(0))
    assert tokenizer.decode(new) == text


def test_splitting_has_its_rate(trained, texts):
    ids = np.tile(trained.encode(texts[0]), 100)
    new, _ = split_tokens(ids, trained.splits, 0.1, np.random.default_rng(0))
    assert 0.87 < splittable(trained, new) / splittable(trained, ids) < 0.93


def test_truncation_and_padding_of_a_file_change_no_document(tmp_path, trained):
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded, texts = Tokenizer.load(str(tmp_path / "tokenizer.json")), ["a b c d e f g h\n" * 9, "x"]
    assert loaded.encode_batch(texts) == trained.encode_batch(texts) == [loaded.encode(text) for text in texts]
    assert loaded.digest == trained.digest
