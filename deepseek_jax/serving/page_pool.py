"""The owners of the cache's pages: bookkeeping only, no arrays.

A page is free, owned by one or more sequences (counted), or kept: not owned, but with a prefix that a later prompt may
share, until the page is needed. A prefix is identified by the digest of all its tokens, page by page.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


class Pages:
    """`total` pages of `page_size` tokens, numbered from 1; page 0 is the scratch page."""

    def __init__(self, total: int, page_size: int):
        self.total, self.page_size = total, page_size
        self._free = list(range(total, 0, -1))
        self._owners = collections.Counter()
        self._kept = collections.OrderedDict()  # page -> digest; the least recently used first
        self._page_of = {}  # digest -> page
        self._digest_of = {}  # page -> digest, owned or kept
        self.reserved = 0  # pages that sequences may still take

    @property
    def available(self) -> int:
        """Pages that are neither owned nor reserved."""
        return len(self._free) + len(self._kept) - self.reserved

    @property
    def owned(self) -> int:
        """Pages that sequences own."""
        return len(self._owners)

    def pages_of(self, tokens: int) -> int:
        """Pages that `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def reserve(self, count: int) -> None:
        """Reserves `count` pages for a sequence to `take` as it grows. Raises ValueError if fewer are left."""
        if count > self.available:
            raise ValueError(f"{count} pages were asked for, {self.available} are available.")
        self.reserved += count

    def cancel(self, count: int) -> None:
        """Cancels a reservation."""
        self.reserved -= count

    def take(self) -> int:
        """Takes one of the reserved pages."""
        self.reserved -= 1
        if self._free:
            page = self._free.pop()
        else:
            page, digest = self._kept.popitem(last=False)
            del self._page_of[digest], self._digest_of[page]
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds an owner to an owned or kept page."""
        self._kept.pop(page, None)
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """Removes an owner. A page without owners is kept if its prefix is known, and free otherwise."""
        self._owners[page] -= 1
        if self._owners[page] == 0:
            del self._owners[page]
            if page in self._digest_of:
                self._kept[page] = self._digest_of[page]
            else:
                self._free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Registers an owned, filled page as the end of the prefix with this digest."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known prefix of `tokens`, full pages only."""
        found = []
        for digest in digests(tokens, self.page_size):
            if digest not in self._page_of:
                break
            found.append(self._page_of[digest])
        return found

    def idle(self, page: int) -> bool:
        """Whether sharing this page would take it out of the available ones."""
        return page in self._kept

    def clear(self) -> None:
        """Drops every kept prefix."""
        while self._kept:
            page, digest = self._kept.popitem()
            del self._page_of[digest], self._digest_of[page]
            self._free.append(page)


def digests(tokens: Sequence[int], page_size: int, parent: bytes = b"") -> Iterator[bytes]:
    """One digest for each full page, of the page and of everything before it."""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[start:start + page_size], np.int64).tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        yield parent
