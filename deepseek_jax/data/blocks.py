"""The packed stream of a source of any size, in memory that does not grow with its documents.

Documents are shuffled within blocks of 4,096, anew in each epoch, and sequences over a complete epoch, by a function of
their number (`permutation`). The start of a block is computed from the index on the disk: of the E documents that may
be rearranged for FIM, R are counted as rearranged in an epoch, the one of number e if

    floor(((e + 1) R + u) / E) > floor((e R + u) / E),    u in [0, E) drawn for the epoch,

so that each block has a fixed count, and the documents are drawn within the block.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.examples import Fim, Packed, rearranged_before
from deepseek_jax.data.permutation import permuted
from deepseek_jax.data.token_shards import Shard

BLOCK = 4096  # documents


class Block(NamedTuple):
    """Some documents of an epoch, in their order there."""

    start: int  # token of the epoch
    order_D: np.ndarray  # numbers of the documents
    rearranged_D: np.ndarray  # bool, in that order
    starts_D: np.ndarray  # tokens from the start of the block


class BlockStream(Packed):
    """The endless packed stream of one source, read at any position."""

    def __init__(self, shard: Shard, seed: int, source: int, fim: Fim, block: int = BLOCK):
        super().__init__(shard, seed, source, fim)
        self.documents, self.size = len(shard.offsets_N) - 1, block
        self.blocks = -(-self.documents // block)
        self._block = functools.lru_cache(maxsize=64)(self._make_block)
        self._phase = functools.lru_cache(maxsize=4)(self._draw_phase)

    @functools.cached_property
    def eligible(self) -> int:
        return self._eligible_before(self.documents)

    def _eligible_before(self, i: int) -> int:
        """Documents before i that may be rearranged."""
        before = self.shard.whole_before_N
        return i if before is None else int(before[i])

    def shuffled(self, j: int, length: int) -> int:
        """The number in the stream of the j-th sequence of training."""
        size = max(self.tokens // length, 1)
        epoch, r = divmod(j, size)
        return epoch * size + permuted(r, size, self.seed, self.source, epoch, size)

    def rearranged_up_to(self, epoch: int, i: int) -> int:
        """Documents before i that are rearranged in an epoch, where i is the start of a block or the end."""
        if not self.eligible:
            return 0
        count = rearranged_before(epoch + 1, self.eligible, self.fim.rate) - rearranged_before(
            epoch, self.eligible, self.fim.rate)
        return (self._eligible_before(i) * count + self._phase(epoch)) // self.eligible

    def _draw_phase(self, epoch):
        return int(np.random.default_rng([self.seed, self.source, epoch]).integers(self.eligible))

    def block_start(self, epoch: int, block: int) -> int:
        """The token of the epoch that a block starts at."""
        first = min(block * self.size, self.documents)
        return int(self.shard.offsets_N[first]) + 3 * self.rearranged_up_to(epoch, first)

    def _make_block(self, epoch, block) -> Block:
        first, end = block * self.size, min((block + 1) * self.size, self.documents)
        rng = np.random.default_rng([self.seed, self.source, epoch, block])
        order_D = rng.permutation(end - first)
        before = self.shard.whole_before_N
        may = np.arange(end - first) if before is None else np.flatnonzero(np.diff(before[first:end + 1]))
        count = self.rearranged_up_to(epoch, end) - self.rearranged_up_to(epoch, first)
        rearranged_D = np.zeros(end - first, bool)
        rearranged_D[rng.choice(may, count, replace=False)] = True
        lengths_D = (np.diff(self.shard.offsets_N[first:end + 1]) + 3 * rearranged_D)[order_D]
        return Block(self.block_start(epoch, block), order_D + first, rearranged_D[order_D],
                     np.cumsum(lengths_D) - lengths_D)

    def documents_from(self, epoch: int, skip: int) -> Iterator[tuple[np.ndarray, ...]]:
        number = bisect.bisect_right(range(self.blocks), skip, key=lambda b: self.block_start(epoch, b)) - 1
        block = self._block(epoch, number)
        place = int(np.searchsorted(block.starts_D, skip - block.start, side="right")) - 1
        skip -= block.start + int(block.starts_D[place])
        while True:
            for i, rearranged in zip(block.order_D[place:].tolist(), block.rearranged_D[place:]):
                yield tuple(part[skip:] for part in self.read_document(epoch, i, rearranged))
                skip = 0
            place, number = 0, number + 1
            if number == self.blocks:
                epoch, number = epoch + 1, 0
            block = self._block(epoch, number)
