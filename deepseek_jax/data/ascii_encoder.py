"""Our own tokenizer on one thread, several times as fast as its library: pre-tokens of ASCII text are found by
Python's `re`, and the library is asked for each pre-token once. A pre-token's ids depend on nothing around it, nor do
those of a stretch of pre-tokens.

The two know the same letters, digits and spaces among the first 128 characters only; other text is left to the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

_SPACE = r"\t-\r "  # \s without the four separators that Python adds
# tokenizer.PATTERN, for ASCII.
ASCII_PATTERN = re.compile(
    rf"[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{{1,3}}| ?[^{_SPACE}a-zA-Z0-9]+[\r\n]*|[{_SPACE}]*[\r\n]+"
    rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+")
# What ends before a single space is complete whatever follows: no pre-token has such a space other than as its
# first character. So one look-up takes all of "(value)," at once.
STRETCH_PATTERN = re.compile(rf" ?[^{_SPACE}]++(?= [^{_SPACE}])|{ASCII_PATTERN.pattern}")
_MOST, _LONGEST = 1 << 19, 64  # stretches that are remembered, and their characters: about 100 MB


class _Known(dict):
    """{stretch of pre-tokens: its ids as bytes of int32}, asking for those that are missing."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> bytes:
        parts = ASCII_PATTERN.findall(text)
        ids = (np.array(self._encode(text), np.int32).tobytes() if len(parts) == 1
               else b"".join(map(self.__getitem__, parts)))
        if len(self) >= _MOST:
            self.clear()
        if len(text) <= _LONGEST:
            self[text] = ids
        return ids


class AsciiEncoder:
    """encode: the library's, of any text."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._known = _Known(encode)

    def __call__(self, text: str) -> np.ndarray:
        """The ids of an ASCII text, int32; no number of them becomes an object of Python."""
        return np.frombuffer(b"".join(map(self._known.__getitem__, STRETCH_PATTERN.findall(text))), np.int32)


def is_ours(backend: Tokenizer, pattern: str) -> bool:
    """Whether a tokenizer does nothing but split by this pattern and merge bytes; its markup is no part of texts."""
    raw = json.loads(backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = (raw["pre_tokenizer"] or {}).get("pretokenizers", ())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (raw["normalizer"] is None and raw["model"]["type"] == "BPE" and not raw["model"].get("dropout")
            and len(steps) == 2 and steps[0] == split and byte_level.items() <= steps[1].items()
            and all(token["special"] for token in raw["added_tokens"]))
