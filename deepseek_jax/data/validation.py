"""The validation stream: documents as they are, in order, every token predicted exactly once.

Bits per byte = nats / ln 2 / bytes, where the nats are those of all scored tokens (BOS and EOS too; only the very
first BOS is never a target) and the bytes are those that the scored tokens spell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.data.examples import Window
from deepseek_jax.data.packing import WholeDocuments
from deepseek_jax.data.token_shards import Shard


class Validation:
    """The validation documents of all sources as one stream, and the sequences that cover it."""

    def __init__(self, shards: Sequence[Shard], sequence_length: int, byte_lengths_W: np.ndarray):
        self.shards, self.length, self.byte_lengths_W = shards, sequence_length, byte_lengths_W
        self.starts = np.concatenate([[0], np.cumsum([len(s.tokens) for s in shards])]).astype(np.int64)
        self.rows = max(0, -(-(self.tokens - 1) // sequence_length))  # the last may be padded

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    def read(self, position: int, count: int) -> Window:
        """Up to `count` tokens starting at `position`."""
        parts, documents = [], 0
        for shard, start in zip(self.shards, self.starts):
            first, last = (min(max(p - int(start), 0), len(shard.tokens)) for p in (position, position + count))
            document_T = np.searchsorted(shard.offsets_N, np.arange(first, last), side="right") + documents
            parts.append((np.asarray(shard.tokens[first:last], np.int32), shard.is_predicted(first, last), document_T))
            documents += len(shard.bytes_N)
        tokens_T, predicted_T, document_T = (np.concatenate(x) for x in zip(*parts))
        return Window(tokens_T, predicted_T, (document_T - document_T[:1] + 1).astype(np.int32))

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, weights and segment ids [T + 1] of row r; padding of the last row has weight and segment 0."""
        window = self.read(r % self.rows * self.length, self.length + 1)
        n = len(window.tokens_T)
        # Text, not one repeated token: the experts' loads are counted over the filling too.
        filling = np.resize(self.read(0, self.length + 1).tokens_T, self.length + 1 - n)
        weights_T, segments_T = np.zeros(self.length + 1, np.float32), np.zeros(self.length + 1, np.int32)
        if r < self.rows:
            weights_T[1:n], segments_T[:n] = window.predicted_T[1:], window.segments_T
        return np.concatenate([window.tokens_T, filling]).astype(np.int32), weights_T, segments_T

    def batch_numbers(self, rows: int, limit: int = 0) -> range | list[int]:
        """Which batches of `rows` sequences are scored, over all hosts together: all, or `limit` of them.

        These are spread evenly, and a source that they would miss gets the batch in the middle of it in addition.
        """
        batches = -(-self.rows // rows)
        if not 0 < limit < batches:
            return range(batches)
        chosen = {i * batches // limit for i in range(limit)}
        missed = set(range(len(self.shards))).difference(*(self.sources_of(i, rows) for i in chosen))
        return sorted(chosen | {row // rows for s in missed if (row := self._middle(s)) is not None})

    def _middle(self, source) -> int | None:
        """The row in the middle of a source; None if it has no text."""
        first, end = (int(position) for position in self.starts[source:source + 2])
        return (first + end) // 2 // self.length if first < end else None

    def batches(self, rows: int, limit: int = 0, host: int = 0, hosts: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """tokens, weights, segment_ids [rows, T + 1] of this host, whose share of each batch is contiguous."""
        for i in self.batch_numbers(rows * hosts, limit):
            first = (i * hosts + host) * rows
            made = zip(*(self.row(r) for r in range(first, first + rows)))
            yield {name: np.stack(x) for name, x in zip(("tokens", "weights", "segment_ids"), made)}

    def sources_of(self, batch: int, rows: int) -> list[int]:
        """The sources that targets of this batch come from; `rows` of it, over all hosts together."""
        first, end = batch * rows * self.length + 1, min((batch + 1) * rows * self.length + 1, self.tokens)
        return [s for s in range(len(self.shards)) if max(first, self.starts[s]) < min(end, self.starts[s + 1])]

    def only(self, source: int, weights_BT: np.ndarray, first_row: int) -> np.ndarray:
        """weights_BT of the rows from `first_row` on, 0 where a target comes from another source."""
        position_BT = (first_row + np.arange(len(weights_BT)))[:, None] * self.length + np.arange(self.length + 1)
        start, end = self.starts[source:source + 2]
        return np.where((position_BT >= start) & (position_BT < end), weights_BT, 0).astype(weights_BT.dtype)

    def bytes(self, rows: int, limit: int = 0) -> int:
        """UTF-8 bytes that the scored tokens of those batches spell."""
        total = 0
        for i in self.batch_numbers(rows, limit):
            window = self.read(i * rows * self.length + 1, rows * self.length)
            total += int((self.byte_lengths_W[window.tokens_T] * window.predicted_T).sum(dtype=np.int64))
        return total


class WholeValidation(Validation):
    """The same for sequences of complete documents (`packing`): documents longer than a sequence are not scored.

    Args:
      sources: the held-out documents of each source.
    """

    def __init__(self, sources: Sequence[WholeDocuments], sequence_length: int, byte_lengths_W: np.ndarray):
        super().__init__([source.shard for source in sources], sequence_length, byte_lengths_W)
        self.sources = sources
        self.first_rows = np.cumsum([0, *(len(source.rows) for source in sources)])
        self.rows = int(self.first_rows[-1])

    @property
    def left_out(self) -> int:
        """Documents that are longer than a sequence."""
        return sum(source.left_out for source in self.sources)

    def _row(self, r: int) -> tuple[int, Window]:
        """The source of row r, and its tokens."""
        source = int(np.searchsorted(self.first_rows, r, side="right")) - 1
        return source, self.sources[source].row(r - int(self.first_rows[source]))

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, weights and segment ids [T + 1] of row r; weight and segment of filler are 0."""
        _, window = self._row(r % self.rows)
        weights_T = window.predicted_T.astype(np.float32)
        weights_T[0] = 0
        if r < self.rows:
            return window.tokens_T, weights_T, window.segments_T
        return window.tokens_T, np.zeros_like(weights_T), np.zeros_like(window.segments_T)

    def _middle(self, source):
        first, end = (int(row) for row in self.first_rows[source:source + 2])
        return (first + end) // 2 if first < end else None

    def sources_of(self, batch: int, rows: int) -> list[int]:
        """The sources of the sequences of this batch; `rows` of it, over all hosts together."""
        return sorted({self._row(r)[0] for r in range(batch * rows, min((batch + 1) * rows, self.rows))})

    def only(self, source: int, weights_BT: np.ndarray, first_row: int) -> np.ndarray:
        """weights_BT of the rows from `first_row` on, 0 in those of other sources."""
        row_B = first_row + np.arange(len(weights_BT))
        mine_B = (row_B >= self.first_rows[source]) & (row_B < self.first_rows[source + 1])
        return np.where(mine_B[:, None], weights_BT, 0).astype(weights_BT.dtype)

    def bytes(self, rows: int, limit: int = 0) -> int:
        """UTF-8 bytes that the scored tokens of those batches spell."""
        total = 0
        for i in self.batch_numbers(rows, limit):
            for r in range(i * rows, min((i + 1) * rows, self.rows)):
                tokens_T, weights_T, segments_T = self.row(r)
                scored_T = (weights_T[1:] > 0) & (segments_T[1:] == segments_T[:-1])
                total += int((self.byte_lengths_W[tokens_T[1:]] * scored_T).sum(dtype=np.int64))
        return total
