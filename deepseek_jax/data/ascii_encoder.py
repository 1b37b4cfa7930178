"""Encodes ASCII text on one thread several times as fast as the `tokenizers` library: Python's `re` finds the
pre-tokens, and the library is called once for each distinct one. The ids of a pre-token, or of a run of pre-tokens, do
not depend on the text around it.

Both agree on letters, digits and spaces only for the first 128 characters; other text is left to the library.
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
# A run that ends before a single space is complete whatever follows: such a space can only be the first character of a
# pre-token. So a single look-up covers all of "(value),".
STRETCH_PATTERN = re.compile(rf" ?[^{_SPACE}]++(?= [^{_SPACE}])|{ASCII_PATTERN.pattern}")
_MOST, _LONGEST = 1 << 19, 64  # cached runs, and their characters: about 100 MB


class _Known(dict):
    """{run of pre-tokens: its ids as bytes of int32}; missing ones are computed by the library."""

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
    """encode: the library's function, for any text."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._known = _Known(encode)

    def __call__(self, text: str) -> np.ndarray:
        """The ids of an ASCII text, int32, without creating a Python object per id."""
        return np.frombuffer(b"".join(map(self._known.__getitem__, STRETCH_PATTERN.findall(text))), np.int32)


def is_ours(backend: Tokenizer, pattern: str) -> bool:
    """Whether a tokenizer only splits by this pattern and merges bytes; its markup does not occur in texts."""
    raw = json.loads(backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = (raw["pre_tokenizer"] or {}).get("pretokenizers", ())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return (raw["normalizer"] is None and raw["model"]["type"] == "BPE" and not raw["model"].get("dropout")
            and len(steps) == 2 and steps[0] == split and byte_level.items() <= steps[1].items()
            and all(token["special"] for token in raw["added_tokens"]))
