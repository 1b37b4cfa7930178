"""From documents to sequences: FIM, packing and mixing as random access (report section 4.1).

The stream of a source is its documents in a new order every epoch, a share of them rearranged prefix-suffix-middle:

    BOS fim_begin PREFIX fim_hole SUFFIX fim_end MIDDLE EOS

Sequence j is tokens j*T ... (j+1)*T of that stream. FIM adds exactly three tokens to a known number of documents per
epoch, so every position is found by arithmetic and one binary search: a sequence is a function of its number.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data.token_shards import Shard

MIX_BLOCK = 1024  # sequences after which sources have exactly their shares
SHUFFLE_BLOCK = 1 << 16  # sequences: half a megabyte of permutation


class Window(NamedTuple):
    """A stretch of a stream."""

    tokens_T: np.ndarray  # int32
    predicted_T: np.ndarray  # bool
    segments_T: np.ndarray  # int32: which document of the stretch, from 1


class Fim(NamedTuple):
    """How often documents are rearranged, and the ids that mark it."""

    rate: float = 0.0
    begin: int = -1
    hole: int = -1
    end: int = -1


def rearrange(ids_T: np.ndarray, fim: Fim, first: int, second: int) -> np.ndarray:
    """One document (BOS ... EOS) in prefix-suffix-middle order; the cuts are 1 <= first <= second <= len - 1."""
    prefix, middle, suffix = ids_T[1:first], ids_T[first:second], ids_T[second:-1]
    return np.concatenate([ids_T[:1], [fim.begin], prefix, [fim.hole], suffix, [fim.end], middle, ids_T[-1:]])


class EpochOrder(NamedTuple):
    """One epoch of a source: the i-th document of the stream is order_N[i] and starts at token starts_N[i]."""

    order_N: np.ndarray
    rearranged_N: np.ndarray  # bool, by document number, not by position in the order
    starts_N: np.ndarray


def rearranged_before(epoch: int, eligible: int, rate: float) -> int:
    """Documents rearranged in all epochs before `epoch`. Exact proportions over epochs, even for few documents."""
    return math.floor(epoch * eligible * rate)


def epoch_order(lengths_N: np.ndarray, whole_N: np.ndarray, fim_rate: float, seed: int, source: int,
                epoch: int) -> EpochOrder:
    """The permutation of an epoch, and the documents that are rearranged in it."""
    rng = np.random.default_rng([seed, source, epoch])
    order_N = rng.permutation(len(lengths_N))
    eligible = np.flatnonzero(whole_N)
    before, after = (rearranged_before(e, len(eligible), fim_rate) for e in (epoch, epoch + 1))
    rearranged_N = np.zeros(len(lengths_N), bool)
    rearranged_N[rng.choice(eligible, after - before, replace=False)] = True
    lengths_in_order_N = (lengths_N + 3 * rearranged_N)[order_N]
    return EpochOrder(order_N, rearranged_N, np.cumsum(lengths_in_order_N) - lengths_in_order_N)


class Packed(abc.ABC):
    """The endless packed stream of one source, read at any position. Subclasses define the order of documents."""

    eligible: int  # documents that may be rearranged

    def __init__(self, shard: Shard, seed: int, source: int, fim: Fim):
        self.shard, self.seed, self.source, self.fim = shard, seed, source, fim
        self.tokens = int(shard.offsets_N[-1])

    @abc.abstractmethod
    def shuffled(self, j: int, length: int) -> int:
        """The number in the stream of the j-th sequence of training.

        Neighbours in the stream are mostly from one document; a batch of them would not be a sample of the corpus.
        """

    @abc.abstractmethod
    def documents_from(self, epoch: int, skip: int) -> Iterator[tuple[np.ndarray, ...]]:
        """(tokens int32 [T], predicted bool [T]) of documents, across epochs, from token `skip` of `epoch` on."""

    def epoch_start(self, epoch: int) -> int:
        """The position of the first token of an epoch."""
        return epoch * self.tokens + 3 * rearranged_before(epoch, self.eligible, self.fim.rate)

    def epoch_at(self, position: int) -> int:
        """The epoch of a position."""
        epoch = int(position / (self.tokens + 3 * self.eligible * self.fim.rate))
        # Epochs begin at most three tokens before the position by the mean length, never after it.
        while self.epoch_start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def read_document(self, epoch: int, i: int, rearranged: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of document i in an epoch, int32 [T], and which of them are predicted, bool [T].

        rearranged: with its middle at the end (`rearrange`).
        """
        start, stop = (int(o) for o in self.shard.offsets_N[i:i + 2])
        ids_T = np.asarray(self.shard.tokens[start:stop], np.int32)
        if not rearranged:
            return ids_T, self.shard.is_predicted(start, stop)
        rng = np.random.default_rng([self.seed, self.source, epoch, i])
        first, second = np.sort(rng.integers(1, len(ids_T), 2))
        ids_T = rearrange(ids_T, self.fim, first, second).astype(np.int32)
        return ids_T, np.ones(len(ids_T), bool)

    def read(self, position: int, count: int) -> Window:
        """`count` tokens starting at `position`, across documents and epochs."""
        tokens, predicted, segments = [], [], []
        epoch = self.epoch_at(position)
        documents = self.documents_from(epoch, position - self.epoch_start(epoch))
        while count > 0:
            ids_T, predicted_T = next(documents)
            tokens.append(ids_T[:count])
            predicted.append(predicted_T[:count])
            segments.append(np.full(len(tokens[-1]), len(segments) + 1, np.int32))
            count -= len(tokens[-1])
        return Window(*(np.concatenate(x) for x in (tokens, predicted, segments)))


class Stream(Packed):
    """The order of runs from before `blocks` existed: documents permuted over a complete epoch, by an array."""

    def __init__(self, shard: Shard, seed: int, source: int, fim: Fim):
        super().__init__(shard, seed, source, fim)
        self.lengths_N, self.whole_N = shard.lengths_N, shard.whole_N
        self.eligible = int(self.whole_N.sum())
        self.epoch_order = functools.lru_cache(maxsize=3)(functools.partial(
            epoch_order, self.lengths_N, self.whole_N, fim.rate, seed, source))

    def document(self, epoch: int, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of document i in an epoch, int32 [T], and which of them are predicted, bool [T]."""
        return self.read_document(epoch, i, self.epoch_order(epoch).rearranged_N[i])

    def documents_from(self, epoch: int, skip: int) -> Iterator[tuple[np.ndarray, ...]]:
        place = int(np.searchsorted(self.epoch_order(epoch).starts_N, skip, side="right")) - 1
        skip -= int(self.epoch_order(epoch).starts_N[place])
        while True:
            for i in self.epoch_order(epoch).order_N[place:]:
                yield tuple(part[skip:] for part in self.document(epoch, int(i)))
                skip = 0
            epoch, place = epoch + 1, 0

    def shuffled(self, j: int, length: int) -> int:
        size = min(max(self.tokens // length, 1), SHUFFLE_BLOCK)
        block, r = divmod(j, size)
        return block * size + int(_permutation(self.seed, self.source, block, size)[r])


def sequence(stream: Packed, j: int, length: int) -> Window:
    """Sequence j: length + 1 tokens, of which the last is the first of sequence j + 1."""
    return stream.read(j * length, length + 1)


@functools.lru_cache(maxsize=64)
def _permutation(seed, source, block, size):
    return np.random.default_rng([seed, source, block, size]).permutation(size)


class Mixture:
    """The source of the g-th sequence of a run, and the sequence's number in that source.

    Every block of 1024 sequences has the same shuffled pattern, with the sources in their exact shares.
    """

    def __init__(self, weights: tuple[float, ...], seed: int, first: int = 0, used: tuple[int, ...] | None = None):
        """weights: 0 for a source that is not read. first: the sequence at which the pattern begins. used: sequences
        already taken from each source before it."""
        if not weights or min(weights) < 0 or not any(weights):
            raise ConfigError(f"data.sources: weights {weights} must be positive, or 0 where a source gives nothing.")
        if len(weights) > MIX_BLOCK:
            raise ConfigError(f"data.sources: {len(weights)} are more than {MIX_BLOCK}; join some with a glob.")
        fractions_S = np.array(weights) / sum(weights)
        if any(weight > 0 and not share for weight, share in zip(weights, fractions_S)):
            raise ConfigError(f"data.sources: of weights {weights} one has no share of their sum, {sum(weights):g}; "
                              "give some that are nearer to each other and to 1.")
        self.first, self.used = first, used or (0,) * len(weights)
        self.counts_S = _shares(fractions_S, MIX_BLOCK)
        pattern = np.repeat(np.arange(len(weights)), self.counts_S)
        self.pattern_G = np.random.default_rng([seed, len(weights)]).permutation(pattern)
        self.rank_G = np.zeros(MIX_BLOCK, np.int64)  # sequences of the same source earlier in the block
        for s, n in enumerate(self.counts_S):
            self.rank_G[self.pattern_G == s] = np.arange(n)

    def locate(self, g: int) -> tuple[int, int]:
        """(source, number of the sequence in that source)."""
        block, r = divmod(g - self.first, MIX_BLOCK)
        source = int(self.pattern_G[r])
        return source, self.used[source] + block * int(self.counts_S[source]) + int(self.rank_G[r])

    def given_before(self, g: int) -> list[int]:
        """The number of sequences of each source among those before the g-th."""
        blocks, r = divmod(g - self.first, MIX_BLOCK)
        rest_S = np.bincount(self.pattern_G[:r], minlength=len(self.counts_S))
        return [u + blocks * int(n) + int(m) for u, n, m in zip(self.used, self.counts_S, rest_S)]


def _shares(fractions_S, total) -> np.ndarray:
    """Integers that sum to `total`, by largest remainders: at least one each, and zero for a weight of 0."""
    exact_S, has_S = fractions_S * total, fractions_S > 0
    counts_S = np.maximum(np.floor(exact_S).astype(np.int64), has_S)
    while counts_S.sum() != total:
        step = 1 if counts_S.sum() < total else -1
        movable_S = has_S & ((counts_S > 1) | (step > 0))
        counts_S[np.argmax(np.where(movable_S, step * (exact_S - counts_S), -np.inf))] += step
    return counts_S
