"""The packed stream: FIM moves tokens and loses none, and any position can be read without those before it."""

import collections
import dataclasses
import functools
import itertools

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data.blocks import BLOCK, BlockStream
from deepseek_jax.data.examples import MIX_BLOCK, Fim, Mixture, Stream, rearrange, sequence
from deepseek_jax.data.token_shards import Shard

BOS, EOS, BEGIN, HOLE, END = 0, 1, 3, 4, 5


def make_shard(lengths, prompts=()):
    """Documents BOS 10 11 12 ... EOS, distinguished by their values; those in `prompts` begin with a prompt."""
    documents = [[BOS, *range(100 * i + 10, 100 * i + 10 + n), EOS] for i, n in enumerate(lengths)]
    offsets_N = np.cumsum([0, *map(len, documents)])
    predicted = np.ones(offsets_N[-1], bool)
    for i in prompts:
        predicted[offsets_N[i]:offsets_N[i] + 3] = False
    shard = Shard(np.concatenate(documents).astype(np.uint16), offsets_N, np.array(lengths),
                  predicted if prompts else None)
    return dataclasses.replace(shard, whole_before_N=np.cumsum([0, *shard.whole_N])) if prompts else shard


def make_stream(lengths=(5, 0, 17, 3, 40, 8), rate=0.5, seed=0, prompts=(), kind=Stream):
    return kind(make_shard(lengths, prompts), seed, 0, Fim(rate, BEGIN, HOLE, END))


in_blocks = functools.partial(BlockStream, block=4)
of_both = pytest.mark.parametrize("kind", [Stream, in_blocks, BlockStream], ids=["old", "blocks", "one_block"])


def documents_of(tokens):
    """Splits a stream that begins at a BOS into its documents."""
    starts = np.flatnonzero(tokens == BOS)
    return [tuple(d) for d in np.split(tokens, starts[1:])]


def unrearranged(document):
    """Prefix, middle and suffix back in their original order."""
    if BEGIN not in document:
        return tuple(document)
    begin, hole, end = (document.index(t) for t in (BEGIN, HOLE, END))
    assert begin == 1 and document[-1] == EOS
    return (BOS, *document[begin + 1:hole], *document[end + 1:-1], *document[hole + 1:end], EOS)


def test_fim_writes_prefix_suffix_middle():
    ids = np.array([BOS, 10, 11, 12, 13, 14, EOS])
    fim = Fim(1.0, BEGIN, HOLE, END)
    assert rearrange(ids, fim, 2, 4).tolist() == [BOS, BEGIN, 10, HOLE, 13, 14, END, 11, 12, EOS]
    assert rearrange(ids, fim, 1, 1).tolist() == [BOS, BEGIN, HOLE, 10, 11, 12, 13, 14, END, EOS]
    assert rearrange(ids, fim, 1, 6).tolist() == [BOS, BEGIN, HOLE, END, 10, 11, 12, 13, 14, EOS]


@of_both
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_every_epoch_holds_every_document_whole(rate, kind):
    stream = make_stream(rate=rate, kind=kind)
    wanted = sorted(map(tuple, np.split(stream.shard.tokens, stream.shard.offsets_N[1:-1])))
    for epoch in range(6):
        start = stream.epoch_start(epoch)
        window = stream.read(start, stream.epoch_start(epoch + 1) - start)
        assert sorted(map(unrearranged, documents_of(window.tokens_T))) == wanted


def test_fim_has_its_rate_over_epochs_and_documents():
    stream = make_stream([4] * 7, rate=0.1)
    times = collections.Counter()
    for epoch in range(200):
        times.update(np.flatnonzero(stream.epoch_order(epoch).rearranged_N).tolist())
    assert sum(times.values()) == 140
    assert len(times) == 7 and max(times.values()) < 40


@pytest.mark.parametrize("prompts", [(), tuple(range(0, 50, 3))])
def test_of_each_block_and_epoch_its_share_is_rearranged_and_over_epochs_every_document(prompts):
    stream = make_stream([4] * 50, rate=0.1, prompts=prompts, kind=in_blocks)
    times, total = collections.Counter(), 0
    for epoch in range(300):
        blocks = [stream._block(epoch, b) for b in range(stream.blocks)]
        found = [block.order_D[block.rearranged_D].tolist() for block in blocks]
        assert all(stream.block_start(epoch, b) == block.start for b, block in enumerate(blocks))
        assert stream.epoch_start(epoch + 1) - stream.epoch_start(epoch) == stream.tokens + 3 * sum(map(len, found))
        assert max(map(len, found)) <= 1
        total += sum(map(len, found))
        times.update(itertools.chain(*found))
    eligible = set(range(50)) - set(prompts)
    assert total == int(300 * len(eligible) * 0.1)
    assert set(times) == eligible and max(times.values()) < 60 and min(times.values()) > 10


def test_documents_change_places_in_their_block_and_sequences_in_the_epoch():
    stream = make_stream([4] * 50, kind=functools.partial(BlockStream, block=10))
    orders = [tuple(stream._block(epoch, 2).order_D.tolist()) for epoch in range(20)]
    assert len(set(orders)) == 20 and all(sorted(order) == list(range(20, 30)) for order in orders)
    size = stream.tokens // 5
    for epoch in range(3):
        taken = [stream.shuffled(epoch * size + r, 5) for r in range(size)]
        assert sorted(taken) == list(range(epoch * size, (epoch + 1) * size))
        assert taken != sorted(taken)


def test_reading_takes_memory_of_one_block_however_many_documents_there_are():
    """The reader asks the index for slices of a block and for single entries: 30 million documents, none of which
    exist.
    """
    most = []

    class Offsets:
        def __len__(self):
            return 30_000_001

        def __getitem__(self, i):
            if isinstance(i, slice):
                most.append(i.stop - i.start)
                return np.arange(i.start, i.stop) * 100
            return 100 * (i % 30_000_001)

    class Tokens:
        def __getitem__(self, where):
            return np.arange(where.start, where.stop) % 7

    stream = BlockStream(Shard(Tokens(), Offsets(), np.zeros(0)), 0, 0, Fim(0.1, BEGIN, HOLE, END))
    window = sequence(stream, stream.shuffled(12345, 512), 512)
    assert len(window.tokens_T) == 513 and max(most) == BLOCK + 1


def test_fim_cuts_differ_between_epochs_and_cover_a_document():
    stream = make_stream([30], rate=1.0)
    cuts = {stream.document(epoch, 0)[0].tolist().index(HOLE) for epoch in range(200)}
    assert min(cuts) == 2 and max(cuts) > 25 and len(cuts) > 15


@of_both
def test_documents_with_a_prompt_are_never_rearranged(kind):
    stream = make_stream([6] * 4, rate=1.0, prompts=(0, 2), kind=kind)
    window = stream.read(0, stream.epoch_start(1))
    for document in documents_of(window.tokens_T):
        assert (BEGIN in document) == (document[2] // 100 in (1, 3) or document[-2] // 100 in (1, 3))
    assert (window.tokens_T == BEGIN).sum() == 2


@of_both
def test_unpredicted_tokens_stay_marked_in_the_stream(kind):
    stream = make_stream([6] * 4, rate=0.5, prompts=(0, 2), kind=kind)
    window = stream.read(0, stream.epoch_start(1))
    assert sorted(window.tokens_T[~window.predicted_T].tolist()) == [BOS, BOS, 10, 11, 210, 211]


@of_both
@pytest.mark.parametrize("rate", [0.0, 0.37, 1.0])
def test_random_access_equals_reading_from_the_start(rate, kind):
    stream = make_stream(rate=rate, kind=kind)
    whole = stream.read(0, 1500)
    assert stream.epoch_at(1499) > 10
    for position in np.random.default_rng(0).integers(0, 1400, 60).tolist():
        part = make_stream(rate=rate, kind=kind).read(position, 97)
        assert (part.tokens_T == whole.tokens_T[position:position + 97]).all()
        change = np.diff(whole.segments_T[position:position + 97])
        assert part.segments_T[0] == 1 and (np.diff(part.segments_T) == change).all()


@of_both
def test_sequences_rebuild_the_stream_with_one_token_shared(kind):
    stream = make_stream(kind=kind)
    pieces = [sequence(stream, j, 16).tokens_T for j in range(40)]
    assert all(len(p) == 17 for p in pieces)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(pieces))
    assert (np.concatenate([p[:-1] for p in pieces]) == stream.read(0, 640).tokens_T).all()


@of_both
def test_segments_change_exactly_at_each_bos(kind):
    window = make_stream(kind=kind).read(3, 400)
    starts = window.tokens_T == BOS
    starts[0] = True
    assert (window.segments_T == np.cumsum(starts)).all()


def test_epochs_and_seeds_shuffle_differently():
    order = lambda epoch, seed: tuple(make_stream(range(3, 23), seed=seed).epoch_order(epoch).order_N)
    assert len({order(0, 0), order(1, 0), order(0, 1)}) == 3
    assert order(0, 0) == order(0, 0)


@pytest.mark.parametrize("weights, counts", [
    ((1.0,), [1024]), ((3.0, 1.0), [768, 256]), ((1, 1, 1), [342, 341, 341]), ((1e6, 1, 1), [1022, 1, 1])])
def test_every_block_has_the_sources_in_their_shares(weights, counts):
    mixture = Mixture(weights, seed=0)
    for block in (0, 7):
        found = [mixture.locate(block * MIX_BLOCK + r)[0] for r in range(MIX_BLOCK)]
        assert np.bincount(found).tolist() == counts


def test_each_source_is_read_in_order_without_gaps():
    mixture = Mixture((5, 3, 1), seed=1)
    seen = collections.defaultdict(list)
    for g in range(3000):
        source, j = mixture.locate(g)
        seen[source].append(j)
    assert all(js == list(range(len(js))) for js in seen.values()) and len(seen) == 3


def test_sources_are_mixed_evenly_within_a_block():
    first = [Mixture((1, 1), seed=0).locate(g)[0] for g in range(256)]
    assert 96 < sum(first) < 160


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -1.0), (1.0,) * 1025, (1e308, 1e308), (1e200, 1e-200)])
def test_weights_that_cannot_be_met_are_a_config_error(weights):
    with pytest.raises(ConfigError, match=r"data\.sources"):
        Mixture(weights, seed=0)
