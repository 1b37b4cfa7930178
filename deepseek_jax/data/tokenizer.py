"""Byte-level BPE (report section 4.1): trained on the corpus at hand, or given as a tokenizer.json.

Pre-tokens follow the report: words with the character before them, digits in groups of at most three, punctuation
together with the line breaks after it. The last saves tokens but biases the model where a prompt ends between the
two ("token boundary bias"), so in training a share of such tokens is split at random: `split_tokens`.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError
from deepseek_jax.config.model import MOST
from deepseek_jax.data.ascii_encoder import AsciiEncoder, is_ours

# Files of a Hugging Face checkpoint that say how to use its tokenizer; they are copied with it.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
# A word, three digits, punctuation with line breaks, line breaks, indentation up to the word, other white space.
PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_PUNCTUATION_AND_BREAK = re.compile(r"( ?(?:[^\s\w]|_)+)([\r\n]+)")

# Role -> spellings: ours first (in the order of their ids), then DeepSeek's with full-width bars.
SPECIALS = {"bos": ("<|bos|>", "<｜begin▁of▁sentence｜>"),
            "eos": ("<|eos|>", "<｜end▁of▁sentence｜>"),
            "pad": ("<|pad|>", "<｜▁pad▁｜>"),
            "fim_begin": ("<|fim_begin|>", "<｜fim▁begin｜>"),
            "fim_hole": ("<|fim_hole|>", "<｜fim▁hole｜>"),
            "fim_end": ("<|fim_end|>", "<｜fim▁end｜>")}
# Those of other publishers (Kimi, GLM, GigaChat), if none of the above exists.
_OTHERS = {"bos": ("[BOS]", "[gMASK]", "<s>"), "eos": ("[EOS]", "<|endoftext|>", "</s>"), "pad": ("[PAD]",)}

# The alphabet of byte-level BPE: bytes that print stand for themselves, the others for characters from 256 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))}


_PROBE = "naïve ☃:\n\n\tx = 12345  # \r\n"
_MOST_IDS = MOST["vocab_size"]  # tables have an entry for each id, and a damaged file can contain any id

# Markup of chat templates for roles, turns and tools, whether or not tokenizer.json marks it as special.
_MARKUP = re.compile(r"<.+>|\[[A-Za-z_]+\]")


class Tokenizer:
    """Text to ids and back. Ids of special tokens are attributes, None where the tokenizer has none.

    Text is never parsed into special tokens or other markup; those are inserted as ids, or come from a chat template
    (`encode_template`).
    """

    bos: int
    eos: int
    pad: int | None
    fim_begin: int | None
    fim_hole: int | None
    fim_end: int | None

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()  # some are saved with the length limit of a fine-tuned model
        self.backend.no_padding()
        for role, spellings in SPECIALS.items():
            found = (backend.token_to_id(s) for s in (*spellings, *_OTHERS.get(role, ())))
            setattr(self, role, next((i for i in found if i is not None), None))
        if self.bos is None or self.eos is None:
            missing = " or ".join(SPECIALS["bos" if self.bos is None else "eos"])
            raise ConfigError(f"the tokenizer has no {missing}; add it as a special token.")
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        if self.vocab_size > _MOST_IDS:
            raise ConfigError(f"the tokenizer has an id of {self.vocab_size - 1:,}, and {_MOST_IDS:,} is the most that "
                              "a model may have.")

    @classmethod
    def load(cls, path: str, vocab_size: int | None = None) -> Tokenizer:
        """Reads a tokenizer.json. Raises ConfigError where it does not fit a model of `vocab_size` tokens."""
        if not storage.exists(path):
            raise ConfigError(f"there is no {path}; give a run's folder or a checkpoint's, which holds one.")
        try:
            with io.open_regular(path) as f:
                data = f.read().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_buffer(data))
            exact = tokenizer._is_exact()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except BaseException as error:  # the library raises no narrower class, and a Rust panic is not an Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ConfigError(f"{path} is no tokenizer.json of the `tokenizers` library: "
                                  f"{str(error)[:200]}") from None
            raise
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise ConfigError(f"{path} has {tokenizer.vocab_size} ids, more than model.vocab_size={vocab_size}; "
                              f"set model.vocab_size={-(-tokenizer.vocab_size // 128) * 128}.")
        if not exact:
            raise ConfigError(f"{path} does not give text back byte for byte; take a byte-level BPE.")
        return tokenizer

    def save(self, path: str) -> None:
        """Writes tokenizer.json."""
        storage.make_folder(os.path.dirname(storage.absolute(path)))
        io.write_text(path, self.backend.to_str(pretty=True))

    def _is_exact(self):
        """Whether a text is restored byte for byte."""
        ids = self.encode(_PROBE)
        return self.decode(ids) == _PROBE and self.byte_lengths_W[ids].sum() == len(_PROBE.encode())

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_on_one_thread(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The same as `encode_batch`, for processes with one core each."""
        if self._ascii is None:
            return self.encode_batch(texts)
        return [self._ascii(text) if text.isascii() else self.encode(text) for text in texts]

    @functools.cached_property
    def _ascii(self):
        return AsciiEncoder(self.encode) if is_ours(self.backend, PATTERN) else None

    def encode_template(self, text: str) -> list[int]:
        """Encodes the output of a chat template: markup becomes the ids of its tokens, as in transformers."""
        return self._marked.encode(text, add_special_tokens=False).ids

    def markup(self) -> dict[str, int]:
        """{spelling: id} of the tokens that text is never parsed into."""
        return self._markup

    @functools.cached_property
    def _markup(self):
        added = self.backend.get_added_tokens_decoder()
        return {t.content: i for i, t in added.items() if t.special or _MARKUP.fullmatch(t.content)}

    @functools.cached_property
    def _plain(self):
        """The backend with all markup as special tokens, whose spellings in text it does not parse."""
        raw = json.loads(self.backend.to_str())
        missed = [t for t in raw["added_tokens"] if not t["special"] and t["content"] in self._markup]
        if not missed:
            return self.backend
        for token in missed:
            token["special"] = True
        plain = tokenizers.Tokenizer.from_str(json.dumps(raw))
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _marked(self):
        return tokenizers.Tokenizer.from_str(self.backend.to_str())  # it parses all markup that its file lists

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of `ids`; special tokens are spelled out only if `specials`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not specials)

    @property
    def has_fim(self) -> bool:
        return None not in (self.fim_begin, self.fim_hole, self.fim_end)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @functools.cached_property
    def _spellings(self):
        added = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items()}
        spellings = [b""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            # The byte-level alphabet spells every byte as one character; a token with other characters is plain text.
            plain = i in added or not all(character in BYTE_OF for character in token)
            spellings[i] = added.get(i, token).encode() if plain else bytes(BYTE_OF[character] for character in token)
        return spellings

    @functools.cached_property
    def specials(self) -> frozenset[int]:
        """The tokens that do not stand for text."""
        added = self.backend.get_added_tokens_decoder()
        roles = {getattr(self, role) for role in SPECIALS} - {None}
        return frozenset(roles | {i for i, token in added.items() if token.special})

    def spelling(self, token: int) -> bytes:
        """The UTF-8 bytes of a token's spelling, including special tokens; b"" for an id without a token."""
        return self._spellings[token] if token < self.vocab_size else b""  # a model's vocabulary may be padded

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text: its spelling, and nothing if it is special."""
        return b"" if token in self.specials else self.spelling(token)

    @functools.cached_property
    def byte_lengths_W(self) -> np.ndarray:
        """int32: UTF-8 bytes each token stands for; 0 for special tokens. Sums to the bytes of any encoded text."""
        return np.array([len(self.bytes_of(i)) for i in range(self.vocab_size)], np.int32)

    def longest(self) -> int:
        """Bytes of the longest token: a text of n tokens has at most n times as many."""
        return max(1, int(self.byte_lengths_W.max()))

    @functools.cached_property
    def splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens that join punctuation and line breaks, as a table: (count_W, start_W, parts).

        Token i with count_W[i] > 0 may be written as parts[start_W[i]:start_W[i] + count_W[i]] instead.
        """
        count_W, start_W = np.zeros((2, self.vocab_size), np.int64)
        parts = []
        added = self.backend.get_added_tokens_decoder()
        for i in sorted(set(self.backend.get_vocab(with_added_tokens=False).values()) - set(added)):
            text = self.decode([i])
            match = _PUNCTUATION_AND_BREAK.fullmatch(text)
            if match and "\ufffd" not in text:  # this stands for bytes that are not a complete character
                ids = self.encode(match[1]) + self.encode(match[2])
                count_W[i], start_W[i] = len(ids), len(parts)
                parts += ids
        return count_W, start_W, np.array(parts, np.int64)


def split_tokens(ids_T: np.ndarray, splits: Any, rate: float,
                 rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each splittable token, with probability `rate`, by its parts (report section 4.1).

    Args:
      splits: `Tokenizer.splits`.

    Returns:
      the new ids, and for each the index in `ids_T` that it came from.
    """
    count_W, start_W, parts = splits
    chosen_T = (count_W[ids_T] > 0) & (rng.random(len(ids_T)) < rate)
    lengths_T = np.where(chosen_T, count_W[ids_T], 1)
    origin_S = np.repeat(np.arange(len(ids_T)), lengths_T)
    within_S = np.arange(len(origin_S)) - (np.cumsum(lengths_T) - lengths_T)[origin_S]
    ids_S = ids_T[origin_S]
    changed_S = chosen_T[origin_S]
    ids_S[changed_S] = parts[(start_W[ids_S] + within_S)[changed_S]]
    return ids_S, origin_S


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (fewer from a small corpus). The same texts give the same bytes."""
    specials = [spellings[0] for spellings in SPECIALS.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(specials) + len(alphabet):
        raise ConfigError(f"model.vocab_size={vocab_size} is too small: byte-level BPE starts from "
                          f"{len(alphabet)} bytes and {len(specials)} special tokens.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False))
    return Tokenizer(backend)
