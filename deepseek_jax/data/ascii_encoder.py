"""Our own tokenizer on one thread, several times as fast as its library: pre-tokens of ASCII text are found by
Python's `re`, and the library is asked for each pre-token once. A pre-token's ids depend on nothing around it.

The two know the same letters, digits and spaces among the first 128 characters only; other text is left to the library.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

_SPACE = r"\t-\r "  # \s without the four separators that Python adds
# tokenizer.PATTERN, for ASCII.
ASCII_PATTERN = re.compile(
    rf"[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{{1,3}}| ?[^{_SPACE}a-zA-Z0-9]+[\r\n]*|[{_SPACE}]*[\r\n]+"
    rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+")
_MOST, _LONGEST = 1 << 19, 64  # pre-tokens that are remembered, and their characters: about 100 MB


class _Known(dict):
    """{pre-token: ids}, asking for those that are missing."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(word))
        if len(self) >= _MOST:
            self.clear()
        if len(word) <= _LONGEST:
            self[word] = ids
        return ids


class AsciiEncoder:
    """encode: the library's, of any text."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._known = _Known(encode)

    def __call__(self, text: str) -> list[int]:
        """The ids of an ASCII text."""
        return list(itertools.chain.from_iterable(map(self._known.__getitem__, ASCII_PATTERN.findall(text))))


def is_ours(backend: Tokenizer, pattern: str) -> bool:
    """Whether a tokenizer does nothing but split by this pattern and merge bytes; its markup is no part of texts."""
    raw = json.loads(backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = (raw["pre_tokenizer"] or {}).get("pretokenizers", ())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (raw["normalizer"] is None and raw["model"]["type"] == "BPE" and not raw["model"].get("dropout")
            and len(steps) == 2 and steps[0] == split and byte_level.items() <= steps[1].items()
            and all(token["special"] for token in raw["added_tokens"]))
