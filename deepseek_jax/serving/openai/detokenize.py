"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable

LONGEST_CHARACTER = 4  # bytes of UTF-8; so many tokens without a whole character are no text at all


class TextStream:
    """Text of a growing sequence.

    Args:
      decode: ids to text, byte-level: what stands for half a character ends in U+FFFD.
      stops: strings that end the text; none of them, nor anything behind it, is given out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()):
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._held = ""
        self._given = 0  # characters
        self.stopped = False

    @property
    def offset(self) -> int:
        """Where in the text the next token begins: behind what was given out and what is held back."""
        return self._given + len(self._held)

    def feed(self, token: int) -> str:
        """The text that this token settles; sets `stopped` if a stop string is complete."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < LONGEST_CHARACTER:
            return ""
        self._ids.clear()
        return self._settle(self._held + text)

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._held + (self._decode(self._ids) if self._ids else "")
        self._ids.clear()
        out = self._settle(text)
        if not self.stopped:
            out, self._held, self._given = out + self._held, "", self._given + len(self._held)
        return out

    def _settle(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            self._given += min(found)
            return text[:min(found)]
        # The longest end that may be the beginning of a stop string waits.
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        self._given += cut
        return text[:cut]
