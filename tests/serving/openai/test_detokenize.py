"""Streamed text, token by token: complete characters, the complete text, nothing of a stop string, and token names."""

import functools
import random
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.openai.answers import alternatives, named
from deepseek_jax.serving.openai.detokenize import TextStream
from deepseek_jax.serving.sequence import Token

SCRIPTS = {
    "Latin": "naïve façade — “quoted”",
    "Greek": "Καλημέρα κόσμε",
    "Cyrillic": "Съешь же ещё этих",
    "Hebrew": "שלום עולם",
    "Arabic": "مرحبا بالعالم",
    "Devanagari": "नमस्ते दुनिया",
    "Bengali": "ওহে বিশ্ব",
    "Tamil": "வணக்கம் உலகம்",
    "Thai": "สวัสดีชาวโลก",
    "Lao": "ສະບາຍດີ",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས",
    "Burmese": "မင်္ဂလာပါ",
    "Georgian": "გამარჯობა",
    "Armenian": "Բարեւ աշխարհ",
    "Amharic": "ሰላም ልዑል",
    "Khmer": "សួស្តី​ពិភពលោក",
    "Hangul": "안녕하세요 세계 값읽기",
    "Kana": "こんにちは世界",
    "Han": "你好，世界。龘",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f600 \U0001f1e9\U0001f1ea",
}
LETTERS = "".join(sorted(set("".join(SCRIPTS.values()))))


@functools.cache
def tokenizer(vocab_size):
    """A tokenizer with few merges, so that most of these scripts are streamed in parts of characters."""
    return train_tokenizer(list(SCRIPTS.values()) * 20, vocab_size)


def through(tokenizer, ids, stops=()):
    """The pieces of a stream, including the rest at its end."""
    stream = TextStream(tokenizer.bytes_of, stops)
    pieces = [stream.feed(i) for i in ids]
    return [*pieces, stream.flush()], stream.stopped


@pytest.mark.parametrize("vocab_size", [262, 280, 320, 400, 600])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pieces_of_every_script_are_its_text(script, vocab_size):
    here = tokenizer(vocab_size)
    pieces, stopped = through(here, here.encode(SCRIPTS[script]))
    assert "".join(pieces) == SCRIPTS[script] and not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [280, 5_000, 130_000])
def test_a_thousand_strings_come_out_as_they_went_in_over_vocabularies_of_every_size(vocab_size):
    rng = random.Random(0)
    letters = {script: sorted(set(text) - {" "}) for script, text in SCRIPTS.items()}
    word = lambda: "".join(rng.choices(rng.choice(list(letters.values())), k=rng.randint(1, 8)))
    here = train_tokenizer([" ".join(word() for _ in range(200)) for _ in range(1_000)], vocab_size)
    assert here.backend.get_vocab_size() == vocab_size
    whole = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    for _ in range(1_000):
        text = " ".join(rng.choice([word, whole, lambda: rng.choice(list(SCRIPTS.values()))])() for _ in range(9))
        ids = here.encode(text)
        pieces, _ = through(here, ids)
        assert "".join(pieces) == here.decode(ids) == text
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(st.text(alphabet=LETTERS, max_size=24), st.sampled_from([262, 300, 500]))
def test_any_text_comes_out_as_it_went_in(text, vocab_size):
    assert "".join(through(tokenizer(vocab_size), tokenizer(vocab_size).encode(text))[0]) == text


@given(st.lists(st.integers(0, 299), max_size=12))
def test_any_tokens_give_what_the_tokenizer_decodes(ids):
    assert "".join(through(tokenizer(300), ids)[0]) == tokenizer(300).decode(ids)


@given(st.text(alphabet="abé😀", max_size=24),
       st.lists(st.text(alphabet="abé😀", min_size=1, max_size=5), min_size=1, max_size=4))
@example("aaab", ["aab"])
@example("xabé", ["abé", "b"])
def test_a_text_ends_at_its_leftmost_stop_string(text, stops):
    found = [at for at in map(text.find, stops) if at >= 0]
    pieces, stopped = through(tokenizer(262), tokenizer(262).encode(text), tuple(stops))
    assert ("".join(pieces), stopped) == (text[:min(found)] if found else text, bool(found))


def test_long_stop_strings_cost_no_more_than_their_length():
    stops = tuple("a" * 200_000 + end for end in "bcde")  # each prefix is one of every suffix
    stream = TextStream(lambda token: b"a", stops)
    assert "".join(stream.feed(0) for _ in range(20_000)) == "" and stream.flush() == "a" * 20_000


def test_a_long_stop_string_costs_nothing_until_the_text_is_like_it():
    stops, start = tuple("a" * 20_000 + end for end in "bcde"), time.thread_time()
    streams = [TextStream(one_byte, stops) for _ in range(200)]
    assert "".join(stream.feed(ord("b")) for stream in streams) == "b" * 200
    assert time.thread_time() - start < 1  # preparing 16 million characters would take five seconds or more


def one_byte(token):
    return bytes([token])


def test_text_comes_in_whole_characters_and_without_any_part_of_a_stop_string():
    stream = TextStream(one_byte, ("STOP", "\n\n"))
    said = [stream.feed(b) for b in "naïve\nST☃O STOPPED".encode()]

    assert "".join(said) == "naïve\nST☃O " and stream.stopped
    assert all("\ufffd" not in part for part in said) and stream.flush() == ""


def test_a_token_begins_where_the_text_before_it_ends_whether_given_out_or_held_back():
    stream, text, offsets = TextStream(one_byte, ("STOP",)), "aSTé☃STx", []
    for byte in text.encode():
        offsets.append(stream.offset)
        stream.feed(byte)
    assert offsets == [text.index(c, i) for i, c in enumerate(text) for _ in c.encode()]


def test_text_held_back_for_a_stop_string_that_never_came_is_given_out_at_the_end():
    stream = TextStream(one_byte, ("STOP",))
    assert [stream.feed(b) for b in b"xSTO"] == ["x", "", "", ""] and stream.flush() == "STO"


def test_a_token_is_named_by_its_text_or_by_its_bytes():
    assert [named(b) for b in (b"ab", "é".encode(), "☃".encode()[:2], b"", b"\n")] == [
        "ab", "é", "bytes:\\xe2\\x98", "", "\n"]


def test_parts_of_characters_are_apart_and_the_drawn_token_is_there():
    spell = {0: b"\xe2", 1: b"\xe2\x98", 2: b"x", 3: b"x", 4: b"y"}.__getitem__
    found = alternatives(spell, Token(4, "none", -5.0, ((0, -0.1), (1, -0.2), (2, -0.3), (3, -0.4))), 4)
    assert found == {"bytes:\\xe2": -0.1, "bytes:\\xe2\\x98": -0.2, "x": -0.3, "token_id:3": -0.4, "y": -5.0}
    assert alternatives(spell, Token(0, "none", -0.1, ((0, -0.1), (1, -0.2))), 1) == {"bytes:\\xe2": -0.1}
