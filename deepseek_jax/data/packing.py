"""Sequences of complete documents, for conversations: if one were cut, an answer could lose its question.

Documents of a source are packed once, each into the fullest sequence that still has room (best fit, the longest
first); every epoch has the same sequences in a new order. The rest of a sequence is filled with text that has no loss
and that no document sees.
"""

from __future__ import annotations

import bisect
import functools

import numpy as np

from deepseek_jax.data.examples import Window
from deepseek_jax.data.token_shards import Shard


def pack(lengths_N: np.ndarray, room: int) -> list[list[int]]:
    """The numbers of the documents in each sequence of at most `room` tokens; longer ones are left out."""
    rows, free, of = [], [], {}  # free: the distinct amounts of free room, ascending; of: the rows with each amount
    for document in np.argsort(-lengths_N, kind="stable"):
        length = int(lengths_N[document])
        if length > room:
            continue
        place = bisect.bisect_left(free, length)
        if place == len(free):
            row, left = len(rows), room
            rows.append([])
        else:
            left = free[place]
            row = of[left].pop()
            if not of[left]:
                del free[place], of[left]
        rows[row].append(int(document))
        left -= length
        if left not in of:
            bisect.insort(free, left)
        of.setdefault(left, []).append(row)
    return rows


class WholeDocuments:
    """The endless sequences of one source, read at any number.

    Args:
      length: T; a sequence has T + 1 tokens.
    """

    def __init__(self, shard: Shard, seed: int, source: int, length: int):
        self.shard, self.room = shard, length + 1
        self.rows = pack(shard.lengths_N, self.room)
        self.order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, source, epoch]).permutation(len(self.rows)))

    @property
    def left_out(self) -> int:
        """Documents that are longer than a sequence."""
        return int((self.shard.lengths_N > self.room).sum())

    def sequence(self, j: int) -> Window:
        """Sequence j of training: T + 1 tokens."""
        epoch, place = divmod(j, len(self.rows))
        return self.row(int(self.order(epoch)[place]))

    def row(self, r: int) -> Window:
        """Packed sequence r. Segments number its documents from 1; 0 is filler."""
        tokens, predicted, segments = [], [], []
        for document in self.rows[r]:
            start, stop = (int(o) for o in self.shard.offsets_N[document:document + 2])
            tokens.append(np.asarray(self.shard.tokens[start:stop], np.int32))
            predicted.append(self.shard.is_predicted(start, stop))
            segments.append(np.full(stop - start, len(segments) + 1, np.int32))
        used = sum(map(len, tokens))
        # Text, not one repeated token: the experts' loads are counted over the filler too.
        tokens.append(np.resize(np.concatenate(tokens), self.room - used))
        none = np.zeros(self.room - used, np.int32)
        return Window(np.concatenate(tokens), np.concatenate([*predicted, none.astype(bool)]),
                      np.concatenate([*segments, none]))
