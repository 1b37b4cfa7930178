"""Tokens to text as they come: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_CHARACTER = 4  # bytes of UTF-8; as many tokens without a complete character are not text


class TextStream:
    """Text of a growing sequence.

    Args:
      decode: ids to text, byte-level: an incomplete character becomes U+FFFD.
      stops: strings that end the text; neither they nor anything after them is returned.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()):
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._pending = ""  # may be the beginning of a stop string
        self._emitted = 0  # characters returned
        self.stopped = False

    @property
    def offset(self) -> int:
        """Where in the text the next token begins: after what was returned and what is held back."""
        return self._emitted + len(self._pending)

    def feed(self, token: int) -> str:
        """The text that this token completes; sets `stopped` if a stop string is complete."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < LONGEST_CHARACTER:
            return ""
        self._ids.clear()
        return self._settle(self._pending + text)

    def flush(self) -> str:
        """At the end: the text that was held back."""
        text = self._pending + (self._decode(self._ids) if self._ids else "")
        self._ids.clear()
        out = self._settle(text)
        if not self.stopped:
            out, self._pending, self._emitted = out + self._pending, "", self._emitted + len(self._pending)
        return out

    def _settle(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._pending = True, ""
            self._emitted += min(found)
            return text[:min(found)]
        # The longest suffix that may be the beginning of a stop string is held back.
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = len(text) - keep
        self._pending = text[cut:]
        self._emitted += cut
        return text[:cut]
