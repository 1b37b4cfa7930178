"""Incremental detokenization: only complete characters, no part of a stop string, reasoning separate from the
answer."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Text of a growing sequence: the pieces joined are the text of all tokens, up to the leftmost stop string.

    Args:
      bytes_of: the UTF-8 bytes of a token, possibly part of a character; invalid bytes become U+FFFD.
      stops: strings that end the text; neither they nor anything after them is returned.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], stops: tuple[str, ...] = ()):
        self._bytes_of, self._stops = bytes_of, [_Stop(stop) for stop in stops]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""  # may be the beginning of a stop string
        self._emitted = 0  # characters returned
        self._found: int | None = None  # where the leftmost complete stop string begins
        self.stopped = False

    @property
    def offset(self) -> int:
        """The offset in the text at which the next token begins: after the returned and the held-back text."""
        return self._emitted + len(self._pending)

    def feed(self, token: int) -> str:
        """The text that this token completes; sets `stopped` if a stop string is complete."""
        return "" if self.stopped else self._add(self._decoder.decode(self._bytes_of(token)))

    def flush(self) -> str:
        """The text that was held back; called at the end."""
        if self.stopped:
            return ""
        out = self._add(self._decoder.decode(b"", final=True))
        if self.stopped:
            return out
        self.stopped = self._found is not None
        return out + self._return(self.offset if self._found is None else self._found)

    def _add(self, text: str) -> str:
        end = self.offset
        self._pending += text
        for character in text:
            end += 1
            found = [end - len(stop.text) for stop in self._stops if stop.read(character)]
            if found:
                self._found = min(found if self._found is None else [*found, self._found])
            if self._found is not None and all(end - stop.matched >= self._found for stop in self._stops):
                self.stopped = True  # no stop string can begin further left
                out = self._return(self._found)
                self._pending = ""
                return out
        # The longest suffix that may be the beginning of a stop string is held back.
        held = end - max((stop.matched for stop in self._stops), default=0)
        return self._return(held if self._found is None else min(held, self._found))

    def _return(self, end: int) -> str:
        cut = end - self._emitted
        out, self._pending, self._emitted = self._pending[:cut], self._pending[cut:], end
        return out


class AnswerStream:
    """Text of an answer, and of the reasoning in it, each up to its own leftmost stop string.

    Args:
      bytes_of, stops: as in TextStream.
      marks: the tokens that open and close reasoning, which are part of neither text; None: there is no reasoning.
      prompt: of the answer; its last mark decides whether the answer begins with reasoning.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], stops: tuple[str, ...] = (),
                 marks: tuple[int, int] | None = None, prompt: Sequence[int] = ()):
        self._texts = [TextStream(bytes_of, stops) for _ in range(2)]  # of the answer, of the reasoning
        self._marks = marks or (-1, -1)
        self.reasons = next((token == self._marks[0] for token in reversed(prompt) if token in self._marks), False)

    def feed(self, token: int) -> tuple[str, int, bool]:
        """The text that this token completes, the offset at which it begins, and whether that is reasoning."""
        reasons, stream = self.reasons, self._texts[self.reasons]
        offset, marks = stream.offset, token in self._marks
        text = stream.flush() if marks else stream.feed(token)
        self.reasons = token == self._marks[0] if marks else reasons
        return text, offset, reasons

    def flush(self) -> str:
        """The text that was held back, that of the reasoning if `reasons`; called at the end."""
        return self._texts[self.reasons].flush()

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return any(text.stopped for text in self._texts)

    @property
    def offset(self) -> int:
        """The offset in the answer proper at which the next token begins."""
        return self._texts[0].offset


class _Stop:
    """Finds one string in text read character by character, each in constant time on average (Knuth, Morris, Pratt).

    Its table grows only as far as the text has matched: most texts never get near the end of a long stop string.
    """

    def __init__(self, text: str):
        self.text = text
        self.matched = 0  # length of the longest prefix of the string that the text read so far ends with
        self._shorter = [0]  # for each prefix length, that of its longest proper prefix that is also its suffix

    def _step(self, matched, character):
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)

    def read(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        self.matched = self._step(self.matched, character)
        if self.matched > len(self._shorter):
            self._shorter.append(self._step(self._shorter[-1], character))
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[-1]
        return True
